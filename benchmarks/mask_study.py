"""Fine-tuning with loss on the assistant's tokens against loss on all tokens, at an equal budget.

    python -m benchmarks.mask_study --model out/demo/base --data out/demo/data/sft

Both variants see the same rows in the same order, from the same weights, for as many steps; only the labels differ.
What counts is the loss on the assistant's tokens of held-out conversations. Several seeds shuffle differently.
"""

import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from trl import TrlParser

from modeling_nanochat.chunked_cross_entropy import IGNORE_INDEX
from modeling_nanochat.recipes.stages.folder import load_checkpoint
from modeling_nanochat.training.data.conversations import ConversationFile
from modeling_nanochat.training.trainers.sft import NanoChatSFTConfig, NanoChatSFTTrainer


@dataclass
class StudyArguments:
    """What to compare on."""

    model: str = field(default="out/demo/base", metadata={"help": "Folder of the pretrained model."})
    data: str = field(default="out/demo/data/sft", metadata={"help": "Folder with train.jsonl and validation.jsonl."})
    steps: int = field(default=100, metadata={"help": "Optimizer steps of each run."})
    rows: int = field(default=16, metadata={"help": "Rows of a batch."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a row."})
    seeds: int = field(default=3, metadata={"help": "Runs of each variant."})
    validation_conversations: int = field(default=200, metadata={"help": "Held-out conversations."})


def main() -> None:
    (arguments,) = TrlParser(StudyArguments).parse_args_and_config()
    losses: dict[bool, list[float]] = {True: [], False: []}
    print("seed  assistant's tokens  all tokens   (loss on held-out assistant tokens, nats; bits per byte)", flush=True)
    for seed in range(arguments.seeds):
        shown = []
        for masked in (True, False):
            metrics = fine_tune(arguments, seed, masked)
            losses[masked].append(metrics["eval_loss"])
            shown.append(f"{metrics['eval_loss']:.4f} ({metrics['eval_bits_per_byte']:.4f})")
        print(f"{seed:4}  {shown[0]:>18}  {shown[1]:>16}", flush=True)
    gains = [everything - masked for masked, everything in zip(losses[True], losses[False])]
    print(f"all tokens cost {statistics.mean(gains):.4f} nats more, from {min(gains):.4f} to {max(gains):.4f}")


def fine_tune(arguments: StudyArguments, seed: int, masked: bool) -> dict[str, float]:
    """The validation figures after one run."""
    model, tokenizer = load_checkpoint(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        config = NanoChatSFTConfig(
            folder,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.rows,
            max_length=arguments.max_length,
            seed=seed,
            disable_tqdm=True,
        )
        files = [Path(arguments.data, f"{split}.jsonl") for split in ("train", "validation")]
        needed = arguments.steps * arguments.rows * 12  # conversations; a row holds about five, so none is seen twice
        trainer = NanoChatSFTTrainer(
            model,
            config,
            ConversationFile(files[0], seed, needed),
            ConversationFile(files[1], 0, arguments.validation_conversations),
            processing_class=tokenizer,
        )
        if not masked:
            trainer.train_dataset = with_loss_everywhere(trainer.train_dataset, tokenizer.pad_token_id)
        trainer.train()
        return trainer.evaluate()


def with_loss_everywhere(rows: Dataset, pad_token_id: int) -> Dataset:
    """The same rows, every token a target but the padding at the end."""

    def label(row: dict[str, list[int]]) -> dict[str, list[int]]:
        labels = list(row["input_ids"])
        for place in range(len(labels) - 1, -1, -1):
            if labels[place] != pad_token_id:
                break
            labels[place] = IGNORE_INDEX
        return {"labels": labels}

    return rows.map(label, keep_in_memory=True)


if __name__ == "__main__":
    main()
