"""Fine-tunes a pretrained network on conversations.

    accelerate launch --config_file recipes/accelerate/one_cpu.yaml -m modeling_nanochat.recipes.sft \\
        --config recipes/configs/demo/sft.yaml
    nanochat sft --config demo/sft --inspect 3     # prints three rows with the trained tokens coloured, trains nothing

The mixture is one JSON lines file, shuffled once with a fixed seed; what it consists of is decided where it is written
(`nanochat prepare_data`). It says what became of the conversations: tokens trained on, rows filled, rows left out,
conversations cut, left out or without anything to train on. The output folder holds the model with its code, and the
tokenizer.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_nanochat.chunked_cross_entropy import IGNORE_INDEX
from modeling_nanochat.eval.sampling import generate_batch
from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.evaluation.arguments import OnTheWayArguments
from modeling_nanochat.recipes.evaluation.on_the_way import measured_on_the_way
from modeling_nanochat.recipes.publishing.finished import publish
from modeling_nanochat.recipes.stages.folder import (
    checkpoint_to_resume,
    load_checkpoint,
    remove_unwanted_checkpoints,
    save_checkpoint,
)
from modeling_nanochat.recipes.stages.record import Stage
from modeling_nanochat.recipes.stages.token_colors import colored_row
from modeling_nanochat.tokenization_nanochat_gpt import render_prompt
from modeling_nanochat.training import devices, scaling
from modeling_nanochat.training.data.conversations import ConversationFile
from modeling_nanochat.training.trainers.lora import merged
from modeling_nanochat.training.trainers.pretrain import Evaluation
from modeling_nanochat.training.trainers.settings import check_range
from modeling_nanochat.training.trainers.sft import NanoChatSFTConfig, NanoChatSFTTrainer

SAMPLE_TOKENS = 64


@dataclass
class SFTArguments:
    """What to fine-tune, and on what."""

    model: str = field(default="out/demo/base", metadata={"help": "Folder or Hub name of the pretrained model."})
    data: str = field(
        default="out/demo/data/sft", metadata={"help": "Folder with train.jsonl and validation.jsonl of conversations."}
    )
    rerun: bool = field(default=False, metadata={"help": "Train again even if it is already done."})
    max_conversations: int | None = field(
        default=None, metadata={"help": "Take so many of the shuffled training conversations; all by default."}
    )
    validation_conversations: int = field(
        default=1000, metadata={"help": "Conversations that the validation loss is measured on, at most."}
    )
    inspect: int = field(
        default=0, metadata={"help": "Print so many packed rows with the trained tokens coloured, and train nothing."}
    )

    def __post_init__(self) -> None:
        check_range(self, "max_conversations", 1)
        check_range(self, "validation_conversations", 0)
        check_range(self, "inspect", 0)


@dataclass
class WatchArguments:
    """What is shown on the way, beside the validation loss."""

    sample_every: int = field(default=0, metadata={"help": "Steps between sample answers; 0: only at the end."})
    sample_prompts: list[str] = field(
        default_factory=lambda: ["Who are you?", "What is 12 + 30?", "How many r are in strawberry?"],
        metadata={"help": "Questions that the samples answer."},
    )

    def __post_init__(self) -> None:
        check_range(self, "sample_every", 0)


def main() -> None:
    arguments, watch, on_the_way, config = parse(SFTArguments, WatchArguments, OnTheWayArguments, NanoChatSFTConfig)
    files = [f"{arguments.data}/{split}.jsonl" for split in ("train", "validation")]
    groups = [arguments, watch, on_the_way, config]
    inputs = [arguments.model, *files, *filter(None, [config.warm_start])]
    stage = Stage("sft", config.output_dir, groups, inputs, arguments.rerun)
    if not arguments.inspect and stage.is_done():
        if config.push_to_hub:
            publish(stage, config)
        return
    logging.disable_progress_bar()  # of reading and writing weights, which would tear the one of training
    checkpoint = None if arguments.inspect else checkpoint_to_resume(stage, config)
    model, tokenizer = load_checkpoint(arguments.model)
    train = ConversationFile(files[0], config.seed, arguments.max_conversations)
    validation = ConversationFile(files[1], config.seed, arguments.validation_conversations)
    if not len(validation):
        stage.say(f"the validation split {files[1]} is empty: no validation loss")
        config.eval_strategy = "no"
    samples = SampleAnswers(tokenizer, watch.sample_prompts)
    evaluations = [Evaluation(samples, watch.sample_every), *measured_on_the_way(on_the_way, tokenizer)]
    trainer = NanoChatSFTTrainer(model, config, train, validation, processing_class=tokenizer, evaluations=evaluations)
    if arguments.inspect:
        print_rows(trainer, arguments.inspect)
        return
    announce(stage, trainer)
    before = trainer.evaluate()
    trainer.keeps_end = True  # what comes after it, such as measuring, may be killed too
    trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.evaluate()
    whole = trainer.whole_model()
    if trainer.is_world_process_zero():
        whole = merged(whole, config.output_dir)
        save_checkpoint(whole, tokenizer, config.output_dir)
        shutil.rmtree(Path(config.output_dir, "packed"))
    stage.finish(results_of(trainer, before, after), trainer.state.log_history, samples.taken)
    remove_unwanted_checkpoints(config)
    publish(stage, config)


def results_of(trainer: NanoChatSFTTrainer, before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """The figures of the run for its record."""
    results: dict[str, Any] = {}
    for name in ("loss", "bits_per_byte"):
        if f"eval_{name}" in after:
            results |= {
                f"validation_{name}": after[f"eval_{name}"],
                f"validation_{name}_before": before[f"eval_{name}"],
            }
    others = {name.removeprefix("eval_"): after[name] for name in after if name not in before}  # measured on the way
    return (
        results
        | others
        | {
            "steps": trainer.state.global_step,
            "rows_left_out": trainer.rows_left_out,
            **trainer.packed["train"].figures(),
        }
    )


class SampleAnswers:
    """The likeliest answer to each question. `taken` collects them all, once for each step."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]):
        self.tokenizer, self.questions = tokenizer, list(questions)
        self.taken: list[dict[str, Any]] = []

    def __call__(self, model: PreTrainedModel, step: int) -> dict[str, float]:
        prompts = [render_prompt(self.tokenizer, [{"role": "user", "content": each}]) for each in self.questions]
        # On all ranks, which would wait anyway: sharded weights need them all.
        answers = generate_batch(model, self.tokenizer, prompts, max_new_tokens=SAMPLE_TOKENS, temperature=0)
        self.taken = [sample for sample in self.taken if sample["step"] != step]  # the last step is measured twice
        for question, (answer,) in zip(self.questions, answers):
            self.taken.append({"step": step, "prompt": question, "completion": self.tokenizer.decode(answer)})
        return {}


