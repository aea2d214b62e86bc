"""The folder that one stage hands to the next: weights with the network's code, tokenizer, generation settings."""

from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import modeling_nanochat  # noqa: F401 (registers the network with the Auto classes)
from modeling_nanochat.tokenization_nanochat_gpt import ASSISTANT_END, BOS, special_token_ids
from training.checkpointing import publish_files
from training.scaling import native_bfloat16


def load_checkpoint(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model with float32 weights, and tokenizer, from a folder or the Hub."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), AutoTokenizer.from_pretrained(model)


def load_for_inference(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in eval mode on this process's device, and tokenizer; activations in bfloat16 where that is native.

    Raises:
        ValueError: `model` is a local path and no checkpoint is there.
    """
    is_local = Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
    if is_local and not Path(model, "config.json").exists():
        raise ValueError(f"{model} holds no checkpoint (no config.json); expected the folder of a trained model")
    network, tokenizer = load_checkpoint(model)
    device = PartialState().device
    if native_bfloat16(device):
        network.set_activation_dtype(torch.bfloat16)
    return network.to(device).eval(), tokenizer


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: str) -> None:
    """Write everything that loads and chats without this package; each file appears whole. Main process only."""
    ids = special_token_ids(tokenizer)
    model.config.use_cache = True  # the Trainer turns it off
    model.generation_config = GenerationConfig(
        bos_token_id=ids[BOS], eos_token_id=[ids[ASSISTANT_END], ids[BOS]], pad_token_id=ids[BOS]
    )

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    publish_files(output_dir, write)
