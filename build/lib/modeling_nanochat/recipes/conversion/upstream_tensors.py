"""Checkpoints of karpathy/nanochat and of Transformers' own `nanochat` class as tensors of ours, and back.

An upstream checkpoint says its shape but not which network of upstream's history it holds. That shows in the tensors:
which of them exist, and how wide the gates are. One pair of eras cannot be told apart (a softcap of 20 in early March
2026 leaves no trace in the file), so there the reader has to say so with an override.

Nothing is guessed and nothing dropped: what does not fit the recognised network exactly is an error that names it. The
price is that a fork with one more tensor is refused. Upstream's vocabulary padding (rows up to a multiple of 64 that
no text ever reaches) is split off and handed back beside the weights, so that the way back gives the same bits.
"""

from collections.abc import Mapping
from typing import Any

import torch

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.configuration_nanochat_gpt import ERAS, layer_types_from_pattern

Tensors = dict[str, torch.Tensor]
Renaming = tuple[tuple[str, str], ...]

VOCABULARY_MULTIPLE = 64  # what upstream pads its vocabulary tables to, from the lambdas era on
GATE_WIDTHS = {32: "seed", 12: "autoresearch1"}  # channels that the gates of the value embeddings read

# Parts of our names and what they are in the other format.
UPSTREAM_NAMES: Renaming = (
    ("model.embed_tokens.", "transformer.wte."),
    ("model.layers.", "transformer.h."),
    (".self_attn.q_proj.", ".attn.c_q."),
    (".self_attn.k_proj.", ".attn.c_k."),
    (".self_attn.v_proj.", ".attn.c_v."),
    (".self_attn.o_proj.", ".attn.c_proj."),
    (".self_attn.value_gate.", ".attn.ve_gate."),
    (".mlp.up_proj.", ".mlp.c_fc."),
    (".mlp.down_proj.", ".mlp.c_proj."),
    ("model.value_embeddings.", "value_embeds."),
    ("model.smear_gate.", "smear_gate."),
    ("model.residual_scalars.", ""),
)
NATIVE_NAMES: Renaming = ((".mlp.up_proj.", ".mlp.fc1."), (".mlp.down_proj.", ".mlp.fc2."))

SHAPE_FIELDS = {  # `model_config` of upstream's meta file, beside `window_pattern`
    "sequence_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
}
# What upstream's code of an era fixes; a network that differs in one of them is none that upstream can run.
FIXED_BY_ERA = (
    "head_dim", "intermediate_size", "layer_types", "sliding_window", "rope_parameters", "bfloat16_rotary_tables",
    "rms_norm_eps", "final_logit_softcapping", "query_key_scale", "use_residual_scalars", "use_value_embeddings",
    "value_gate_channels", "value_gate_scale", "smear_channels", "use_backout",
)  # fmt: skip


def other_name(name: str, renaming: Renaming) -> str:
    """Our tensor name in the other format."""
    for ours, theirs in renaming:
        name = name.replace(ours, theirs)
    return name


# ---------------------------------------------------------------- which network


def recognise_era(tensors: Mapping[str, torch.Tensor]) -> str:
    """The row of `ERAS` that the tensors of an upstream checkpoint belong to.

    "seed" also stands for "softcap20", whose files look the same.

    Raises:
        ValueError: tensors of the bigram era (a few days of January 2026), or gates of an unknown width.
    """
    if bigram := sorted(name for name in tensors if "bigram" in name):
        raise ValueError(
            f"a checkpoint of the bigram era (2026-01-25 to 28), which no other era's network can hold: {bigram}; "
            f"expected one of {list(ERAS)}"
        )
    if any(name.startswith(("smear", "backout")) for name in tensors):
        return "head"
    gates = {name: tensor.shape[-1] for name, tensor in tensors.items() if name.endswith(".ve_gate.weight")}
    if gates or any(name.startswith("value_embeds.") for name in tensors):
        widths = set(gates.values())
        if len(widths) != 1 or widths - GATE_WIDTHS.keys():
            raise ValueError(f"gates of the value embeddings are {gates} wide, expected all of one: {GATE_WIDTHS}")
        return GATE_WIDTHS[widths.pop()]
    return "lambdas" if "resid_lambdas" in tensors or "x0_lambdas" in tensors else "launch"


