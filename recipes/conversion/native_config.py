"""The configuration of Transformers' own `nanochat` class and ours, each as the other.

The native class is the launch era with an epsilon in every norm and rotary tables that are not rounded. MLX and other
runtimes load the same files. What else our networks have (value embeddings, windows, smear, ...) it cannot express.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import NanoChatConfig

from modeling_nanochat import NanoChatGPTConfig

SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "rope_parameters", "final_logit_softcapping")  # fmt: skip
REQUIRED_OF_NATIVE = {"hidden_act": "relu2", "attention_bias": False, "tie_word_embeddings": False}
REQUIRED_OF_OURS = {
    "use_residual_scalars": False, "use_value_embeddings": False, "smear_channels": 0, "use_backout": False,
    "query_key_scale": 1.0, "bfloat16_rotary_tables": False,
}  # fmt: skip
# What `pretrain --preset compatible` trains, for `from_depth`. MLX knows no other epsilon, softcap and windows (mlx-lm,
# `models/nanochat.py`); Transformers' class reads the epsilon from its configuration.
COMPATIBLE = {
    "era": "launch", "window_pattern": "L", "bfloat16_rotary_tables": False, "rms_norm_eps": 1e-5,
    "final_logit_softcapping": 15.0,
}  # fmt: skip


def config_from_native(folder: Path, overrides: dict[str, Any]) -> NanoChatGPTConfig:
    """Our configuration of a native checkpoint.

    Raises:
        ValueError: it has something that our network has not.
    """
    native = NanoChatConfig.from_pretrained(folder)
    refuse_others(native, REQUIRED_OF_NATIVE, f"{folder}: ")
    fields = {name: getattr(native, name) for name in (*SAME, "rms_norm_eps")}
    fields["head_dim"] = getattr(native, "head_dim", None) or native.hidden_size // native.num_attention_heads
    fields["bfloat16_rotary_tables"] = False
    return NanoChatGPTConfig.from_depth(native.num_hidden_layers, era="launch", **(fields | overrides))


def native_config(config: NanoChatGPTConfig) -> NanoChatConfig:
    """The native configuration of our network. Without an epsilon of its own it gets float32's, which it used.

    Raises:
        ValueError: the native class cannot express the network; the message says why.
    """
    heads_fill = {"head_dim": config.hidden_size // config.num_attention_heads}
    full = {"layer_types": ["full_attention"] * config.num_hidden_layers}
    hint = "Transformers' nanochat class is the launch era: "
    refuse_others(config, REQUIRED_OF_OURS | heads_fill | full, hint)
    fields = {name: getattr(config, name) for name in (*SAME, "bos_token_id", "eos_token_id", "pad_token_id")}
    epsilon = torch.finfo(torch.float32).eps if config.rms_norm_eps is None else config.rms_norm_eps
    return NanoChatConfig(num_hidden_layers=config.num_hidden_layers, rms_norm_eps=epsilon, **fields)


def refuse_others(config: Any, required: dict[str, Any], where: str) -> None:
    """`ValueError` for fields of another value than the one required, all of them named."""
    others = {name: value for name, value in required.items() if getattr(config, name) != value}
    if others:
        said = "; ".join(f"{name} is {getattr(config, name)!r}, expected {value!r}" for name, value in others.items())
        if "bfloat16_rotary_tables" in others:
            said += " (--override bfloat16_rotary_tables=false goes without the rounding)"
        raise ValueError(where + said)
