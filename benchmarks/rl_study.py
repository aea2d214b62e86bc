"""What reinforcement adds to imitation: the study of docs/finetuning.md, which draws its figure.

    python -m benchmarks.rl_study

The problems are `eval/tasks/factors.py`: find a factor of a number, with the calculator. For every seed (of the
weights, the order of the data and the samples) four networks answer the same held-out problems:

- `sft`: fine-tuned from scratch on solutions as people leave them, which often break the search off: control (a);
- `rl`: that network after reinforcement;
- `more sft`: that network fine-tuned further, for as many steps as `sft` would have made in the processor time of
  reinforcement, on the solutions of the problems that reinforcement practiced on: control (b);
- `teacher`: fine-tuned from scratch, like `sft`, on as many solutions that show the whole search.

Each is a run of the recipes with the configs in recipes/configs/rl_study; a seed that is done is not done again, and
one that was interrupted goes on. Processor time is counted, not wall-clock, which other work on the machine stretches.
"""

import importlib
import json
import math
import sys
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import yaml

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.eval.intervals import Interval, summarize_passes
from modeling_nanochat.recipes.command_line import CONFIGS, parse, run
from modeling_nanochat.recipes.rl import find_reward, read_problems
from modeling_nanochat.recipes.stages.curves import COLORS, GREY, STYLE
from modeling_nanochat.recipes.stages.folder import load_checkpoint, save_checkpoint
from modeling_nanochat.recipes.stages.record import read_stage
from modeling_nanochat.training.tokenizer import train_tokenizer
from modeling_nanochat.training.trainers.reinforce import ReinforceConfig, ReinforceTrainer
from modeling_nanochat.training.whole_files import write_json

FIGURE = Path("docs/rl_study.png")
DEPTH, ASPECT_RATIO, HEAD_DIM, VOCABULARY, CONTEXT = 2, 32, 32, 384, 160  # 0.17 million parameters
TOKENIZER_ROWS = 3000
NETWORKS = ("sft", "more sft", "rl", "teacher")
CONTROLS = ("sft", "more sft")
LABELS = ("imitation", "more imitation\n(same processor time)", "reinforcement", "imitation of\nthe whole search")


@dataclass
class StudyArguments:
    """Where, and how much."""

    output_dir: str = field(default="out/rl_study", metadata={"help": "Folder of the data and of each seed."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5], metadata={"help": "One row of the table each."})
    problems: int = field(default=250, metadata={"help": "Held-out problems that are asked."})
    samples: int = field(default=4, metadata={"help": "Answers to each of them."})


def main() -> None:
    (arguments,) = parse(StudyArguments)
    root = Path(arguments.output_dir)
    for name in ("data", "teacher_data"):
        recipe("prepare_data", name, root / name)
    found = {}
    for seed in arguments.seeds:
        file = root / f"seed_{seed}" / "figures.json"
        if not file.is_file():
            write_json(file, study(arguments, seed))
        found[seed] = read_figures(file)
        print(table({seed: found[seed]}), flush=True)
    print("\n" + table(found) + "\n" + verdict(found))
    draw(found, FIGURE)


def read_figures(file: Path) -> dict[str, dict]:
    """Of the networks of a seed, intervals made into such again."""
    networks = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: {key: Interval(**value) if isinstance(value, dict) else value for key, value in figures.items()}
        for name, figures in networks.items()
    }


def study(arguments: StudyArguments, seed: int) -> dict[str, dict]:
    """Train the four networks of a seed and measure them."""
    root, folder = Path(arguments.output_dir), Path(arguments.output_dir, f"seed_{seed}")
    fresh, data = folder / "fresh", {"data": root / "data" / "sft", "seed": seed}
    if not (fresh / "config.json").is_file():
        write_fresh_network(root / "data" / "sft" / "train.jsonl", fresh, seed)
    seconds = {
        "sft": recipe("sft", "sft", folder / "sft", model=fresh, **data),
        "rl": recipe("rl", "rl", folder / "rl", model=folder / "sft", data=root / "data" / "rl", seed=seed),
        "teacher": recipe("sft", "sft", folder / "teacher", model=fresh, seed=seed, data=root / "teacher_data" / "sft"),
    }
    steps = read_stage(folder / "sft")["results"]["steps"]
    longer = {"model": folder / "sft", "data": root / "data" / "rl", "seed": seed}
    longer["max_steps"] = math.ceil(steps * seconds["rl"] / seconds["sft"])
    seconds["more sft"] = recipe("sft", "sft", folder / "more sft", **longer)
    return {name: {"seconds": seconds[name], **measure(arguments, folder / name)} for name in NETWORKS}


