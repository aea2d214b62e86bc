"""The figures of a model as the Hub reads them: `model-index` in the head of its card, and `.eval_results/*.yaml`.

What was measured by `nanochat evaluate` goes before what the last stage measured itself. Files under `.eval_results`
stand for benchmarks only, data sets that are registered as such on the Hub (`BENCHMARKS`); anything else is in
`model-index`. https://huggingface.co/docs/hub/eval-results
"""

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from modeling_nanochat.recipes.publishing.history import Done, Measured
from modeling_nanochat.recipes.stages.tables import is_interval

FOLDER = ".eval_results"
TASK = "text-generation"
# Data set of a benchmark => its task there; values in percent, as its leaderboard has them.
BENCHMARKS = {"openai/gsm8k": "gsm8k"}
NAMES = {"core": "CORE", "chat_core": "ChatCORE", "bits_per_byte": "bits per byte"}
DATA_SETS = {
    "bits_per_byte": "held-out text",
    "core": "CORE (DCLM, 22 tasks)",
    "chat_core": "chat tasks",
    "spelling": "letters in words of held-out text",
    "human_eval": "openai/openai_humaneval",
}
OWN = {  # of a stage that nobody has evaluated yet
    "pretrain": ("validation_bits_per_byte",),
    "sft": ("validation_loss", "validation_bits_per_byte"),
    "dpo": ("validation_loss", "validation_rewards/accuracies"),
    "rl": ("pass@1_after", "pass@8_after"),
}


def model_index(stages: Sequence[Done], found: Measured | None) -> list[EvalResult]:
    """The figures, for `ModelCardData`."""
    if found is not None:
        figures = {name: value for name, value in found.figures.items() if is_headline(name, value)}
    elif stages:
        last = stages[-1]
        figures = {name: last.results[name] for name in OWN.get(last.name, ()) if name in last.results}
    else:
        return []
    return [result(name, value, stages, found) for name, value in figures.items()]


def is_headline(name: str, value: Any) -> bool:
    """Not the single tasks of CORE, nor what says how something was measured."""
    if name in ("core", "core_v2", "bits_per_byte", "chat_core"):
        return True
    return is_interval(value) and not name.startswith("core")


def result(name: str, value: Any, stages: Sequence[Done], found: Measured | None) -> EvalResult:
    dataset = dataset_of(name, stages, found)
    kind = "accuracy" if is_interval(value) and "core" not in name else name.split("@")[0].replace(" ", "_")
    return EvalResult(
        task_type=TASK,
        dataset_type=re.sub(r"[^\w./-]+", "-", dataset).strip("-"),
        dataset_name=dataset,
        metric_type="pass@k" if "pass@" in name else kind,
        metric_name=NAMES.get(name, name.replace("_", " ")),
        metric_value=round(float(value["mean"] if isinstance(value, dict) else value), 4),
    )


def dataset_of(name: str, stages: Sequence[Done], found: Measured | None) -> str:
    """What a figure was measured on: a data set of the Hub by its name, else words."""
    if name.startswith("pass@"):
        return problems(stages, found) or "held-out problems"
    if found is None:
        return DATA_SETS["bits_per_byte"] if stages[-1].name == "pretrain" else "held-out conversations"
    return DATA_SETS.get(name.split(" ")[0], name)


def problems(stages: Sequence[Done], found: Measured | None) -> str | None:
    """The data sets of RL's held-out problems, as the record of the data names them."""
    data = next((stage for stage in reversed(stages) if stage.name == "data"), None)
    parts = data.arguments.get("rl_validation", []) if data else []
    names = dict.fromkeys((part["name"] if isinstance(part, dict) else str(part)).split(":")[0] for part in parts)
    return ", ".join(names) or None


def benchmark_entries(stages: Sequence[Done], found: Measured | None, url: str | None) -> dict[str, list[Any]]:
    """What `.eval_results` gets, by file name: none for figures of other data, or of a part of it."""
    entries: dict[str, list[Any]] = {}
    dataset = problems(stages, found)
    if found is None or dataset not in BENCHMARKS or "pass@1" not in found.figures:
        return entries
    value, settings = found.figures["pass@1"], found.stage.arguments
    samples = "greedy" if settings.get("temperature") == 0 else "mean of several samples"
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id=BENCHMARKS[dataset],
        value=round(100 * value["mean"], 2),
        date=datetime.fromtimestamp(found.date, timezone.utc).date().isoformat(),
        source_url=url,
        source_name="Model card" if url else None,
        notes=f"pass@1, {samples}, zero-shot, with the model's own calculator",
    )
    entries[f"{BENCHMARKS[dataset]}.yaml"] = eval_result_entries_to_yaml([entry])
    return entries


def write_benchmarks(folder: Path, stages: Sequence[Done], found: Measured | None, url: str | None) -> None:
    """Write `.eval_results`, and remove what an earlier evaluation left there."""
    entries = benchmark_entries(stages, found, url)
    for old in folder.glob(f"{FOLDER}/*.yaml"):
        if old.name in {f"{task}.yaml" for task in BENCHMARKS.values()}:
            old.unlink()
    for name, content in entries.items():
        (folder / FOLDER).mkdir(exist_ok=True)
        (folder / FOLDER / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
