"""Checkpoints from elsewhere as a folder that Transformers loads, and back.

    nanochat convert --from_upstream base_checkpoints/d20 --output d20-hf
    nanochat convert --from_native nanochat-d32-hf --output d32-hf
    nanochat convert --to_upstream d20-hf --output base_checkpoints/d20-again
    nanochat convert --to_native out/launch/sft --output for-mlx
    nanochat convert --to_onnx out/demo/rl --output demo-onnx
    nanochat convert --to_gguf out/qwen3/sft --output qwen3-gguf

Upstream is karpathy/nanochat, native is Transformers' own `nanochat` class (launch era only); ONNX and GGUF are for
other runtimes (`conversion/onnx_graph.py`, `conversion/gguf_file.py`). The era of an upstream checkpoint is recognised
from its tensors and printed; a softcap of 20 (2026-03-02 to 09) leaves no trace there and has to be told: `--override
final_logit_softcapping=20`. Every weight keeps its bits and its dtype (ONNX: float32). Weights only: optimizer state is
not converted.

The output appears whole or not at all, which costs the disk space of an unfinished folder while it is written. What
the network does not need but the way back does (the meta file, the rows that pad the vocabulary) lies in `upstream/`.
"""

import functools
import json
import pickle
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import NanoChatConfig, NanoChatForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM, token_bytes
from modeling_nanochat.inference import chat_generation_config
from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.conversion.gguf_file import to_gguf
from modeling_nanochat.recipes.conversion.native_config import config_from_native, native_config
from modeling_nanochat.recipes.conversion.onnx_graph import to_onnx
from modeling_nanochat.recipes.conversion.saved_folder import check_vocabulary, describe, model_type, read_safetensors
from modeling_nanochat.recipes.conversion.upstream_tensors import (
    NATIVE_NAMES,
    UPSTREAM_NAMES,
    Tensors,
    config_from_upstream,
    other_name,
    recognise_era,
    split_padding,
    tensors_to_ours,
    tensors_to_upstream,
    upstream_era,
    upstream_model_config,
)
from modeling_nanochat.recipes.conversion.upstream_tokenizer import (
    read_upstream_tokenizer,
    upstream_encoding,
    write_upstream_tokenizer,
)
from modeling_nanochat.recipes.publishing.card import write_model_card
from modeling_nanochat.recipes.stages.lock import held
from modeling_nanochat.recipes.stages.tables import markdown_table
from modeling_nanochat.tokenization_nanochat_gpt import generation_token_ids
from modeling_nanochat.training import model_card
from modeling_nanochat.training.tokenizer import tokenizer_from_ranks
from modeling_nanochat.training.whole_files import whole_folder

DIRECTIONS = ("from_upstream", "from_native", "to_upstream", "to_native", "to_onnx", "to_gguf")
ORIGIN = "upstream"  # folder, inside a converted one, of what only the way back needs
PADDING = "padding.safetensors"


@dataclass
class ConvertArguments:
    """What to convert. Exactly one of --from_... and --to_... names what is read."""

    output: str = field(metadata={"help": "Folder to write; must not exist yet."})
    from_upstream: str | None = field(
        default=None, metadata={"help": "Folder of karpathy/nanochat: model_<step>.pt and meta_<step>.json."}
    )
    from_native: str | None = field(
        default=None, metadata={"help": "Folder saved by Transformers' own `nanochat` class: config.json, safetensors."}
    )
    to_upstream: str | None = field(
        default=None, metadata={"help": "Folder of ours, to be written as karpathy/nanochat keeps its checkpoints."}
    )
    to_native: str | None = field(
        default=None,
        metadata={"help": "Folder of ours with a launch-era network, to be written for Transformers' own class."},
    )
    to_onnx: str | None = field(
        default=None,
        metadata={"help": "Folder of a model trained here, to be written as an ONNX graph and a program that answers."},
    )
    to_gguf: str | None = field(
        default=None,
        metadata={"help": "Folder of a stock architecture trained here, to be written for llama.cpp and Ollama."},
    )
    step: int | None = field(
        default=None,
        metadata={"help": "Step to read (the last one if not given), or with to_upstream the step to write."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder of upstream's tokenizer.pkl, if it is neither with the checkpoint nor in the "
                          "`tokenizer` folder of upstream's layout."},
    )  # fmt: skip
    override: list[str] = field(
        default_factory=list,
        metadata={"help": "Fields of the configuration that the files cannot tell, as key=value."},
    )


