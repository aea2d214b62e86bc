"""What a result depends on beside its settings: weights, data, arithmetic, versions, device. A stage whose identity has
changed is done again, so an old number never stands for new weights."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from transformers import AutoConfig

from modeling_nanochat.eval.core.bundle import CoreTask, bundle_hash

PIECE = 1 << 20  # bytes read at once
ENDINGS = {".safetensors", ".bin", ".json", ".jinja", ".model"}  # of weights, configuration, tokenizer
NOT_THE_MODEL = {"stage.json", "stage.begun.json", "scores.json", "trainer_state.json"}


@dataclass
class Identity:
    """Part of the record: a hash for each model, the bundle's, and where the numbers were made."""

    weights: dict[str, str] | None = None
    core_bundle_hash: str | None = None
    text_hash: str | None = None
    torch_version: str | None = None
    transformers_version: str | None = None
    device: str | None = None


def identify(models: Sequence[str], tasks: Sequence[CoreTask], text: str | None) -> Identity:
    """Of these models, CORE tasks and text, on this machine.

    Raises:
        ValueError: a Hub name that leads nowhere.
    """
    device = PartialState().device
    return Identity(
        weights={model: model_hash(model) for model in models},
        core_bundle_hash=bundle_hash(tasks) if tasks else None,
        text_hash=hash_of([Path(text)]) if text else None,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def model_hash(model: str) -> str:
    """Of everything in a folder that makes up a model; of a Hub name its commit."""
    folder = Path(model)
    if folder.is_dir():
        files = [file for file in folder.iterdir() if file.suffix in ENDINGS and file.name not in NOT_THE_MODEL]
        return hash_of(sorted(files))
    try:
        commit = AutoConfig.from_pretrained(model)._commit_hash
    except Exception as error:  # whatever the network, the Hub or a configuration raises
        reason = str(error).split("\n")[0]
        raise ValueError(f"{model} is neither a folder nor a model on the Hub that could be read: {reason}") from error
    return commit or "unknown"


def hash_of(files: Sequence[Path]) -> str:
    """16 hexadecimal digits of the names and contents."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
    return digest.hexdigest()[:16]
