"""Stock architectures of Transformers that pretraining can make from the depth dial, beside nanochat's own.

What comes out is a plain checkpoint of its class: no code travels with it, and whatever runs that class runs it (vLLM;
llama.cpp after `nanochat convert --to_gguf`). The dial means the same as for nanochat: `depth` blocks of depth *
aspect_ratio channels, heads of `head_dim`, keys and values for every head, an untied head; the gated MLP, which has
three matrices, is 8/3 as wide so that a block weighs the same. The price of a stock network is what sets nanochat's
apart: no value embeddings, residual weights or windows, and a loss that makes all logits at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NANOCHAT = "nanochat_gpt"  # the model type of this project's own networks
WHOLE_ROWS = "nanochat_whole_rows"  # the name for `attn_implementation`
MLP_MULTIPLE = 64  # the MLP's width is a multiple of it, for the kernels' sake
# Fields of the configuration beyond the shape, by model type; None stands for the width of a head.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": None},  # its default is not hidden_size / heads
    "mistral": {"sliding_window": None},  # every position sees the whole context, as in the others
    "olmo2": {},
}


def is_nanochat(config: PreTrainedConfig) -> bool:
    """Whether it describes a network of this project, wherever its class came from."""
    return config.model_type == NANOCHAT


def stock_config(
    architecture: str,
    depth: int,
    *,
    vocab_size: int,
    head_dim: int = 128,
    aspect_ratio: int = 64,
    max_position_embeddings: int = 2048,
    **special_token_ids: Any,
) -> PreTrainedConfig:
    """The network of a stock architecture that the depth dial gives.

    Raises:
        ValueError: an architecture that is not in the table, or a depth below 1.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is {architecture!r}, expected nanochat or one of {', '.join(ARCHITECTURES)}")
    if depth < 1:
        raise ValueError(f"depth is {depth}, expected at least 1")
    heads = -(-depth * aspect_ratio // head_dim)
    hidden = heads * head_dim
    more = dict(ARCHITECTURES[architecture])
    if "head_dim" in more:
        more["head_dim"] = head_dim
    return AutoConfig.for_model(
        architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=-(-8 * hidden // (3 * MLP_MULTIPLE)) * MLP_MULTIPLE,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=False,
        **more,
        **special_token_ids,
    )


def fresh_network(config: PreTrainedConfig) -> PreTrainedModel:
    """A network with fresh float32 weights."""
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def run_activations_in(model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Let a network with float32 weights compute in `dtype`: nanochat's by itself, a stock one under autocast."""
    if is_nanochat(model.config):
        model.set_activation_dtype(dtype)
    elif dtype != torch.float32:
        model.forward = torch.autocast(device.type, dtype)(model.forward)


@contextmanager
def whole_rows(model: PreTrainedModel) -> Iterator[None]:
    """In here a stock network of the table takes every row as one text without padding: causal SDPA without a mask.

    Left to itself it looks at its own positions for packed texts: eagerly that asks the device at every step, and
    compiled, where nothing can be asked, it makes a mask of (B, 1, T, T), with which SDPA has no flash kernel. Other
    networks, and those with windows, are left to themselves.
    """
    config = model.config
    before = config._attn_implementation
    if before == "sdpa" and config.model_type in ARCHITECTURES and not getattr(config, "sliding_window", None):
        config._attn_implementation = WHOLE_ROWS
    try:
        yield
    finally:
        config._attn_implementation = before


AttentionInterface.register(WHOLE_ROWS, sdpa_attention_forward)  # and no mask function: then none is made
