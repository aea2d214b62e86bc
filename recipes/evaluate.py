"""Measures finished models side by side and prints a table.

    nanochat evaluate --config recipes/configs/demo/evaluate.yaml
    nanochat evaluate --models out/d20/base openai-community/gpt2 --tasks bits_per_byte core
    torchrun --nproc_per_node 8 -m modeling_nanochat.recipes.evaluate --models out/d20/sft --tasks problems

Tasks: `bits_per_byte` on validation documents or any text; `core`, DCLM's benchmark of base models; and for chat models
`multiple_choice` by letters, each source by itself, `problems` with pass@k on RL's held-out problems, `spelling` (how
many r are in strawberry), `human_eval`, programs run in a sandbox. `chat_core` is the mean of the chat tasks that were
run, 0 for guessing, 1 for perfect. Every accuracy comes with its 95% interval; docs/evaluation.md says what each number
means. Several processes share the questions.

The output folder holds `stage.json` (settings, hashes of the weights and data, figures), `scores.json` (accuracies by
model and task) and, if wanted, every example with its decision.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.utils import logging

from modeling_nanochat.eval.core.bundle import LABELS, CoreTask
from modeling_nanochat.eval.intervals import Accuracy
from modeling_nanochat.eval.models import first_tokens
from modeling_nanochat.eval.sampling import generate_batch
from modeling_nanochat.eval.sandbox.judge import Sandbox
from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.evaluation.arguments import ChatTaskArguments, CoreArguments, EvaluateArguments
from modeling_nanochat.recipes.evaluation.core import core_tasks
from modeling_nanochat.recipes.evaluation.identity import identify
from modeling_nanochat.recipes.evaluation.measures import (
    SAMPLES_SHOWN,
    Record,
    Subject,
    check_tasks,
    measure,
    questions,
)
from modeling_nanochat.recipes.publishing.card import write_model_card
from modeling_nanochat.recipes.stages.folder import load_for_inference
from modeling_nanochat.recipes.stages.record import Stage, read_stage
from modeling_nanochat.recipes.stages.tables import text_table
from modeling_nanochat.training import devices
from modeling_nanochat.training.data.documents import is_local_path
from modeling_nanochat.training.whole_files import write_json, write_whole_file

BYTES_PER_TOKEN = 4  # of English, for the announcement
TRIAL_TOKENS = 8  # sampled to learn how fast that is


def main() -> None:
    arguments, chat, core = parse(EvaluateArguments, ChatTaskArguments, CoreArguments)
    check(arguments)
    tasks = core_tasks(core) if "core" in arguments.tasks else []
    output_dir = arguments.output_dir or beside(arguments.models[-1])
    inputs = [*arguments.models, arguments.data]
    identity = identify(arguments.models, tasks, arguments.text)
    stage = Stage("eval", output_dir, [arguments, chat, core, identity], inputs, arguments.rerun)
    if stage.is_done():
        return
    if "human_eval" in arguments.tasks:
        Sandbox(allow_weak=chat.allow_weak_sandbox).close()  # its self-test, before a model is loaded
    logging.disable_progress_bar()  # of reading weights, which would tear this one's
    if 0 < len(tasks) < len(LABELS):
        absent = sorted(set(LABELS) - {task.label for task in tasks})
        stage.say(f"CORE without {', '.join(absent)}: the mean of the others is no CORE, and is not called so")
    names = column_names(arguments.models)
    results: dict[str, Record] = {}
    scores: dict[str, dict[str, Accuracy]] = {}
    samples: list[Record] = []
    for name, path in zip(names, arguments.models):
        subject = Subject(*load_for_inference(path, arguments.dtype), arguments, chat, core, tasks)
        if not results:
            announce(stage, names, subject)
        outcome = measure(subject, name)
        results[name], scores[name] = outcome.figures, outcome.accuracies
        samples += [{"model": name, **record} for record in shown(outcome.examples)]
        if arguments.log_samples and PartialState().is_main_process:
            write_examples(Path(output_dir, "examples", f"{name.replace('/', '_')}.jsonl"), outcome.examples)
    stage.say("\n" + text_table(results))
    if PartialState().is_main_process:
        write_json(Path(arguments.output_json or Path(output_dir, "scores.json")), scores)
    stage.finish(results, samples=samples)
    if PartialState().is_main_process:
        write_cards(stage, arguments.models)


def write_cards(stage: Stage, models: Sequence[str]) -> None:
    """The cards of models that stages made get their new figures."""
    for model in models:
        if is_local_path(model) and read_stage(model) and (said := write_model_card(model)):
            stage.say(said)


def check(arguments: EvaluateArguments) -> None:
    """`ValueError` for tasks and models that do not exist, before anything is loaded."""
    texts = {"bits_per_byte"} if arguments.text else set()
    check_tasks(arguments.tasks, arguments.data, needless=texts)
    if not arguments.models:
        raise ValueError("there is no model to measure; expected at least one (--models FOLDER)")
    for model in arguments.models:
        if is_local_path(model) and not Path(model, "config.json").exists():
            raise ValueError(f"{model} holds no checkpoint (no config.json); expected the folder of a trained model")
    if arguments.text and not Path(arguments.text).is_file():
        raise ValueError(f"{arguments.text} does not exist; expected a text file (--text FILE)")


def beside(model: str) -> str:
    """The folder `eval` beside a model's folder, or in `out/` for a model on the Hub."""
    return str(Path(model).parent / "eval") if is_local_path(model) else f"out/eval/{model.replace('/', '_')}"


