"""CORE's tasks as DCLM's evaluation bundle holds them: which they are, their examples, what guessing gives."""

import csv
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from modeling_nanochat.eval.tasks.rows import read_rows

SHUFFLE_SEED = 1337  # upstream's
LABELS = (
    "hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa", "commonsense_qa",
    "piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd", "winogrande", "bigbench_dyck_languages",
    "agi_eval_lsat_ar", "bigbench_cs_algorithms", "bigbench_operators", "bigbench_repeat_copy_logic", "squad", "coqa",
    "boolq", "bigbench_language_identification",
)  # fmt: skip
# What a line of each kind of task has, and what the errors call it.
FIELDS = {
    "multiple_choice": '{"query": "...", "choices": ["...", ...], "gold": index}',
    "schema": '{"context_options": ["...", ...], "continuation": "...", "gold": index}',
    "language_modeling": '{"context": "...", "continuation": "..."}',
}
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}  # among which `gold` is the right one
TEXTS = {"multiple_choice": ("query",), "schema": ("continuation",), "language_modeling": ("context", "continuation")}
Example = dict[str, Any]


@dataclass(frozen=True)
class CoreTask:
    """One row of the benchmark: `baseline` is the accuracy of guessing, from 0 to 1."""

    label: str
    file: Path
    kind: str
    num_fewshot: int
    delimiter: str
    baseline: float


def read_tasks(bundle: str | Path, labels: Sequence[str] | None = None) -> list[CoreTask]:
    """The tasks of an evaluation bundle (`core.yaml`, `eval_meta_data.csv`, `eval_data/`).

    Args:
        bundle: its folder.
        labels: which tasks; if None all that the bundle has the data of.

    Raises:
        ValueError: the bundle, a task or the data of one that was named is not there, or a table is not as expected.
    """
    bundle = Path(bundle)
    if not (bundle / "core.yaml").is_file():
        raise ValueError(f"{bundle} is no evaluation bundle (it has no core.yaml)")
    try:
        entries = yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        with open(bundle / "eval_meta_data.csv", encoding="utf-8") as table:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(table)}
        tasks = [
            CoreTask(
                label=entry["label"],
                file=bundle / "eval_data" / entry["dataset_uri"],
                kind=entry["icl_task_type"],
                num_fewshot=entry["num_fewshot"][0],
                delimiter=entry.get("continuation_delimiter", " "),
                baseline=baselines[entry["label"]],
            )
            for entry in entries
        ]
    except (yaml.YAMLError, KeyError, TypeError, IndexError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"the tables of {bundle} cannot be read ({error!r}); expected upstream's bundle") from error
    unknown = sorted(set(labels or ()) - {task.label for task in tasks})
    if unknown:
        raise ValueError(f"the bundle has no tasks {unknown}, only {[task.label for task in tasks]}")
    strange = [f"{task.label} ({task.kind!r})" for task in tasks if task.kind not in FIELDS]
    if strange:
        raise ValueError(f"{bundle / 'core.yaml'} has tasks of unknown kinds, {strange}; expected {list(FIELDS)}")
    wanted = [task for task in tasks if not labels or task.label in labels]
    found = [task for task in wanted if task.file.is_file()]
    if not found or (labels and len(found) < len(wanted)):
        missing = [task.label for task in wanted if not task.file.is_file()]
        raise ValueError(f"{bundle} lacks the data of {missing}; expected eval_data/ as upstream's bundle has it")
    return found


def load_examples(task: CoreTask, max_examples: int | None = None) -> list[Example]:
    """The examples shuffled, then cut; the cut decides from which examples shots are drawn, too.

    Raises:
        ValueError: a line is no example of the task's kind; the message shows file, line and reason.
    """
    examples = read_rows(task.file, partial(check_example, task.kind), FIELDS[task.kind])
    random.Random(SHUFFLE_SEED).shuffle(examples)
    return examples[:max_examples]


def check_example(kind: str, example: Example) -> Example:
    """The example itself; KeyError, TypeError or ValueError if it is none of this kind."""
    texts = [example[name] for name in TEXTS[kind]]
    if kind in OPTIONS:
        options, gold = example[OPTIONS[kind]], example["gold"]
        if not isinstance(options, list) or len(options) < 2:
            raise ValueError(f"{OPTIONS[kind]} is {options!r}, no list of two or more")
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(options):
            raise ValueError(f"gold is {gold!r}, no index of one of {len(options)}")
        texts += options
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a text is no string")
    if kind != "multiple_choice" and not example["continuation"].strip():
        raise ValueError("the continuation is empty")
    return example


def bundle_hash(tasks: Sequence[CoreTask]) -> str:
    """What identifies the tasks and their examples: of their tables' entries and data, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(repr((task.label, task.kind, task.num_fewshot, task.delimiter, task.baseline)).encode())
        digest.update(task.file.read_bytes())
    return digest.hexdigest()[:16]
