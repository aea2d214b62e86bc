"""Which parameters of any network Muon steps, and which AdamW: read from the modules, by one rule for all of them.

Muon is for matrices that map the stream of activations to itself: the linear layers inside the repeated blocks. What
is looked up row by row (embeddings), what scores (head, routers), vectors and convolutions go to AdamW. A tensor that
holds several matrices is split where the network's own code says how (`FUSED_LAYERS`, and what Transformers notes on
its expert stacks). What looks fused and is not known, and what no layer explains, goes to AdamW with a doubt that is
shown. The price of reading modules: a network whose code hides its layers gets more AdamW than it needs.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from modeling_nanochat.training.optimizer.matrices import WHOLE, Split

MATRIX = "matrix"  # the one kind that Muon steps
KINDS = {
    MATRIX: "matrices inside the blocks",
    "embedding": "embeddings",
    "tied": "embedding and head in one",
    "head": "head",
    "router": "routers",
    "convolution": "convolutions",
    "vector": "norms, biases and other vectors",
    "outside": "matrices outside the blocks",
    "adapter": "adapters (LoRA and its kin)",
    "unknown": "what the rule does not know",
}


@dataclass(frozen=True)
class SortedParameter:
    """One parameter, its kind (a key of `KINDS`), how it is split if it is a matrix, and what is unsure about that."""

    name: str
    parameter: nn.Parameter
    kind: str
    split: Split = WHOLE
    doubt: str = ""


# ---------------------------------------------------------------- layers that hold several matrices


def attention_heads(config: Any) -> tuple[int, int, int]:
    """Query heads, heads of keys and values, and the width of one."""
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, (
        getattr(config, "head_dim", None) or config.hidden_size // heads
    )  # fmt: skip


def side_by_side(config: Any, rows: int) -> Split:
    """[q k v], where keys and values may have fewer heads."""
    heads, kv_heads, width = attention_heads(config)
    return Split(parts=(heads * width, kv_heads * width, kv_heads * width))


def by_heads(config: Any, rows: int) -> Split:
    """Each head with its own [q k v]."""
    heads, _, width = attention_heads(config)
    return Split(repeats=heads, parts=(width, width, width))


def falcon(config: Any, rows: int) -> Split:
    heads, _, width = attention_heads(config)
    if config.new_decoder_architecture:  # each group of heads with its keys and values
        return Split(repeats=config.num_kv_heads, parts=(heads // config.num_kv_heads * width, width, width))
    return Split(parts=(heads * width, width, width)) if config.multi_query else by_heads(config, rows)


def halves(config: Any, rows: int) -> Split:
    return Split(parts=(rows // 2, rows // 2))


def thirds(config: Any, rows: int) -> Split:
    return Split(parts=(rows // 3, rows // 3, rows // 3))


def columns_of_gpt2(config: Any, rows: int) -> Split:
    """Queries, keys and values beside one another; in cross attention keys and values."""
    width = config.hidden_size
    return Split(transposed=True, parts=(width,) * (rows // width))


# (model types, name of the layer) -> how it is split, as the networks' own code takes its output apart
FUSED_LAYERS: dict[tuple[str, str], Callable[[Any, int], Split]] = {
    ("gpt2", "c_attn"): columns_of_gpt2,
    ("gpt_neox gpt_neox_japanese bloom persimmon", "query_key_value"): by_heads,
    ("falcon", "query_key_value"): falcon,
    ("phi3 phi4_multimodal", "qkv_proj"): side_by_side,
    ("mpt modernbert modernbert-decoder", "Wqkv"): thirds,
    ("phi3 phi4_multimodal glm glm4", "gate_up_proj"): halves,
    ("modernbert modernbert-decoder", "Wi"): halves,
}
LOOKS_FUSED = re.compile(
    r"qkv|query_key_value|c_attn|in_proj|gate_up|gate_and_up|kv_|_kv|fused|packed|^Wi$|^w12$|^fc1_fc2$"
)


def fused_split(config: Any, name: str, rows: int) -> Split | None:
    """How a layer of that name is split; None if that is not known."""
    model_type = getattr(config, "model_type", "")
    for (model_types, layer), split in FUSED_LAYERS.items():
        if layer == name and model_type in model_types.split():
            return split(config, rows)
    return None


def expert_split(experts: nn.Module, name: str, rows: int) -> Split:
    """How one expert's matrix is split, by what Transformers' decorator noted on the stack."""
    if not name.startswith("gate_up"):
        return Split(transposed=experts.is_transposed)
    if experts.is_concatenated:
        return Split(experts.is_transposed, 1, (rows // 2, rows // 2))
    return Split(experts.is_transposed, rows // 2, (1, 1))  # a row of the gate, a row of up, and so on


# ---------------------------------------------------------------- the rule


def sort_parameters(model: nn.Module, overrides: Mapping[str, str] | None = None) -> list[SortedParameter]:
    """Every trainable parameter of a network, once, with its kind.

    Args:
        model: any network; of the classes of Transformers, adapters of PEFT around them too.
        overrides: pattern of names -> "muon" (as one whole matrix) or "adamw", where the rule shall not decide.

    Raises:
        ValueError: an override that fits no parameter, or asks Muon to step what is no matrix.
    """
    overrides = dict(overrides or {})
    for choice in overrides.values():
        if choice not in ("muon", "adamw"):
            raise ValueError(f"an override is {choice!r}, expected 'muon' or 'adamw'")
    network = Network(model)
    found, used = [], set()
    for name, parameter in model.named_parameters():
        pattern = next((pattern for pattern in overrides if re.search(pattern, name)), None)
        used.add(pattern)
        if not parameter.requires_grad:
            continue
        if pattern is None:
            found.append(network.sort(name, parameter))
        elif overrides[pattern] == "adamw":
            kind = network.sort(name, parameter).kind
            found.append(SortedParameter(name, parameter, "unknown" if kind == MATRIX else kind))
        elif parameter.ndim == 2:
            found.append(SortedParameter(name, parameter, MATRIX, Split(isinstance(network.owner(name), Conv1D))))
        else:
            raise ValueError(f"{name} of shape {tuple(parameter.shape)} is no matrix, so Muon cannot step it")
    if unused := sorted(set(overrides) - used):
        raise ValueError(f"the overrides {', '.join(unused)} fit the name of no parameter")
    return found


class Network:
    """What the rule asks of a network's modules."""

    def __init__(self, model: nn.Module):
        self.modules = dict(model.named_modules())
        self.inputs, self.head = end_of(model, "get_input_embeddings"), end_of(model, "get_output_embeddings")
        config = getattr(model, "config", None)
        self.vocab_size = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None

    def owner(self, name: str) -> nn.Module:
        """The module that a parameter belongs to."""
        return self.modules[name.rpartition(".")[0]]

    def sort(self, name: str, parameter: nn.Parameter) -> SortedParameter:
        owner, layer = self.owner(name), name.split(".")[-2] if "." in name else ""

        def verdict(kind: str, split: Split = WHOLE, doubt: str = "") -> SortedParameter:
            return SortedParameter(name, parameter, kind, split, doubt)

        if self.is_adapter(name):
            return verdict("adapter")
        if isinstance(owner, _ConvNd):
            return verdict("convolution" if parameter.ndim > 1 else "vector")
        if parameter.ndim < 2 or (parameter.ndim == 2 and min(parameter.shape) == 1) or name.endswith("bias"):
            return verdict("vector")
        if isinstance(owner, nn.Embedding) or owner is self.inputs:
            return verdict("tied" if parameter is getattr(self.head, "weight", None) else "embedding")
        if owner is self.head:
            return verdict("head")
        if self.is_router(name, owner, parameter):
            return verdict("router")
        if not self.is_in_block(name):
            if isinstance(owner, nn.Linear) and parameter.shape[0] == self.vocab_size:
                return verdict("head")
            return verdict("outside", doubt="a matrix, but not in a repeated block: AdamW")
        if parameter.ndim == 3 and hasattr(owner, "is_transposed") and hasattr(owner, "is_concatenated"):
            rows = parameter.shape[-1] if owner.is_transposed else parameter.shape[-2]
            return verdict(MATRIX, expert_split(owner, name.rpartition(".")[2], rows))
        if isinstance(owner, nn.Linear | Conv1D) and parameter.ndim == 2:
            return self.sort_layer(verdict, name, layer, parameter, isinstance(owner, Conv1D))
        return verdict("unknown", doubt=f"belongs to no linear layer, but to a {type(owner).__name__}: AdamW")

    def sort_layer(self, verdict, name: str, layer: str, parameter: nn.Parameter, transposed: bool) -> SortedParameter:
        layer = name.split(".")[-3] if layer == "base_layer" else layer  # PEFT's wrapper of the layer itself
        split = fused_split(self.config_at(name), layer, parameter.shape[1 if transposed else 0])
        if split is not None:
            return verdict(MATRIX, split)
        if LOOKS_FUSED.search(layer):
            return verdict("unknown", doubt="looks like several matrices in one, which are not known: AdamW")
        return verdict(MATRIX, Split(transposed=transposed))

    def ancestors(self, name: str) -> list[tuple[str, nn.Module]]:
        """The modules around a parameter, the nearest first."""
        path = name.split(".")[:-1]
        prefixes = [".".join(path[:end]) for end in range(len(path), -1, -1)]
        return [(prefix, self.modules[prefix]) for prefix in prefixes]

    def config_at(self, name: str) -> Any:
        """The configuration of the nearest module that has one: networks may consist of several."""
        return next((module.config for _, module in self.ancestors(name) if hasattr(module, "config")), None)

    def is_in_block(self, name: str) -> bool:
        """Whether it lies in an element of a list of modules, as blocks do."""
        ancestors = self.ancestors(name)
        return any(
            isinstance(parent, nn.ModuleList) and prefix.rpartition(".")[2].isdigit()
            for (prefix, _), (_, parent) in pairwise(ancestors)
        )

    def is_adapter(self, name: str) -> bool:
        """Whether PEFT added it: what lies in one of its layers, but for the layer that it wraps."""
        inside = any(type(module).__module__.startswith("peft.tuners") and prefix.count(".") > 1
                     for prefix, module in self.ancestors(name))  # fmt: skip
        return (inside and ".base_layer." not in name) or ".modules_to_save." in name

    def is_router(self, name: str, owner: nn.Module, parameter: nn.Parameter) -> bool:
        """Whether it scores experts: named so, with as many rows as there are experts."""
        config = self.config_at(name)
        counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        experts = {getattr(config, count) for count in counts if isinstance(getattr(config, count, None), int)}
        named = re.search(r"gate|router", f"{name} {type(owner).__name__}", re.IGNORECASE)
        return bool(named) and parameter.ndim == 2 and parameter.shape[0] in experts


def end_of(model: nn.Module, getter: str) -> nn.Module | None:
    """The module that a network names as its embedding or its head; None if it has none."""
    try:
        return getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return None