def column_names(models: Sequence[str]) -> list[str]:
    """The last part of each path, or whole paths where those are the same."""
    short = [Path(model).name for model in models]
    return short if len(set(short)) == len(short) else list(models)


def shown(examples: Sequence[Record]) -> list[Record]:
    """The first written answers of each task, for the report."""
    chosen: dict[str, list[Record]] = {}
    for record in examples:
        if "completions" in record:
            chosen.setdefault(record["task"], []).append(record)
    return [record for records in chosen.values() for record in records[:SAMPLES_SHOWN]]


def write_examples(file: Path, examples: Sequence[Record]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in examples)
    write_whole_file(file, lambda path: path.write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------- the announcement


def announce(stage: Stage, names: Sequence[str], first: Subject) -> None:
    """What is read, and sampled at most; the time rests on a trial batch sampled from the first model."""
    model, arguments, processes = first.model, first.arguments, PartialState().num_processes
    read, rows = tokens_to_read(first), rows_to_sample(first)
    start = time.perf_counter()
    if rows:
        trial = [first_tokens(first.tokenizer) or [0]] * min(rows, first.chat.batch_rows)
        generate_batch(model, first.tokenizer, trial, max_new_tokens=TRIAL_TOKENS, batch_rows=len(trial))
    seconds_per_token = (time.perf_counter() - start) / TRIAL_TOKENS
    forward_flops = 2 * sum(weight.numel() for weight in model.parameters())  # for each token, attention left out
    reading = devices.expected_seconds(read * forward_flops, model.device, getattr(torch, arguments.dtype), processes)
    sampling = -(-rows // first.chat.batch_rows) * first.chat.max_new_tokens * seconds_per_token / processes
    facts: dict[str, Any] = {
        "models": ", ".join(names),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "tasks": ", ".join(arguments.tasks),
        "tokens_read": len(names) * read,
        "tokens_sampled_at_most": len(names) * rows * first.chat.max_new_tokens,
        "flops": len(names) * (read + rows * first.chat.max_new_tokens) * forward_flops,
        "processes": processes,
        "activations": arguments.dtype,
        "seconds": len(names) * (reading + sampling),
    }
    stage.announce(**facts)
    if arguments.dtype != "float32":
        stage.say(f"in {arguments.dtype} about 0.6% of CORE's decisions differ from float32's (--dtype float32)")


def tokens_to_read(subject: Subject) -> int:
    """About how many tokens the tasks that read give a model, by the characters of their questions."""
    arguments = subject.arguments
    characters = arguments.validation_bytes if "bits_per_byte" in arguments.tasks else 0
    if "multiple_choice" in arguments.tasks:
        for rows in questions(arguments, subject.chat).values():
            characters += sum(len(row["question"]) + sum(map(len, row["choices"])) for row in rows)
    for task in subject.core_tasks:
        characters += core_characters(task, subject.core.core_examples)
    return characters // BYTES_PER_TOKEN


def core_characters(task: CoreTask, max_examples: int | None) -> int:
    """About how many characters a task's prompts have, shots included."""
    used = task.file.read_text(encoding="utf-8").splitlines()[:max_examples]
    return sum(map(len, used)) * (1 + task.num_fewshot)


def rows_to_sample(subject: Subject) -> int:
    """How many completions the tasks that sample draw from a model, at most."""
    drawn = subject.chat.samples_drawn
    each = {"problems": drawn, "spelling": 1, "human_eval": drawn}
    return subject.chat.max_problems * sum(each.get(task, 0) for task in subject.arguments.tasks)


if __name__ == "__main__":
    run(main)
