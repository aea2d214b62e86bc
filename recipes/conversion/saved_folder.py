"""What every direction of `nanochat convert` reads of a folder that Transformers saved: its kind and its weights."""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from modeling_nanochat.recipes.conversion.upstream_tensors import Tensors


def model_type(folder: Path, expected: Sequence[str], hint: str = "") -> str:
    """The `model_type` of its config.json; `ValueError`, with the hint, if it is none of those expected."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; expected a folder saved by Transformers")
    found = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    if found not in expected:
        wanted = repr(expected[0]) if len(expected) == 1 else f"one of {', '.join(expected)}"
        raise ValueError(f"{file}: model_type is {found!r}, expected {wanted}{hint}")
    return found


def read_safetensors(folder: Path) -> Tensors:
    """Every tensor of a folder saved by Transformers, in one file or in shards."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {missing}; expected the weights as safetensors")
    return {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """`ValueError` if the tokenizer is another network's."""
    if len(tokenizer) != config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, expected the network's {config.vocab_size}")


def describe(config: PreTrainedConfig, weights: Tensors) -> str:
    """What a checkpoint holds, in one line."""
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}))
    return (
        f"{config.num_hidden_layers} layers, {config.hidden_size} wide, vocabulary {config.vocab_size:,}, "
        f"{sum(tensor.numel() for tensor in weights.values()):,} parameters in {dtypes}"
    )