# ---------------------------------------------------------------- from upstream


def from_upstream(folder: Path, output: Path, step: int | None, tokenizer_folder: Path | None, overrides: dict) -> None:
    """Converts an upstream checkpoint folder. Raises ValueError, before anything is written, if it cannot be exact."""
    model_file, meta_file = find_checkpoint(folder, step)
    meta = read_meta(meta_file)
    tensors = read_torch_file(model_file)
    era = recognise_era(tensors)
    config = config_from_upstream(meta["model_config"], era, **overrides)
    tensors, padding = split_padding(tensors, config.vocab_size)
    weights = tensors_to_ours(tensors, config, UPSTREAM_NAMES)
    print(f"{model_file}: {era} era, {describe(config, weights)}")
    if padding:
        print(f"rows that pad the vocabulary are kept in {ORIGIN}/{PADDING}, apart from the network")
    if optimizer_files := sorted(file.name for file in folder.glob("optim*")):
        print(f"optimizer state is not converted: {', '.join(optimizer_files)}")

    tokenizer = None
    if (tokenizer_file := find_tokenizer(folder, tokenizer_folder)) is not None:
        tokenizer = read_upstream_tokenizer(tokenizer_file, config.max_position_embeddings)
        print(f"tokenizer: {tokenizer_file}")
    else:
        print("no tokenizer.pkl beside the checkpoint (--tokenizer names its folder): only the network is written")
    with whole_folder(output) as partial:
        source = f"Converted from {model_file.name} of karpathy/nanochat"
        write_folder(partial, config, weights, tokenizer, era, source, str(output))
        (partial / ORIGIN).mkdir()
        shutil.copyfile(meta_file, partial / ORIGIN / meta_file.name)
        if padding:
            save_file(padding, partial / ORIGIN / PADDING)


def find_checkpoint(folder: Path, step: int | None) -> tuple[Path, Path]:
    """The weights and meta file of a step, of the last one if None."""
    found = {int(match[1]): file for file in sorted(folder.glob("model_*.pt"))
             if (match := re.fullmatch(r"model_(\d+)\.pt", file.name))}  # fmt: skip
    if not found:
        raise ValueError(f"{folder} has no model_<step>.pt; expected a folder such as base_checkpoints/d20")
    if step is not None and step not in found:
        raise ValueError(f"{folder} has no step {step}; expected one of {sorted(found)}")
    model_file = found[max(found) if step is None else step]
    return model_file, model_file.with_name(model_file.name.replace("model_", "meta_")).with_suffix(".json")