def config_from_upstream(model_config: Mapping[str, Any], era: str, **overrides: Any) -> NanoChatGPTConfig:
    """The configuration of an upstream checkpoint.

    Args:
        model_config: the part of that name in upstream's meta file; without a window pattern attention is full.
        era: a row of `ERAS`, as `recognise_era` gives it.
        overrides: fields of the configuration that the file cannot tell.

    Raises:
        ValueError: fields missing, unknown or of no use; the message shows them.
    """
    shape = dict(model_config)
    pattern = shape.pop("window_pattern", None) or "L"
    if shape.keys() != SHAPE_FIELDS.keys() or not all(type(value) is int for value in shape.values()):
        raise ValueError(f"model_config is {dict(model_config)}, expected whole numbers for {list(SHAPE_FIELDS)}")
    if shape["n_head"] < 1 or shape["n_embd"] % shape["n_head"]:
        raise ValueError(f"n_embd is {shape['n_embd']}, expected a multiple of n_head ({shape['n_head']})")
    fields = {ours: shape[theirs] for theirs, ours in SHAPE_FIELDS.items() if theirs != "n_layer"}
    fields |= {"head_dim": shape["n_embd"] // shape["n_head"], "era": era, "window_pattern": pattern}
    return NanoChatGPTConfig.from_depth(shape["n_layer"], **(fields | overrides))


def upstream_era(config: NanoChatGPTConfig) -> str:
    """The era whose code upstream needs to run this network.

    Raises:
        ValueError: no era of upstream is this network; the message says what sets it apart from the closest one.
    """
    model_config = upstream_model_config(config)
    differences = {}
    for era in ERAS:
        theirs = config_from_upstream(model_config, era)
        differences[era] = [name for name in FIXED_BY_ERA if getattr(config, name) != getattr(theirs, name)]
    closest = min(ERAS, key=lambda era: len(differences[era]))
    if differences[closest]:
        theirs = config_from_upstream(model_config, closest)
        changed = [f"{name} is {getattr(config, name)!r}, expected {getattr(theirs, name)!r}"
                   for name in differences[closest]]  # fmt: skip
        raise ValueError(f"no code of upstream runs this network; the closest era is {closest}: {'; '.join(changed)}")
    return closest


def upstream_model_config(config: NanoChatGPTConfig) -> dict[str, Any]:
    """The `model_config` of upstream's meta file, with the shortest window pattern that gives these layers."""
    model_config = {theirs: getattr(config, ours) for theirs, ours in SHAPE_FIELDS.items()}
    windowed = ["sliding" in kind for kind in config.layer_types]
    if config.use_residual_scalars or any(windowed):  # the launch era's code knows no pattern
        letters = "".join("S" if window else "L" for window in windowed)
        layer_types = layer_types_from_pattern(letters, len(letters))
        model_config["window_pattern"] = next(
            letters[:length]
            for length in range(1, len(letters) + 1)
            if layer_types_from_pattern(letters[:length], len(letters)) == layer_types
        )
    return model_config


# ---------------------------------------------------------------- tensors


def tensors_to_ours(tensors: Mapping[str, torch.Tensor], config: NanoChatGPTConfig, renaming: Renaming = ()) -> Tensors:
    """Tensors of another format under our names, every one of them as it is.

    Raises:
        ValueError: tensors missing, unexpected or of another shape than `config` gives; the message names all.
    """
    with torch.device("meta"):
        expected = NanoChatGPTForCausalLM(config).state_dict()
    names = {ours: other_name(ours, renaming) for ours in expected}
    problems = [f"missing {theirs}" for theirs in names.values() if theirs not in tensors]
    problems += [f"unexpected {name} {tuple(tensors[name].shape)}" for name in tensors.keys() - set(names.values())]
    problems += [
        f"{theirs} is {tuple(tensors[theirs].shape)}, expected {tuple(expected[ours].shape)}"
        for ours, theirs in names.items()
        if theirs in tensors and tensors[theirs].shape != expected[ours].shape
    ]
    if problems:
        raise ValueError("the tensors do not fit the network:\n  " + "\n  ".join(sorted(problems)))
    return {ours: tensors[theirs] for ours, theirs in names.items()}


def split_padding(tensors: Mapping[str, torch.Tensor], vocab_size: int) -> tuple[Tensors, Tensors]:
    """Upstream's tensors without the rows that pad its vocabulary tables, and those rows under the same names."""
    kept, padding = dict(tensors), {}
    for name, tensor in tensors.items():
        if is_vocabulary_table(name) and len(tensor) == padded(vocab_size) > vocab_size:
            kept[name], padding[name] = tensor[:vocab_size].clone(), tensor[vocab_size:].clone()
    return kept, padding


def tensors_to_upstream(weights: Mapping[str, torch.Tensor], padding: Mapping[str, torch.Tensor] | None) -> Tensors:
    """Our tensors under upstream's names, with the padding that was split off once.

    Without any (None: the network never was upstream's) the rows are zeros, which train and predict the same; a
    launch-era network has none.
    """
    tensors = {other_name(name, UPSTREAM_NAMES): tensor for name, tensor in weights.items()}
    if padding is None:
        wanted = {name: padded(len(tensor)) - len(tensor) for name, tensor in tensors.items()
                  if is_vocabulary_table(name) and "resid_lambdas" in tensors}  # fmt: skip
        padding = {name: tensors[name].new_zeros(rows, tensors[name].shape[1]) for name, rows in wanted.items() if rows}
    for name, rows in padding.items():
        tensors[name] = torch.cat([tensors[name], rows.to(tensors[name].dtype)])
    return tensors


def is_vocabulary_table(upstream_name: str) -> bool:
    """Whether a tensor of upstream has a row for each token."""
    return upstream_name in ("transformer.wte.weight", "lm_head.weight") or upstream_name.startswith("value_embeds.")


def padded(vocab_size: int) -> int:
    """`vocab_size` up to the multiple that upstream pads to."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
