"""Measures finished models side by side and prints a table.

    nanochat evaluate --config recipes/configs/demo/evaluate.yaml
    torchrun --nproc_per_node 8 -m modeling_nanochat.recipes.evaluate --models out/d20/sft --tasks core problems

Tasks: `bits_per_byte` on the validation shard; `multiple_choice` by letters, each source by itself; `problems` with
pass@k on RL's held-out problems; `spelling` (how many r are in strawberry); `human_eval`, programs run in a sandbox;
`core`, DCLM's benchmark of base models. Several processes share the questions and add up the answers. Every accuracy
comes with its 95% interval. `chat_core` is the mean of the chat tasks that were run, 0 for guessing, 1 for perfect.
"""

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_nanochat.eval.bits_per_byte import evaluate_bits_per_byte
from modeling_nanochat.eval.core import evaluate_task, read_tasks, summarize_core
from modeling_nanochat.eval.intervals import mean_with_interval, sample_and_judge, summarize_passes
from modeling_nanochat.eval.multiple_choice import chat_core, guessing_accuracy, predict_letters
from modeling_nanochat.eval.sampling import generate_batch
from modeling_nanochat.eval.sandbox.outside import run_program
from modeling_nanochat.eval.tasks import gsm8k, humaneval, spelling
from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.stages.folder import load_for_inference
from modeling_nanochat.recipes.stages.record import Stage
from modeling_nanochat.recipes.stages.tables import text_table
from modeling_nanochat.tokenization_nanochat_gpt import BOS, special_token_ids, token_bytes
from modeling_nanochat.training import devices, scaling
from modeling_nanochat.training.data.documents import open_documents, stream_documents
from modeling_nanochat.training.data.packed_rows import PackedRows

Figures = dict[str, float]
Record = dict[str, Any]
VALIDATION_ROWS_AT_ONCE = 8
SPELLING_DOCUMENTS = 200  # validation documents whose words are spelled
CHARACTERS_PER_TOKEN = 4  # of English, for the announcement
TRIAL_TOKENS = 8  # sampled to learn how fast that is
SAMPLES_SHOWN = 5  # of each task and model, in the record


@dataclass
class EvaluateArguments:
    """What to measure, and of which models."""

    models: list[str] = field(
        default_factory=lambda: ["out/demo/base", "out/demo/sft", "out/demo/rl"],
        metadata={"help": "Folders or Hub names of the models; one column each."},
    )
    tasks: list[str] = field(
        default_factory=lambda: ["bits_per_byte", "multiple_choice", "problems"],
        metadata={"help": "bits_per_byte, multiple_choice, problems, spelling, human_eval, core."},
    )
    data: str = field(default="out/demo/data", metadata={"help": "Folder that `nanochat prepare_data` has written."})
    output_dir: str = field(default="out/demo/eval", metadata={"help": "Folder of the record."})
    rerun: bool = field(default=False, metadata={"help": "Measure again what has been measured."})
    validation_tokens: int = field(default=200_000, metadata={"help": "Tokens that bits per byte is measured on."})
    max_questions: int = field(default=300, metadata={"help": "Questions of each source of multiple choice, at most."})
    max_problems: int = field(default=200, metadata={"help": "Problems, words and programs, at most."})
    num_samples: int = field(default=8, metadata={"help": "Samples of each of `problems`; the others get one."})
    temperature: float = field(default=1.0, metadata={"help": "Of the samples of `problems`; the others are greedy."})
    max_new_tokens: int = field(default=256, metadata={"help": "Length at which an answer is cut off."})
    batch_rows: int = field(default=128, metadata={"help": "Rows sampled at once."})
    batch_tokens: int = field(default=16384, metadata={"help": "Tokens read at once, padding included."})
    core_bundle: str = field(
        default="out/eval_bundle", metadata={"help": "Folder of upstream's eval_bundle.zip, unpacked, for `core`."}
    )
    core_tasks: list[str] | None = field(default=None, metadata={"help": "Labels of CORE's tasks; all 22 by default."})
    core_examples: int | None = field(
        default=None, metadata={"help": "Examples of each of CORE's tasks; all if unset."}
    )
    core_max_length: int | None = field(
        default=None, metadata={"help": "Crop CORE's prompts on the left to so many tokens; not at all if unset."}
    )
    seed: int = field(default=0, metadata={"help": "Of the sampling, and of the choice of questions."})