def read_meta(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist; it says the network's shape")
    meta = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(meta, dict) or not isinstance(meta.get("model_config"), dict):
        raise ValueError(f"{file} has no model_config")
    return meta


def read_torch_file(file: Path) -> Tensors:
    """A state dict saved by torch, without the `_orig_mod.` that a compiled module's names begin with."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # its message recommends to load the file without the check
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        raise ValueError(f"{file} is no plain file of tensors: it asks for {asked or 'unreadable objects'}") from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is no file saved by torch: {error}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} holds a {type(tensors).__name__}, expected tensors by name")
    others = {name: type(value).__name__ for name, value in tensors.items()
              if not (isinstance(value, torch.Tensor) and value.is_floating_point())}  # fmt: skip
    if others:
        raise ValueError(f"{file} holds values that are no floating-point tensors: {others}")
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}


def find_tokenizer(folder: Path, given: Path | None) -> Path | None:
    """`tokenizer.pkl` in the folder given, else with the checkpoint, else where upstream's layout keeps it."""
    if given is not None:
        if not (given / "tokenizer.pkl").is_file():
            raise ValueError(f"{given} has no tokenizer.pkl")
        return given / "tokenizer.pkl"
    base = folder.resolve().parents[1:2]  # <base>/base_checkpoints/d20 -> <base>
    places = [folder, *(place / "tokenizer" for place in (folder, *base))]
    return next((place / "tokenizer.pkl" for place in places if (place / "tokenizer.pkl").is_file()), None)


# ---------------------------------------------------------------- from Transformers' own class


def from_native(folder: Path, output: Path, overrides: dict[str, Any]) -> None:
    """Converts a folder of Transformers' `nanochat` class: the launch era with its own epsilon in every norm."""
    model_type(folder, [NanoChatConfig.model_type])
    config = config_from_native(folder, overrides)
    weights = tensors_to_ours(read_safetensors(folder), config, NATIVE_NAMES)
    print(f"{folder}: launch era, {describe(config, weights)}")
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        encoding = upstream_encoding(PreTrainedTokenizerFast.from_pretrained(folder))
        tokenizer = tokenizer_from_ranks(
            encoding._mergeable_ranks, pattern=encoding._pat_str, model_max_length=config.max_position_embeddings
        )
    with whole_folder(output) as partial:
        source = "Converted from a checkpoint of Transformers' `nanochat` class"
        write_folder(partial, config, weights, tokenizer, "launch", source, str(output))


def to_native(folder: Path, output: Path, overrides: dict[str, Any]) -> None:
    """Writes our folder as Transformers' own class does, which MLX and others load too: no code, no trust.

    Raises:
        ValueError: the native class cannot express the network.
    """
    model_type(folder, [NanoChatGPTConfig.model_type])
    config = NanoChatGPTConfig.from_pretrained(folder, **overrides)
    native = native_config(config)
    weights = tensors_to_ours(read_safetensors(folder), config)
    with torch.device("meta"):
        model = NanoChatForCausalLM(native).to(next(iter(weights.values())).dtype)
    with whole_folder(output) as partial:
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            check_vocabulary(tokenizer, config)
            model.generation_config = chat_generation_config(tokenizer, config.max_position_embeddings)
            del model.generation_config.use_calculator  # which comes with our code only
            tokenizer.save_pretrained(partial)
        names = {name: other_name(name, NATIVE_NAMES) for name in weights}
        model.save_pretrained(partial, state_dict={names[name]: weight for name, weight in weights.items()})
        write_model_card(folder, str(output), into=partial)
    print(f"{folder}: Transformers' own class, {describe(config, weights)}")


# ---------------------------------------------------------------- to upstream


def to_upstream(folder: Path, output: Path, step: int | None, overrides: dict[str, Any]) -> None:
    """Writes our folder as upstream does: `model_<step>.pt`, `meta_<step>.json`, `tokenizer/`.

    Raises:
        ValueError: no code of upstream runs this network exactly, or its tokenizer is not of upstream's form.
    """
    model_type(folder, [NanoChatGPTConfig.model_type])
    config = NanoChatGPTConfig.from_pretrained(folder, **overrides)
    era = upstream_era(config)
    weights = tensors_to_ours(read_safetensors(folder), config)
    kept_step, meta, padding = read_origin(folder / ORIGIN, config, era)
    if step is None:
        step = kept_step
    elif step != kept_step:
        meta = json.dumps(json.loads(meta) | {"step": step}, indent=2)
    with whole_folder(output) as partial:
        torch.save(tensors_to_upstream(weights, padding), partial / f"model_{step:06d}.pt")
        (partial / f"meta_{step:06d}.json").write_text(meta, encoding="utf-8")
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            check_vocabulary(tokenizer, config)
            (partial / "tokenizer").mkdir()
            write_upstream_tokenizer(tokenizer, partial / "tokenizer" / "tokenizer.pkl")
            lengths = torch.tensor(token_bytes(tokenizer), dtype=torch.int32)
            torch.save(lengths, partial / "tokenizer" / "token_bytes.pt")
    print(f"{folder}: {era} era of upstream, {describe(config, weights)}")


def read_origin(origin: Path, config: NanoChatGPTConfig, era: str) -> tuple[int, str, Tensors | None]:
    """Step, meta file and padding as they were kept when the folder came from upstream; else new ones of step 0."""
    model_config = upstream_model_config(config)
    meta_file = next(iter(origin.glob("meta_*.json")), None)
    if meta_file is None:
        return 0, json.dumps({"step": 0, "model_config": model_config}, indent=2), None
    kept = upstream_model_config(config_from_upstream(read_meta(meta_file)["model_config"], era))
    if kept != model_config:
        raise ValueError(
            f"{meta_file} says {kept}, but config.json {model_config}; remove {origin} if the network was changed "
            "since it came from upstream"
        )
    padding = load_file(origin / PADDING) if (origin / PADDING).is_file() else {}
    return int(meta_file.stem.removeprefix("meta_")), meta_file.read_text(encoding="utf-8"), padding


# ---------------------------------------------------------------- folders


def write_folder(
    folder: Path,
    config: NanoChatGPTConfig,
    weights: Tensors,
    tokenizer: PreTrainedTokenizerBase | None,
    era: str,
    source: str,
    name: str,
) -> None:
    """Everything that `from_pretrained` and the Hub want: weights, configuration, code, tokenizer, model card, which
    loads the model from `name`."""
    if tokenizer is not None:
        check_vocabulary(tokenizer, config)
        config.update(generation_token_ids(tokenizer))
        tokenizer.save_pretrained(folder)
    # Upstream trains with bfloat16 embeddings beside float32 matrices; the wider of the two loads both exactly.
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in weights.values()})
    with torch.device("meta"):
        model = NanoChatGPTForCausalLM(config).to(dtype)
    if tokenizer is not None:
        model.generation_config = chat_generation_config(tokenizer, config.max_position_embeddings)
    model.save_pretrained(folder, state_dict=dict(weights))
    sections = [
        f"{source}, {era} era. The weights are those of the source, bit for bit.",
        "\n".join(markdown_table(("", ""), model_card.shape(folder))),
        model_card.how_to_use(folder, name, chat=True) if tokenizer is not None else "It came without a tokenizer.",
    ]
    model_card.write_card(folder, model_card.card_text(f"nanochat, {config.num_hidden_layers} layers", sections))


