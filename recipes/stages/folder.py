"""The folder that one stage hands to the next: weights with the network's code, tokenizer, generation settings; and
which of the checkpoints in it a run goes on from."""

import shutil
import sys
from functools import cache
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

import modeling_nanochat  # registers the network with the Auto classes
from modeling_nanochat.attention_choice import choose_attention
from modeling_nanochat.inference import cast_weights
from modeling_nanochat.recipes.stages.record import Stage, is_main_process
from modeling_nanochat.training.data.documents import is_local_path
from modeling_nanochat.training.devices import choose_dtype
from modeling_nanochat.training.ranks import on_main_process
from modeling_nanochat.training.trainers.checkpoints import as_it_answers, latest_checkpoint
from modeling_nanochat.training.whole_files import damage, replace_files


def load_checkpoint(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model with float32 weights, and tokenizer, from a folder or the Hub.

    Raises:
        ValueError: `model` is a local path and no checkpoint is there.
    """
    if is_local_path(model) and not Path(model, "config.json").exists():
        raise ValueError(f"{model} holds no checkpoint (no config.json); expected the folder of a trained model")
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), load_tokenizer(model)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the Hub.

    Raises:
        ValueError: `name` is a local path and no tokenizer is there.
    """
    if is_local_path(name) and not Path(name, "tokenizer_config.json").exists():
        raise ValueError(f"{name} holds no tokenizer (no tokenizer_config.json); expected what train_tokenizer made")
    return AutoTokenizer.from_pretrained(name)


def load_for_inference(model: str, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in eval mode on this process's device, and tokenizer.

    Args:
        dtype: of activations and matrices: float32, bfloat16, or `auto`: bfloat16 where that is native.

    Raises:
        ValueError: `model` is a local path and no checkpoint is there.
    """
    network, tokenizer = load_checkpoint(model)
    device = PartialState().device
    dtype = choose_dtype(dtype, device)
    if isinstance(network, modeling_nanochat.NanoChatGPTForCausalLM):
        network.set_activation_dtype(dtype)
        cast_weights(network, dtype)
        network = network.to(device).eval()
        say_once(choose_attention(network))
    else:
        network = network.to(device, dtype).eval()
    return network, tokenizer


@cache
def say_once(sentence: str) -> None:
    """On the main process, and not where answers go."""
    if PartialState().is_main_process:
        print(sentence, file=sys.stderr)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: str) -> None:
    """Write everything that loads and chats without this package; each file appears whole. Main process only."""

    def write(folder: Path) -> None:
        with as_it_answers(model, tokenizer):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    replace_files(output_dir, write)
    model.config.name_or_path = output_dir  # where its calculator finds the tokenizer


def remove_unwanted_checkpoints(config: TrainingArguments) -> None:
    """Of a stage that is done and was to save none on the way."""
    if config.save_strategy == SaveStrategy.NO and is_main_process():
        for checkpoint in list(Path(config.output_dir).glob("checkpoint-*")):
            shutil.rmtree(checkpoint)


def checkpoint_to_resume(stage: Stage, config: TrainingArguments) -> str | None:
    """The checkpoint named in the arguments (`true`: the latest there is), else the latest whole one of this run. Those
    of a finished or unwanted run go when the stage begins.

    Raises:
        ValueError: the named checkpoint is none, or damaged; or the folder holds checkpoints of another run that was
            not finished.
    """
    checkpoint = on_main_process(lambda: choose_checkpoint(stage, config))
    stage.goes_on = checkpoint is not None
    return checkpoint


def choose_checkpoint(stage: Stage, config: TrainingArguments) -> str | None:
    """What `checkpoint_to_resume` gives: reads every file of the checkpoints it looks at."""
    named = named_checkpoint(config.resume_from_checkpoint, config.output_dir)
    checkpoint = named or latest_checkpoint(config.output_dir, stage.say)
    if not checkpoint or named or stage.can_continue():
        return checkpoint
    finished = stage.file.exists() and not stage.begun.exists()
    if stage.rerun or finished:
        return None
    raise ValueError(
        f"{config.output_dir} holds checkpoints of an unfinished run with other settings or inputs, the last one "
        f"{checkpoint}; expected the same settings, another output_dir, --resume_from_checkpoint {checkpoint} to go on "
        "with these settings, or --rerun true to throw the checkpoints away"
    )


def named_checkpoint(name: str | None, output_dir: str) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means.

    Raises:
        ValueError: it is not there, or damaged.
    """
    if name is None or name.lower() in ("", "false"):
        return None
    checkpoint = latest_checkpoint(output_dir) if name.lower() == "true" else name
    if checkpoint is None:
        raise ValueError(f"--resume_from_checkpoint true, but {output_dir} holds no checkpoint")
    if not Path(checkpoint, TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {name} is no checkpoint; expected a folder with {TRAINER_STATE_NAME}"
        )
    if found := damage(Path(checkpoint)):
        raise ValueError(f"--resume_from_checkpoint {name} is damaged: {found}; expected a whole checkpoint")
    return checkpoint