def recipe(name: str, config: str, folder: Path, **settings: object) -> float:
    """Run a recipe, which skips what is done, and return the processor time that it took when it was not."""
    file, before, given = folder / "processor.json", read_stage(folder), sys.argv
    options = [f"--{key}={value}" for key, value in {"output_dir": folder, **settings}.items()]
    start = time.process_time()
    try:
        sys.argv = [name, "--config", f"rl_study/{config}", *options]
        importlib.import_module(f"modeling_nanochat.recipes.{name}").main()
    finally:
        sys.argv = given
    if read_stage(folder) != before or not file.is_file():
        write_json(file, time.process_time() - start)
    return json.loads(file.read_text())


def write_fresh_network(conversations: Path, folder: Path, seed: int) -> None:
    """Random weights of the seed, and a tokenizer that has seen some of the conversations."""
    with conversations.open(encoding="utf-8") as lines:
        tokenizer = train_tokenizer(islice(lines, TOKENIZER_ROWS), VOCABULARY)
    torch.manual_seed(seed)
    config = NanoChatGPTConfig.from_depth(
        DEPTH, vocab_size=VOCABULARY, head_dim=HEAD_DIM, aspect_ratio=ASPECT_RATIO, max_position_embeddings=CONTEXT,
        window_pattern="L",
    )  # fmt: skip
    save_checkpoint(NanoChatGPTForCausalLM(config), tokenizer, str(folder))


def measure(arguments: StudyArguments, folder: Path) -> dict[str, object]:
    """pass@1, call rate and accuracy given a call on the held-out problems, by the same random numbers for all."""
    settings = yaml.safe_load((CONFIGS / "rl_study" / "rl.yaml").read_text(encoding="utf-8"))
    config = ReinforceConfig(
        str(folder / "measured"), use_cpu=True, disable_tqdm=True, num_generations_eval=arguments.samples,
        max_completion_length=settings["max_completion_length"], per_device_eval_batch_size=512,
    )  # fmt: skip
    model, tokenizer = load_checkpoint(str(folder))
    file = str(Path(arguments.output_dir, "data", "rl", "validation.jsonl"))
    problems = read_problems(file, tokenizer, CONTEXT - config.max_completion_length)[: arguments.problems]
    trainer = ReinforceTrainer(
        model, config, problems, problems, rewards={"checker": find_reward("checker")}, summarize=summarize_passes,
        processing_class=tokenizer,
    )  # fmt: skip
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}


def table(found: dict[int, dict[str, dict]]) -> str:
    """A row for each seed and network."""
    lines = [f"{'seed':>4}  {'network':8}  pass@1  95% interval   calls  right given a call  processor seconds"]
    for seed, networks in found.items():
        for name, each in networks.items():
            passed = each["pass@1"]
            lines.append(
                f"{seed:4}  {name:8}  {passed.mean:6.3f}  {passed.low:.3f}-{passed.high:.3f}  {each['call_rate']:6.3f}"
                f"  {each.get('accuracy_given_a_call', math.nan):18.3f}  {each['seconds']:17.0f}"
            )
    return "\n".join(lines)


def verdict(found: dict[int, dict[str, dict]]) -> str:
    """On how many seeds reinforcement beat the better control by 15 points, the intervals apart."""
    gains = []
    for networks in found.values():
        better = max((networks[name]["pass@1"] for name in CONTROLS), key=float)
        after = networks["rl"]["pass@1"]
        gains.append((after.mean - better.mean, after.low > better.high))
    points = [f"{100 * gain:.1f}" for gain, _ in gains]
    held = sum(gain >= 0.15 and apart for gain, apart in gains)
    return (
        f"gain over the better control, in points: {', '.join(points)}; at least 15 with intervals apart on {held} of "
        f"{len(gains)} seeds"
    )


def draw(found: dict[int, dict[str, dict]], file: Path) -> None:
    """pass@1 of every network and seed with its interval."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
        for position, (name, color) in enumerate(zip(NETWORKS, (GREY, GREY, COLORS[0], COLORS[2]))):
            for offset, networks in enumerate(found.values()):
                passed, place = networks[name]["pass@1"], position + (offset - (len(found) - 1) / 2) * 0.12
                axes.plot([place] * 2, [passed.low, passed.high], color=color, linewidth=1.6)
                axes.plot(place, passed.mean, "o", color=color, markersize=4)
        axes.set(
            xticks=range(len(NETWORKS)), xticklabels=LABELS, ylim=(0, 1.03), ylabel="right answers, with 95% intervals"
        )
        axes.set_title(f"Held-out problems, {len(found)} seeds")
        axes.grid(visible=False, axis="x")
        figure.savefig(file)
        plt.close(figure)


if __name__ == "__main__":
    run(main)
