"""Fine-tunes a pretrained network on conversations.

    accelerate launch --config_file recipes/accelerate/one_cpu.yaml -m modeling_nanochat.recipes.sft \\
        --config recipes/configs/demo/sft.yaml

The mixture is one JSON lines file, shuffled once with a fixed seed; what it consists of is decided where it is written
(`nanochat prepare_data`). It says what became of the conversations: tokens trained on, rows filled, rows left out,
conversations cut. The output folder holds the model with its code, and the tokenizer.
"""

import json
import random
from dataclasses import dataclass, field

from datasets import Dataset
from transformers.utils import logging

from modeling_nanochat.eval.tasks.rows import read_rows
from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.stages.folder import checkpoint_to_resume, load_checkpoint, save_checkpoint
from modeling_nanochat.recipes.stages.record import Stage
from modeling_nanochat.training import devices, scaling
from modeling_nanochat.training.trainers.sft import NanoChatSFTConfig, NanoChatSFTTrainer


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


def main() -> None:
    arguments, config = parse(SFTArguments, NanoChatSFTConfig)
    files = [f"{arguments.data}/{split}.jsonl" for split in ("train", "validation")]
    stage = Stage("sft", config.output_dir, [arguments, config], [arguments.model, *files], arguments.rerun)
    if stage.is_done():
        return
    logging.disable_progress_bar()  # of reading and writing weights, which would tear the one of training
    checkpoint = checkpoint_to_resume(stage, config)
    model, tokenizer = load_checkpoint(arguments.model)
    train, validation = (read_conversations(file, config.seed) for file in files)
    trainer = NanoChatSFTTrainer(
        model,
        config,
        Dataset.from_dict({"messages": train[: arguments.max_conversations]}),
        Dataset.from_dict({"messages": validation[: arguments.validation_conversations]}),
        processing_class=tokenizer,
    )
    announce(stage, trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.evaluate()["eval_loss"]
    whole = trainer.whole_model()
    if trainer.is_world_process_zero():
        save_checkpoint(whole, tokenizer, config.output_dir)
    figures = trainer.packed["train"].figures()
    results = {
        "validation_loss": after,
        "validation_loss_before": before,
        "steps": trainer.state.global_step,
        "rows_left_out": trainer.rows_left_out,
        **figures,
    }
    stage.finish(results, trainer.state.log_history)


def read_conversations(file: str, seed: int) -> list[str]:
    """The messages of every line of a JSON lines file, as JSON, shuffled."""
    conversations = read_rows(file, lambda row: json.dumps(row["messages"]), '{"messages": [...]}')
    random.Random(seed).shuffle(conversations)
    return conversations


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
        activations=str(trainer.activation_dtype).removeprefix("torch."),
        seconds=devices.expected_seconds(flops, config.device, trainer.activation_dtype, config.world_size),
    )
    stage.say(
        f"{figures['trained_share']:.0%} of the tokens carry loss, rows are {figures['utilisation']:.1%} full, "
        f"{figures['trimmed_conversations']} conversations are longer than a row and lose their end, "
        f"{trainer.rows_left_out} of {figures['rows']} rows fill no batch and are left out"
    )


if __name__ == "__main__":
    run(main)
