"""What reinforcement adds to imitation: the study of docs/finetuning.md, which draws its figure.

    python -m benchmarks.rl_study

The problems are `eval/tasks/factors.py`: find a factor of a number, with the calculator. For every seed (of the
weights, the order of the data and the samples) six networks answer the same held-out problems:

- `sft`: fine-tuned from scratch on solutions as people leave them, which often break the search off;
- `more sft`: that network fine-tuned further, for as many steps as `sft` would have made in the processor time of
  reinforcement, on the solutions of the problems that reinforcement practices on;
- `own`: that network fine-tuned on those of its own answers to these problems that are right: as many are sampled as by
  reinforcement, and the rest of its processor time goes into imitating them;
- `rl`: that network after reinforcement;
- `filtered`: that network fine-tuned further, as long as `more sft`, on only those solutions whose work leads to the
  answer, a third of all. Somebody has to look at the work to pick them: the answers are all right;
- `teacher`: fine-tuned from scratch, like `sft`, on as many solutions that show the whole search.

The first three, the controls, know no more than reinforcement does; the last two are shown the way. Each is a run of
the recipes with the configs in recipes/configs/rl_study; what is done is not done again, and what was interrupted goes
on. Processor time is counted, not wall-clock, which other work on the machine stretches.
"""

import importlib
import json
import math
import shutil
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
from modeling_nanochat.recipes.stages.record import read_json, read_stage
from modeling_nanochat.recipes.stages.tables import CALCULATION
from modeling_nanochat.training.tokenizer import train_tokenizer
from modeling_nanochat.training.trainers.reinforce import ReinforceConfig, ReinforceTrainer
from modeling_nanochat.training.whole_files import write_json

FIGURE = Path("docs/rl_study.png")
DEPTH, ASPECT_RATIO, HEAD_DIM, VOCABULARY, CONTEXT = 2, 32, 32, 384, 160  # 0.17 million parameters
TOKENIZER_ROWS = 3000
PROBLEMS, SAMPLES = 250, 4  # held-out problems, and answers to each
AT_ONCE = 512  # answers sampled together
NETWORKS = ("sft", "more sft", "own", "rl", "filtered", "teacher")
CONTROLS = ("sft", "more sft", "own")
LABELS = (
    "imitation", "more imitation", "imitation of own\nright answers", "reinforcement",
    "imitation of the\nthird that works", "imitation of\nthe whole search",
)  # fmt: skip


@dataclass
class StudyArguments:
    """Where, and how much."""

    output_dir: str = field(default="out/rl_study", metadata={"help": "Folder of the data and of each seed."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5], metadata={"help": "One row of the table each."})


def main() -> None:
    (arguments,) = parse(StudyArguments)
    root = Path(arguments.output_dir)
    for name in ("data", "teacher_data"):
        recipe("prepare_data", name, root / name)
    write_filtered(root)
    found = {}
    for seed in arguments.seeds:
        found[seed] = study(arguments, seed)
        print(table({seed: found[seed]}), flush=True)
    print("\n" + table(found) + "\n" + verdict(found))
    draw(found, FIGURE)


def study(arguments: StudyArguments, seed: int) -> dict[str, dict]:
    """Train the networks of a seed and measure them."""
    root, folder = Path(arguments.output_dir), Path(arguments.output_dir, f"seed_{seed}")
    fresh = folder / "fresh"
    if not (fresh / "config.json").is_file():
        write_fresh_network(root / "data" / "sft" / "train.jsonl", fresh, seed)

    def sft(name: str, **settings: object) -> float:
        return recipe("sft", "sft", folder / name, seed=seed, **settings)

    seconds = {"sft": sft("sft", model=fresh, data=root / "data" / "sft")}
    seconds["rl"] = recipe("rl", "rl", folder / "rl", model=folder / "sft", data=root / "data" / "rl", seed=seed)
    steps = read_stage(folder / "sft")["results"]["steps"]
    longer = {"model": folder / "sft", "max_steps": math.ceil(steps * seconds["rl"] / seconds["sft"])}
    seconds["more sft"] = sft("more sft", data=root / "data" / "rl", **longer)
    sampling = write_own_answers(root, folder, seed)
    rest = {"model": folder / "sft", "max_steps": math.ceil(steps * (seconds["rl"] - sampling) / seconds["sft"])}
    seconds["own"] = sampling + sft("own", data=folder / "own_answers", **rest)
    seconds["filtered"] = sft("filtered", data=root / "filtered", **longer)
    seconds["teacher"] = sft("teacher", model=fresh, data=root / "teacher_data" / "sft")
    return {name: figures(root, folder / name, seconds[name]) for name in NETWORKS}


def figures(root: Path, folder: Path, seconds: float) -> dict[str, object]:
    """What was measured of a network, now or before: pass@1, call rate and accuracy given a call on the held-out
    problems, by the same random numbers for all; intervals as such."""
    file = folder / "figures.json"
    if not file.is_file():
        found = judge(root, folder, "validation", PROBLEMS).evaluate()
        write_json(file, {"seconds": seconds, **{name.removeprefix("eval_"): value for name, value in found.items()}})
    known = json.loads(file.read_text(encoding="utf-8"))
    return {key: Interval(**value) if isinstance(value, dict) else value for key, value in known.items()}