@dataclass
class Subject:
    """A model being measured. `share` deals rows to this process, `collect` brings all processes' records together."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    arguments: EvaluateArguments

    def share(self, rows: Sequence[Any]) -> Sequence[Any]:
        state = PartialState()
        return rows[state.process_index :: state.num_processes]

    def collect(self, records: list[Any]) -> list[Any]:
        return gather_object(records) if PartialState().num_processes > 1 else records


def main() -> None:
    (arguments,) = parse(EvaluateArguments)
    check(arguments)
    stage = Stage("eval", arguments.output_dir, [arguments], [*arguments.models, arguments.data], arguments.rerun)
    if stage.is_done():
        return
    logging.disable_progress_bar()  # of reading weights, which would tear this one's
    names = column_names(arguments.models)
    results: dict[str, Figures] = {}
    samples: list[Record] = []
    for name, path in zip(names, arguments.models):
        subject = Subject(*load_for_inference(path), arguments)
        if not results:
            announce(stage, names, subject)
        results[name], shown = measure(subject, name)
        samples += [{"model": name, **record} for record in shown]
    stage.say("\n" + text_table(results))
    stage.finish(results, samples=samples)


def check(arguments: EvaluateArguments) -> None:
    """`ValueError` for tasks that do not exist or lack their data, before a model is loaded."""
    unknown = sorted(set(arguments.tasks) - set(TASKS))
    if unknown or not arguments.tasks or not arguments.models:
        raise ValueError(
            f"expected at least one model and tasks among {', '.join(TASKS)}; got models {arguments.models} and tasks "
            f"{arguments.tasks}"
        )
    if "core" in arguments.tasks:
        read_tasks(arguments.core_bundle, arguments.core_tasks)


def column_names(models: Sequence[str]) -> list[str]:
    """The last part of each path, or whole paths where those are the same."""
    short = [Path(model).name for model in models]
    return short if len(set(short)) == len(short) else list(models)


def announce(stage: Stage, names: Sequence[str], first: Subject) -> None:
    """What is read, and sampled at most; the time rests on a trial batch sampled from the first model."""
    model, tokenizer, arguments = first.model, first.tokenizer, first.arguments
    read = tokens_to_read(arguments)
    rows = rows_to_sample(arguments)
    trial = [[special_token_ids(tokenizer)[BOS]]] * min(rows, arguments.batch_rows)
    start = time.perf_counter()
    if rows:
        generate_batch(model, tokenizer, trial, max_new_tokens=TRIAL_TOKENS, batch_rows=len(trial))
    seconds_per_token = (time.perf_counter() - start) / TRIAL_TOKENS
    forward_flops = scaling.flops_per_token(model.config) / 3  # a third of a training step's
    processes = PartialState().num_processes
    reading = devices.expected_seconds(read * forward_flops, model.device, model.dtype, processes)
    sampling = -(-rows // arguments.batch_rows) * arguments.max_new_tokens * seconds_per_token / processes
    stage.announce(
        models=", ".join(names),
        parameters=scaling.count_parameters(model.config).total,
        tasks=", ".join(arguments.tasks),
        tokens_read=len(names) * read,
        tokens_sampled_at_most=len(names) * rows * arguments.max_new_tokens,
        flops=len(names) * (read + rows * arguments.max_new_tokens) * forward_flops,
        processes=processes,
        seconds=len(names) * (reading + sampling),
    )


def tokens_to_read(arguments: EvaluateArguments) -> int:
    """About how many tokens the tasks that read give a model, by the characters of their questions."""
    tokens = arguments.validation_tokens if "bits_per_byte" in arguments.tasks else 0
    if "multiple_choice" in arguments.tasks:
        for rows in questions(arguments).values():
            tokens += sum(len(row["question"]) + sum(map(len, row["choices"])) for row in rows) // CHARACTERS_PER_TOKEN
    if "core" in arguments.tasks:
        for task in read_tasks(arguments.core_bundle, arguments.core_tasks):
            lines = task.file.read_text(encoding="utf-8").splitlines()
            used = lines[: arguments.core_examples]
            tokens += sum(map(len, used)) * (1 + task.num_fewshot) // CHARACTERS_PER_TOKEN
    return tokens


def rows_to_sample(arguments: EvaluateArguments) -> int:
    """How many completions the tasks that sample draw from a model, at most."""
    each = {"problems": arguments.num_samples, "spelling": 1, "human_eval": 1}
    return arguments.max_problems * sum(each.get(task, 0) for task in arguments.tasks)


def measure(subject: Subject, name: str) -> tuple[Figures, list[Record]]:
    """All figures of one model, and some samples of what it answered."""
    figures: Figures = {}
    samples: list[Record] = []
    accuracies: Figures = {}
    baselines: Figures = {}
    progress = tqdm(subject.arguments.tasks, desc=name, disable=not PartialState().is_main_process)
    for task in progress:
        progress.set_postfix_str(task)
        outcome = TASKS[task](subject)
        figures |= outcome.figures
        samples += [{"task": task, **record} for record in outcome.samples[:SAMPLES_SHOWN]]
        accuracies |= outcome.accuracies
        baselines |= outcome.baselines
    if accuracies:
        figures["chat_core"] = chat_core(accuracies, baselines)
    return figures, samples


# ---------------------------------------------------------------- the tasks


@dataclass
class Outcome:
    """What a task found: figures for the table, and the accuracies that go into ChatCORE with what guessing gives."""

    figures: Figures
    samples: list[Record] = field(default_factory=list)
    accuracies: Figures = field(default_factory=dict)
    baselines: Figures = field(default_factory=dict)


def measure_bits_per_byte(subject: Subject) -> Outcome:
    """On validation documents, packed as for training."""
    arguments, state = subject.arguments, PartialState()
    length = subject.model.config.max_position_embeddings
    source = open_documents(f"{arguments.data}/pretrain")
    packed = PackedRows(
        source, subject.tokenizer, length + 1, split="validation",
        stream=state.process_index, num_streams=state.num_processes,
    )  # fmt: skip
    count = max(1, arguments.validation_tokens // (length * state.num_processes))
    rows = [torch.from_numpy(row).long() for row in islice(packed, count)]
    batches = (
        {"input_ids": batch[:, :-1], "shift_labels": batch[:, 1:]}  # (B, T) each
        for batch in (
            torch.stack(rows[start : start + VALIDATION_ROWS_AT_ONCE])
            for start in range(0, len(rows), VALIDATION_ROWS_AT_ONCE)
        )
    )
    value = evaluate_bits_per_byte(subject.model, batches, token_bytes(subject.tokenizer))
    return Outcome({"bits_per_byte": value})


def measure_multiple_choice(subject: Subject) -> Outcome:
    """Every source of questions by itself."""
    arguments = subject.arguments
    outcome = Outcome({})
    for source, rows in questions(arguments).items():
        own = subject.share(rows)
        predictions = predict_letters(subject.model, subject.tokenizer, own, arguments.batch_tokens)
        right = subject.collect([prediction == row["answer"] for prediction, row in zip(predictions, own)])
        outcome.figures |= accuracy_figures(source, right)
        outcome.accuracies[source] = outcome.figures[source]
        outcome.baselines[source] = guessing_accuracy(rows)
    return outcome


def questions(arguments: EvaluateArguments) -> dict[str, list[Record]]:
    """The chosen questions of every source of multiple choice."""
    sources: dict[str, list[Record]] = {}
    for row in read_rows(f"{arguments.data}/eval/multiple_choice.jsonl"):
        sources.setdefault(row["source"], []).append(row)
    return {source: some(rows, arguments.max_questions, arguments.seed) for source, rows in sorted(sources.items())}


def measure_problems(subject: Subject) -> Outcome:
    """pass@k on the held-out problems of RL."""
    arguments = subject.arguments
    rows = some(read_rows(f"{arguments.data}/rl/validation.jsonl"), arguments.max_problems, arguments.seed)
    records = answer(subject, rows, check_number, num_samples=arguments.num_samples, temperature=arguments.temperature)
    figures = summarize_passes([sum(record["correct"]) for record in records], arguments.num_samples)
    return Outcome(figures, records, {"problems": figures["pass@1"]})


def measure_spelling(subject: Subject) -> Outcome:
    """Counting letters in words of the validation documents."""
    arguments = subject.arguments
    documents = stream_documents(open_documents(f"{arguments.data}/pretrain"), "validation")
    text = " ".join(document for document, _ in islice(documents, SPELLING_DOCUMENTS))
    words = sorted(set(re.findall(r"\b[a-z]{3,}\b", text)))
    rows = list(islice(spelling.counting_problems(words, arguments.seed), arguments.max_problems))
    records = answer(subject, rows, check_number)
    return one_answer_each("spelling", records)


def measure_human_eval(subject: Subject) -> Outcome:
    """Functions written and run in the sandbox."""
    arguments = subject.arguments
    problems = read_rows(f"{arguments.data}/eval/humaneval.jsonl")[: arguments.max_problems]
    rows = [{**row, "messages": humaneval.to_messages(row)} for row in problems]
    records = answer(subject, rows, lambda text, row: run_program(humaneval.program(row, text)).passed)
    return one_answer_each("human_eval", records)


def measure_core(subject: Subject) -> Outcome:
    """DCLM's benchmark, or the chosen tasks of it."""
    arguments = subject.arguments
    results = []
    for task in read_tasks(arguments.core_bundle, arguments.core_tasks):
        result = evaluate_task(
            subject.model,
            subject.tokenizer,
            task,
            max_examples=arguments.core_examples,
            max_length=arguments.core_max_length,
            batch_tokens=arguments.batch_tokens,
        )
        if result.beyond_context or result.shots < task.num_fewshot:
            tqdm.write(
                f"{task.label}: {result.beyond_context} of {len(result.answers)} prompts are beyond the context (the "
                f"longest has {result.longest_prompt} tokens), {result.shots} of {task.num_fewshot} shots were there"
            )
        results.append(result)
    return Outcome(summarize_core(results))