def print_rows(trainer: NanoChatSFTTrainer, count: int) -> None:
    """Packed rows, the trained tokens coloured: what a run would learn from."""
    if not trainer.is_world_process_zero():
        return
    colors = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    rows = trainer.train_dataset
    for number, row in enumerate(rows.select(range(min(count, len(rows)))), start=1):
        trained = [label != IGNORE_INDEX for label in row["labels"]]
        print(f"row {number}: {sum(trained)} of {len(trained)} tokens are trained")
        print(colored_row(trainer.processing_class, row["input_ids"], trained, colors) + "\n")
    for sentence in what_became_of(trainer):
        print(sentence)


def announce(stage: Stage, trainer: NanoChatSFTTrainer) -> None:
    config, figures = trainer.args, trainer.packed["train"].figures()
    steps = trainer.planned_steps
    tokens = steps * trainer.batch_tokens
    flops = tokens * trainer.flops_per_token
    stage.announce(
        parameters=scaling.count_parameters(trainer.model.config).total,
        conversations=figures["conversations"],
        tokens=tokens,
        steps=steps,
        batch=f"{config.per_device_train_batch_size} x {config.max_length} tokens x "
        f"{config.gradient_accumulation_steps} x {config.world_size} device(s)",
        flops=flops,
        init_lr_frac=trainer.init_lr_frac,
        activations=str(trainer.activation_dtype).removeprefix("torch."),
        seconds=devices.expected_seconds(flops, config.device, trainer.activation_dtype, config.world_size),
    )
    for sentence in what_became_of(trainer):
        stage.say(sentence)


def what_became_of(trainer: NanoChatSFTTrainer) -> list[str]:
    """Of the conversations, in words; only what happened."""
    packed = trainer.packed["train"]
    figures = packed.figures()
    sentences = [
        f"{figures['trained_share']:.0%} of the tokens carry loss, rows are {figures['utilisation']:.1%} full, "
        f"{trainer.rows_left_out} of {figures['rows']} rows fill no batch and are left out of each epoch"
    ]
    for key, what in (
        ("trimmed_conversations", "are longer than a row and lose their end"),
        ("untrained_conversations", "have nothing to train on within a row and are left out"),
        ("skipped_conversations", f"cannot be rendered and are left out, the first: {'; '.join(packed.errors)}"),
    ):
        if figures[key]:
            sentences.append(f"{figures[key]} conversations {what}")
    return sentences


if __name__ == "__main__":
    run(main)