# ---------------------------------------------------------------- command


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`key=value` pairs as fields of the configuration; a value is read as JSON if it is such, else as text."""
    fields = NanoChatGPTConfig.__annotations__
    overrides = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in fields:
            raise ValueError(f"--override {pair!r}, expected key=value with a key of {sorted(fields)}")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value
        if type(overrides[key]) is int and fields[key] in (float, float | None):
            overrides[key] = float(overrides[key])
    return overrides


def main() -> None:
    (arguments,) = parse(ConvertArguments)
    given = {name: getattr(arguments, name) for name in DIRECTIONS if getattr(arguments, name) is not None}
    if len(given) != 1:
        raise ValueError(f"{given or 'no folder to read'} given, expected exactly one of --{', --'.join(DIRECTIONS)}")
    ((direction, source),) = given.items()
    folder, output, overrides = Path(source), Path(arguments.output), parse_overrides(arguments.override)
    if not folder.is_dir():
        raise ValueError(f"--{direction} {folder} is no folder")
    if output.exists():
        raise ValueError(f"--output {output} exists already, expected a new folder")
    if overrides and direction in ("to_onnx", "to_gguf"):
        raise ValueError(f"--override would do nothing with --{direction}, which takes the network as it is")
    with held(output.parent, f".{output.name}.lock"):
        if direction == "from_upstream":
            tokenizer = Path(arguments.tokenizer) if arguments.tokenizer else None
            from_upstream(folder, output, arguments.step, tokenizer, overrides)
        elif direction == "from_native":
            from_native(folder, output, overrides)
        elif direction == "to_native":
            to_native(folder, output, overrides)
        elif direction == "to_upstream":
            to_upstream(folder, output, arguments.step, overrides)
        elif direction == "to_onnx":
            to_onnx(folder, output)
        else:
            to_gguf(folder, output)
    print(f"written to {output}")


if __name__ == "__main__":
    run(main)