def answer(
    subject: Subject, rows: Sequence[Record], is_correct: Callable[[str, Record], bool], **sampling: Any
) -> list[Record]:
    """All processes' judged answers to the rows; greedy and one of each unless `sampling` says otherwise."""
    arguments = subject.arguments
    options = {
        "num_samples": 1, "temperature": 0.0, "max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed,
        "batch_rows": arguments.batch_rows, **sampling,
    }  # fmt: skip
    return subject.collect(
        sample_and_judge(subject.model, subject.tokenizer, subject.share(rows), is_correct, **options)
    )


def check_number(text: str, row: Record) -> bool:
    return gsm8k.is_correct(text, row["answer"])


def one_answer_each(name: str, records: list[Record]) -> Outcome:
    figures = accuracy_figures(name, [record["correct"][0] for record in records])
    return Outcome(figures, records, {name: figures[name]})


def accuracy_figures(name: str, right: Sequence[bool]) -> Figures:
    interval = mean_with_interval(right)
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


TASKS: dict[str, Callable[[Subject], Outcome]] = {
    "bits_per_byte": measure_bits_per_byte,
    "multiple_choice": measure_multiple_choice,
    "problems": measure_problems,
    "spelling": measure_spelling,
    "human_eval": measure_human_eval,
    "core": measure_core,
}


# ---------------------------------------------------------------- reading


def read_rows(file: str) -> list[Record]:
    """Rows of a JSON lines file; `ValueError` if it is missing or empty."""
    if not Path(file).is_file():
        raise ValueError(f"{file} does not exist; expected the data of `nanochat prepare_data` (--data FOLDER)")
    with open(file, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{file} is empty; expected one row for each question")
    return rows


def some(rows: list[Record], count: int, seed: int) -> list[Record]:
    """At most `count` of the rows, always the same ones."""
    return rows if len(rows) <= count else random.Random(seed).sample(rows, count)


if __name__ == "__main__":
    run(main)
