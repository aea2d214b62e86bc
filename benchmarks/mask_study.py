"""Fine-tuning with loss on the assistant's tokens against loss on all tokens, at an equal budget; draws its figure.

    python -m benchmarks.mask_study --model out/demo/base --data out/demo/data/sft

Both variants see the same rows in the same order, from the same weights, for as many steps; only the labels differ.
What counts is the loss on the assistant's tokens of held-out conversations. Several seeds shuffle differently. A run
that is done is not done again.
"""

import statistics
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
from datasets import Dataset

from modeling_nanochat.chunked_cross_entropy import IGNORE_INDEX
from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.stages.curves import COLORS, STYLE
from modeling_nanochat.recipes.stages.folder import load_checkpoint
from modeling_nanochat.recipes.stages.record import read_json
from modeling_nanochat.training.data.conversations import ConversationFile
from modeling_nanochat.training.trainers.sft import NanoChatSFTConfig, NanoChatSFTTrainer
from modeling_nanochat.training.whole_files import write_json

FIGURE = Path("docs/mask_study.png")
VARIANTS = {True: "loss on the assistant's tokens", False: "loss on all tokens"}
Losses = dict[int, float]  # nats per held-out assistant token, by step


@dataclass
class StudyArguments:
    """What to compare on."""

    model: str = field(default="out/demo/base", metadata={"help": "Folder of the pretrained model."})
    data: str = field(default="out/demo/data/sft", metadata={"help": "Folder with train.jsonl and validation.jsonl."})
    steps: int = field(default=100, metadata={"help": "Optimizer steps of each run."})
    measurements: int = field(default=5, metadata={"help": "Times that the held-out loss is measured on the way."})
    rows: int = field(default=16, metadata={"help": "Rows of a batch."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a row."})
    seeds: int = field(default=3, metadata={"help": "Runs of each variant."})
    validation_conversations: int = field(default=200, metadata={"help": "Held-out conversations."})
    output_dir: str = field(default="out/mask_study", metadata={"help": "Folder of what each run found."})


def main() -> None:
    (arguments,) = parse(StudyArguments)
    found: dict[bool, list[Losses]] = {True: [], False: []}
    print("seed  assistant's tokens  all tokens   (nats per held-out assistant token)", flush=True)
    for seed in range(arguments.seeds):
        for masked, runs in found.items():
            runs.append(losses_of(arguments, seed, masked))
        shown = [runs[seed][arguments.steps] for runs in found.values()]
        print(f"{seed:4}  {shown[0]:18.3f}  {shown[1]:10.3f}", flush=True)
    gains = [all_[arguments.steps] - masked[arguments.steps] for masked, all_ in zip(found[True], found[False])]
    print(f"all tokens cost {statistics.mean(gains):.3f} nats more, from {min(gains):.3f} to {max(gains):.3f}")
    draw(found)


def losses_of(arguments: StudyArguments, seed: int, masked: bool) -> Losses:
    """Those of one run, which is made unless a run of the same settings has been."""
    file = Path(arguments.output_dir, f"seed_{seed}_{'assistant' if masked else 'all'}.json")
    settings, known = asdict(arguments) | {"seeds": None}, read_json(file)
    if known is None or known["settings"] != settings:
        known = {"settings": settings, "losses": fine_tune(arguments, seed, masked)}
        write_json(file, known)
    return {int(step): loss for step, loss in known["losses"].items()}


def fine_tune(arguments: StudyArguments, seed: int, masked: bool) -> Losses:
    model, tokenizer = load_checkpoint(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        config = NanoChatSFTConfig(
            folder, max_steps=arguments.steps, per_device_train_batch_size=arguments.rows, seed=seed,
            max_length=arguments.max_length, disable_tqdm=True, eval_strategy="steps",
            eval_steps=arguments.steps // arguments.measurements,
        )  # fmt: skip
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
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        log = trainer.state.log_history
        losses = {line["step"]: line["eval_loss"] for line in log if "eval_loss" in line}
        return {0: before} | losses | {arguments.steps: trainer.evaluate()["eval_loss"]}


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


def draw(found: dict[bool, list[Losses]]) -> None:
    """The held-out loss along every run, from the first measurement after the start."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
        for (masked, runs), color in zip(found.items(), COLORS):
            for number, losses in enumerate(runs):
                steps = sorted(losses)[1:]
                label = None if number else VARIANTS[masked]
                axes.plot(steps, [losses[step] for step in steps], "o-", color=color, markersize=3.5, label=label)
        axes.set(xlabel="step", ylabel="nats per token")
        axes.set_title(f"Held-out assistant's tokens, {len(found[True])} seeds")
        axes.legend()
        figure.savefig(FIGURE)
        plt.close(figure)


if __name__ == "__main__":
    run(main)
