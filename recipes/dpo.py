"""Teaches a chat model to prefer one answer to another (DPO).

    nanochat dpo --model out/demo/sft --data pairs --output_dir out/demo/dpo

`data` is a folder with `train.jsonl`, and `validation.jsonl` if there is one. A line is `{"prompt": messages, "chosen":
messages, "rejected": messages}`, an answer being the one assistant message after the prompt; or, as many data sets on
the Hub have it, `chosen` and `rejected` alone, each the whole conversation. The output folder holds the model with its
code, and the tokenizer.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_nanochat.eval.tasks.rows import read_rows
from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.publishing.finished import publish
from modeling_nanochat.recipes.stages.folder import (
    checkpoint_to_resume,
    load_checkpoint,
    remove_unwanted_checkpoints,
    save_checkpoint,
)
from modeling_nanochat.recipes.stages.record import Stage
from modeling_nanochat.training import scaling
from modeling_nanochat.training.trainers.dpo import NanoChatDPOConfig, NanoChatDPOTrainer, render_pair
from modeling_nanochat.training.trainers.lora import merged

FORM = '{"prompt": [...], "chosen": [...], "rejected": [...]}'
MEASURED = ("loss", "rewards/accuracies", "rewards/margins")


@dataclass
class DPOArguments:
    """What to train, and on what."""

    model: str = field(default="out/demo/sft", metadata={"help": "Folder or Hub name of the chat model."})
    data: str = field(default="pairs", metadata={"help": "Folder with train.jsonl, and validation.jsonl if any."})
    rerun: bool = field(default=False, metadata={"help": "Train again even if it is already done."})


def main() -> None:
    arguments, config = parse(DPOArguments, NanoChatDPOConfig)
    files = [f"{arguments.data}/{split}.jsonl" for split in ("train", "validation")]
    stage = Stage("dpo", config.output_dir, [arguments, config], [arguments.model, *files], arguments.rerun)
    if stage.is_done():
        if config.push_to_hub:
            publish(stage, config)
        return
    logging.disable_progress_bar()  # of reading and writing weights, which would tear the one of training
    checkpoint = checkpoint_to_resume(stage, config)
    model, tokenizer = load_checkpoint(arguments.model)
    take = partial(as_pair, tokenizer=tokenizer)
    train = read_rows(files[0], take, FORM)
    validation = read_rows(files[1], take, FORM) if Path(files[1]).is_file() else None
    trainer = NanoChatDPOTrainer(model, config, train, validation, processing_class=tokenizer)
    stage.announce(
        parameters=scaling.count_parameters(model.config).total,
        pairs=len(trainer.train_dataset),
        batch=f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps} x {config.world_size} "
        "pairs",
        activations=str(trainer.activation_dtype).removeprefix("torch."),
    )
    for name, count in trainer.left_out.items():
        if count:
            stage.say(f"{count} {name} pairs are longer than {config.max_length} tokens and are left out")
    before = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.keeps_end = True  # what comes after it, such as measuring, may be killed too
    trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.evaluate() if trainer.eval_dataset is not None else {}
    whole = trainer.whole_model()
    if trainer.is_world_process_zero():
        save_checkpoint(merged(whole, config.output_dir), tokenizer, config.output_dir)
    results = {"steps": trainer.state.global_step, "pairs_left_out": trainer.left_out["train"]}
    for name in MEASURED:
        if f"eval_{name}" in after:
            results |= {
                f"validation_{name}": after[f"eval_{name}"],
                f"validation_{name}_before": before[f"eval_{name}"],
            }
    stage.finish(results, trainer.state.log_history)
    remove_unwanted_checkpoints(config)
    publish(stage, config)


def as_pair(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A row with its prompt; ValueError if the answers do not follow one prompt, or cannot be rendered."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise ValueError("chosen and rejected must be lists of messages")
    pair = {"prompt": row.get("prompt", chosen[:-1]), "chosen": chosen, "rejected": rejected}
    if "prompt" not in row:
        if chosen[:-1] != rejected[:-1]:
            raise ValueError("chosen and rejected do not follow the same messages")
        pair |= {"chosen": chosen[-1:], "rejected": rejected[-1:]}
    render_pair(pair, tokenizer)  # what is wrong with it is said with its line
    return pair


if __name__ == "__main__":
    run(main)