def recipe(name: str, config: str, folder: Path, **settings: object) -> float:
    """Run a recipe, which skips what is done, and return the processor time that it took, in all its pieces."""
    file, before, given = folder / "processor.json", read_stage(folder), sys.argv
    spent = 0.0 if before else read_json(file) or 0.0  # before it was interrupted
    options = [f"--{key}={value}" for key, value in {"output_dir": folder, **settings}.items()]
    start = time.process_time()
    try:
        sys.argv = [name, "--config", f"rl_study/{config}", *options]
        importlib.import_module(f"modeling_nanochat.recipes.{name}").main()
    finally:
        sys.argv = given
        if before is None or read_stage(folder) != before:
            write_json(file, spent + time.process_time() - start)
    return json.loads(file.read_text())


def write_filtered(root: Path) -> None:
    """The solutions that end with a division that works, of all that the controls (a) and (b) imitate."""
    lines = [line for use in ("sft", "rl") for line in (root / "data" / use / "train.jsonl").open(encoding="utf-8")]
    (root / "filtered").mkdir(exist_ok=True)
    (root / "filtered" / "train.jsonl").write_text("".join(filter(leads_to_the_answer, lines)), encoding="utf-8")
    shutil.copy(root / "data" / "rl" / "validation.jsonl", root / "filtered")


def leads_to_the_answer(line: str) -> bool:
    """Whether the last division of a solution has a whole quotient."""
    solution = json.loads(line)["messages"][-1]["content"]
    return float([part["text"] for part in solution if part["type"] == "python_output"][-1]).is_integer()


def write_own_answers(root: Path, folder: Path, seed: int) -> float:
    """As many answers of the imitating network as reinforcement samples, the right ones kept as conversations; the
    processor time that this took."""
    target = folder / "own_answers"
    if not (target / "processor.json").is_file():
        start, settings = time.process_time(), rl_settings()
        count = settings["max_steps"] * settings["per_device_train_batch_size"]
        trainer, rows = judge(root, folder / "sft", "train", None, seed=seed), []
        problems = [json.loads(row["prompt"]) for row in trainer.train_dataset]
        for first in range(0, count, AT_ONCE):
            positions = range(first, min(first + AT_ONCE, count))
            asked = [problems[position % len(problems)] for position in positions]
            drawn = trainer.sample(asked, 0, positions, count)
            rows += [own_answer(*each) for each in zip(asked, drawn.texts, drawn.passed)]
        target.mkdir(exist_ok=True)
        (target / "train.jsonl").write_text("".join(filter(None, rows)), encoding="utf-8")
        shutil.copy(root / "data" / "rl" / "validation.jsonl", target)
        write_json(target / "processor.json", time.process_time() - start)
    return json.loads((target / "processor.json").read_text())


def own_answer(problem: dict, text: str, passed: bool) -> str:
    """A right answer as a line of a training file; nothing for another, or for one with half a call in it."""
    pieces = CALCULATION.split(text.removesuffix("<|assistant_end|>"))
    if not passed or not text.endswith("<|assistant_end|>") or any("<|" in piece for piece in pieces):
        return ""
    kinds = ("text", "python", "python_output")
    parts = [{"type": kinds[place % 3], "text": piece} for place, piece in enumerate(pieces) if piece]
    return json.dumps({"messages": [*problem["prompt"], {"role": "assistant", "content": parts}]}) + "\n"


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


def rl_settings() -> dict:
    return yaml.safe_load((CONFIGS / "rl_study" / "rl.yaml").read_text(encoding="utf-8"))


def judge(root: Path, folder: Path, split: str, limit: int | None, seed: int = 42) -> ReinforceTrainer:
    """A trainer that only samples a network's answers to problems, and judges them."""
    config = ReinforceConfig(
        str(folder / "measured"), use_cpu=True, disable_tqdm=True, num_generations_eval=SAMPLES, seed=seed,
        max_completion_length=rl_settings()["max_completion_length"], per_device_eval_batch_size=AT_ONCE,
    )  # fmt: skip
    model, tokenizer = load_checkpoint(str(folder))
    file = str(root / "data" / "rl" / f"{split}.jsonl")
    problems = read_problems(file, tokenizer, CONTEXT - config.max_completion_length)[:limit]
    return ReinforceTrainer(
        model, config, problems, problems, rewards={"checker": find_reward("checker")}, summarize=summarize_passes,
        processing_class=tokenizer,
    )  # fmt: skip


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
    """On how many seeds reinforcement beat the best control by 15 points, the intervals apart."""
    gains, apart = [], 0
    for networks in found.values():
        best = max((networks[name]["pass@1"] for name in CONTROLS), key=float)
        after = networks["rl"]["pass@1"]
        gains.append(100 * (after.mean - best.mean))
        apart += gains[-1] >= 15 and after.low > best.high
    points = ", ".join(f"{gain:.1f}" for gain in gains)
    return (
        f"gain over the best control, in points: {points}; at least 15 with intervals apart on {apart} of {len(gains)} "
        "seeds"
    )


def draw(found: dict[int, dict[str, dict]], file: Path) -> None:
    """pass@1 of every network and seed with its interval."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9.5, 3.4), layout="constrained")
        for position, (name, color) in enumerate(zip(NETWORKS, (GREY, GREY, GREY, COLORS[0], COLORS[2], COLORS[2]))):
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
