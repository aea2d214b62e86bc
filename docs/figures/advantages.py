"""How many of sixteen answers to each question are right before and after reinforcement, and what that teaches: the
advantage of a right and of a wrong answer.

Draws from docs/figures/advantages.json. The study of reinforcement (`python -m benchmarks.rl_study --seeds 1`, eight
minutes) leaves the networks that make that file anew:

    python docs/figures/advantages.py out/rl_study
"""

import json
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from drawing import BLUE, GREEN, GREY, RED, save

from modeling_nanochat.eval.intervals import summarize_passes
from modeling_nanochat.recipes.rl import find_reward, read_problems
from modeling_nanochat.recipes.stages.folder import load_checkpoint
from modeling_nanochat.training.trainers.reinforce import ReinforceConfig, ReinforceTrainer
from modeling_nanochat.training.whole_files import write_json

STORED = Path(__file__).with_suffix(".json")
QUESTIONS, SAMPLES, LONGEST = 200, 16, 144  # tokens of an answer, as in the study


def right_answers(study: Path, stage: str) -> list[int]:
    """Of each of the first practice questions, how many of the sampled answers are right."""
    model, tokenizer = load_checkpoint(str(study / "seed_1" / stage))
    with tempfile.TemporaryDirectory() as folder:
        config = ReinforceConfig(folder, max_completion_length=LONGEST, disable_tqdm=True, report_to="none")
        room = model.config.max_position_embeddings - LONGEST
        problems = read_problems(str(study / "data/rl/train.jsonl"), tokenizer, room)[:QUESTIONS]
        trainer = ReinforceTrainer(
            model, config, problems, rewards={"checker": find_reward("checker")}, summarize=summarize_passes,
            processing_class=tokenizer,
        )  # fmt: skip
        model.eval()
        asked = [problem for problem in problems for _ in range(SAMPLES)]
        passed = trainer.sample(asked, 0, range(len(asked)), len(asked)).passed
    return [sum(passed[start : start + SAMPLES]) for start in range(0, len(passed), SAMPLES)]


def main() -> None:
    if len(sys.argv) > 1:
        write_json(STORED, {stage: right_answers(Path(sys.argv[1]), stage) for stage in ("sft", "rl")})
    counts = json.loads(STORED.read_text(encoding="utf-8"))
    figure, (bars, lines) = plt.subplots(1, 2, figsize=(10, 3.5), width_ratios=(1.25, 1))
    places = range(SAMPLES + 1)
    for stage, offset, color, name in (("sft", -0.2, GREY, "before"), ("rl", 0.2, BLUE, "after reinforcement")):
        found = [counts[stage].count(place) for place in places]
        bars.bar([place + offset for place in places], found, width=0.4, color=color, label=name)
        share = sum(counts[stage]) / SAMPLES / len(counts[stage])
        print(f"{name}: {share:.3f} right; questions never right {found[0]}, always {found[SAMPLES]}, else", end=" ")
        print(sum(found[1:SAMPLES]), "of", sum(found))
    bars.set(xlabel=f"right answers of {SAMPLES}", ylabel="questions", xticks=range(0, SAMPLES + 1, 4))
    bars.set_title(f"{len(counts['sft'])} questions to practice on")
    bars.legend(loc="upper left")
    lines.axhline(0, color=GREY, linewidth=0.8)
    teaching = range(1, SAMPLES)
    lines.plot(
        teaching, [1 - place / SAMPLES for place in teaching], "o-", color=GREEN, markersize=4, label="a right one"
    )
    lines.plot(teaching, [-place / SAMPLES for place in teaching], "o-", color=RED, markersize=4, label="a wrong one")
    lines.plot([0, SAMPLES], [0, 0], "o", color=GREY, markersize=5, label="all alike: nothing")
    lines.set(xlabel=f"right answers of {SAMPLES}", ylabel="advantage", xticks=range(0, SAMPLES + 1, 4))
    lines.set_title("How much an answer is praised")
    lines.legend(fontsize=8)
    save(figure, "advantages")


if __name__ == "__main__":
    main()
