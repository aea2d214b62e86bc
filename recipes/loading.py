"""A checkpoint and its tokenizer from a folder or the Hub, on the device at hand, in the precision it is fast in."""

from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modeling_nanochat  # noqa: F401 (registers the network with the Auto classes)
from training.scaling import native_bfloat16


def load_checkpoint(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in eval mode, and its tokenizer.

    Weights stay in float32; our network's activations are bfloat16 where the hardware multiplies it natively.

    Raises:
        ValueError: `name` is a local folder without a checkpoint.
    """
    looks_local = name.startswith((".", "/", "~", "out/")) or Path(name).exists()
    if looks_local and not (Path(name) / "config.json").exists():
        raise ValueError(f"{name} holds no checkpoint (no config.json in it); expected the folder of a trained model")
    device = PartialState().device
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).eval()
    if native_bfloat16(device):
        model.set_activation_dtype(torch.bfloat16)
    return model, AutoTokenizer.from_pretrained(name)
