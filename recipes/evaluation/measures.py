"""The tasks of `nanochat evaluate`: each a function of a model that gives figures, and accuracies by name.

Everything measured here is shared out over the ranks by `over_ranks`; what measures knows none.
"""

import random
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_nanochat.eval.bits_per_byte import TextLoss, documents_loss
from modeling_nanochat.eval.core.bundle import CoreTask, load_examples
from modeling_nanochat.eval.core.prompts import gold_of, prompts_of
from modeling_nanochat.eval.core.scores import TaskResult, core_facts, summarize_core
from modeling_nanochat.eval.intervals import Accuracy, mean_with_interval, pass_at_k, summarize_passes
from modeling_nanochat.eval.multiple_choice import chat_core, guessing_accuracy, predict_letters
from modeling_nanochat.eval.sampling import Judge, sample_and_judge
from modeling_nanochat.eval.sandbox.judge import Sandbox
from modeling_nanochat.eval.tasks import humaneval, multiple_choice, spelling
from modeling_nanochat.eval.tasks.checkers import checker_of, is_right
from modeling_nanochat.eval.tasks.rows import Row, read_rows
from modeling_nanochat.recipes.evaluation.arguments import ChatTaskArguments, CoreArguments, EvaluateArguments
from modeling_nanochat.recipes.evaluation.core import run_core
from modeling_nanochat.training.data.documents import open_documents, stream_documents
from modeling_nanochat.training.ranks import over_ranks

Record = dict[str, Any]
SPELLING_DOCUMENTS = 200  # validation documents whose words are spelled
SAMPLES_SHOWN = 5  # of each task and model, in the record


@dataclass
class Subject:
    """A model being measured, and how."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    arguments: EvaluateArguments
    chat: ChatTaskArguments
    core: CoreArguments
    core_tasks: Sequence[CoreTask] = ()


@dataclass
class Outcome:
    """What a task found.

    Attributes:
        figures: numbers and intervals for the table.
        accuracies: by task, for `scores.json`.
        examples: one record for each example: what was asked, what came back, whether it was right.
        is_chat: the accuracies go into ChatCORE.
    """

    figures: Record
    accuracies: dict[str, Accuracy] = field(default_factory=dict)
    examples: list[Record] = field(default_factory=list)
    is_chat: bool = False


def measure(subject: Subject, name: str) -> Outcome:
    """All tasks of one model."""
    whole, chat = Outcome({}), {}
    progress = tqdm(
        subject.arguments.tasks, desc=name, leave=False, disable=None if PartialState().is_main_process else True
    )
    for task in progress:
        progress.set_postfix_str(task)
        outcome = TASKS[task](subject)
        whole.figures |= outcome.figures
        whole.accuracies |= outcome.accuracies
        whole.examples += [{"task": task, **record} for record in outcome.examples]
        chat |= outcome.accuracies if outcome.is_chat else {}
    if chat:
        whole.figures["chat_core"] = chat_core(list(chat.values()))
        whole.figures["chat_core_of"] = " + ".join(sorted(chat))
    return whole


# ---------------------------------------------------------------- text


def measure_bits_per_byte(subject: Subject) -> Outcome:
    """On whole documents, the same for every model."""
    documents = texts(subject.arguments)
    work = partial(documents_loss, subject.model, subject.tokenizer, batch_tokens=subject.arguments.batch_tokens)
    loss = TextLoss.total(over_ranks(work, documents, subject.model))
    return Outcome({"bits_per_byte": loss.bits_per_byte, "bytes_read": loss.bytes})


def texts(arguments: EvaluateArguments) -> list[str]:
    """The text file, or validation documents; as many as hold so many bytes."""
    if arguments.text:
        try:
            text = Path(arguments.text).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{arguments.text} is no UTF-8 text: {error}") from error
        if not text:
            raise ValueError(f"{arguments.text} is empty; expected text")
        return [text.encode()[: arguments.validation_bytes].decode(errors="ignore")]
    found, size = [], 0
    for document, _ in stream_documents(open_documents(f"{arguments.data}/pretrain"), "validation"):
        found.append(document)
        size += len(document.encode())
        if size >= arguments.validation_bytes:
            break
    if not found:
        raise ValueError(f"{arguments.data}/pretrain has no validation documents; expected some (or --text FILE)")
    return found


def measure_core(subject: Subject) -> Outcome:
    """DCLM's benchmark, or what the bundle has of it."""
    results = run_core(
        subject.model, subject.tokenizer, subject.core_tasks, subject.core, subject.arguments.batch_tokens
    )
    outcome = Outcome(summarize_core(results) | core_facts(results))
    outcome.accuracies = {f"core/{result.task.label}": result.accuracy() for result in results}
    if subject.arguments.log_samples:
        outcome.examples = [record for result in results for record in core_records(result, subject.core)]
    return outcome


def core_records(result: TaskResult, arguments: CoreArguments) -> list[Record]:
    """What was asked and decided, example by example."""
    examples = load_examples(result.task, arguments.core_examples)
    asked = prompts_of(result.task, examples, result.control)
    gold = gold_of(result.task, examples, result.control)
    return [
        {"label": result.task.label, "index": index, "prompts": prompts, "gold": right, **vars(answer)}
        for index, (prompts, right, answer) in enumerate(zip(asked, gold, result.answers))
    ]


# ---------------------------------------------------------------- questions with letters


def measure_multiple_choice(subject: Subject) -> Outcome:
    """Every source of questions by itself."""
    outcome = Outcome({}, is_chat=True)
    for source, rows in questions(subject.arguments, subject.chat).items():
        work = partial(predict_letters, subject.model, subject.tokenizer, batch_tokens=subject.arguments.batch_tokens)
        predictions = over_ranks(work, rows, subject.model)
        right = [prediction == row["answer"] for prediction, row in zip(predictions, rows)]
        outcome.figures[source] = mean_with_interval(right)
        outcome.accuracies[source] = Accuracy.of(right, guessing_accuracy(rows))
        outcome.examples += [
            {"source": source, "prompt": row["question"], "choices": row["choices"], "gold": row["answer"],
             "decision": prediction, "correct": prediction == row["answer"]}
            for prediction, row in zip(predictions, rows)
        ]  # fmt: skip
    return outcome


def questions(arguments: EvaluateArguments, chat: ChatTaskArguments) -> dict[str, list[Row]]:
    """The chosen questions of every source of multiple choice."""
    sources: dict[str, list[Row]] = {}
    file = f"{arguments.data}/eval/multiple_choice.jsonl"
    for row in read_rows(file, check_question, '{"question", "choices", "answer": index, "source"}'):
        sources.setdefault(row["source"], []).append(row)
    return {source: some(rows, chat.max_questions, arguments.seed) for source, rows in sorted(sources.items())}


def check_question(row: Row) -> Row:
    multiple_choice.to_messages(row)  # raises if it cannot be asked
    return {name: row[name] for name in ("question", "choices", "answer", "source")}


# ---------------------------------------------------------------- questions that are answered by writing


def measure_problems(subject: Subject) -> Outcome:
    """pass@k on the held-out problems of RL."""
    file = f"{subject.arguments.data}/rl/validation.jsonl"

    def take(row: Row) -> Row:
        checker_of(row)
        return {"messages": row["messages"], "answer": row["answer"], **row}

    rows = read_rows(file, take, '{"messages", "answer"}')
    rows = some(rows, subject.chat.max_problems, subject.arguments.seed)
    return passes("problems", answer(subject, rows, check, sampled=True), subject.chat.samples_drawn)


def measure_spelling(subject: Subject) -> Outcome:
    """Counting letters in words of the validation documents."""
    arguments = subject.arguments
    documents = stream_documents(open_documents(f"{arguments.data}/pretrain"), "validation")
    text = " ".join(document for document, _ in islice(documents, SPELLING_DOCUMENTS))
    words = sorted(set(re.findall(r"\b[a-z]{3,}\b", text)))
    rows = list(islice(spelling.counting_problems(words, arguments.seed), subject.chat.max_problems))
    return passes("spelling", answer(subject, rows, check, sampled=False), 1)


def measure_human_eval(subject: Subject) -> Outcome:
    """Functions written and run in the sandbox."""
    fields = ("prompt", "canonical_solution", "test", "entry_point")
    problems = read_rows(
        f"{subject.arguments.data}/eval/humaneval.jsonl", lambda row: {name: row[name] for name in fields}, str(fields)
    )
    rows = [{**row, "messages": humaneval.to_messages(row)} for row in problems[: subject.chat.max_problems]]
    with Sandbox(allow_weak=subject.chat.allow_weak_sandbox) as sandbox:

        def run_programs(answers: Sequence[tuple[Row, str]]) -> list[bool]:
            return [verdict.passed for verdict in humaneval.judge(sandbox, answers)]

        records = answer(subject, rows, run_programs, sampled=True)
    outcome = passes("human_eval", records, subject.chat.samples_drawn)
    outcome.figures["human_eval_isolation"] = sandbox.isolation
    return outcome


def answer(subject: Subject, rows: Sequence[Row], judge: Judge, sampled: bool) -> list[Record]:
    """Judged answers to the rows: several samples of each, or the likeliest one."""
    chat = subject.chat
    work = partial(
        sample_and_judge,
        subject.model,
        subject.tokenizer,
        judge=judge,
        num_samples=chat.samples_drawn if sampled else 1,
        temperature=chat.temperature if sampled else 0.0,
        max_new_tokens=chat.max_new_tokens,
        batch_rows=chat.batch_rows,
        seed=subject.arguments.seed,
    )
    return over_ranks(work, rows, subject.model)


def passes(name: str, records: list[Record], num_samples: int) -> Outcome:
    """pass@k by the name of the task, of a single sample under the name alone."""
    counts = [sum(record["correct"]) for record in records]
    figures = summarize_passes(counts, num_samples)
    if num_samples == 1:
        figures = {name: figures["pass@1"]}
    elif name != "problems":
        figures = {f"{name} {k}": interval for k, interval in figures.items()}
    accuracy = Accuracy.of([pass_at_k(num_samples, count, 1) for count in counts])
    return Outcome(figures, {name: accuracy}, records, is_chat=True)


def check(answers: Sequence[tuple[Row, str]]) -> list[bool]:
    return [is_right(text, row) for row, text in answers]


def some(rows: list[Row], count: int, seed: int) -> list[Row]:
    """At most `count` of the rows, always the same ones."""
    return rows if len(rows) <= count else random.Random(seed).sample(rows, count)


TASKS: dict[str, Callable[[Subject], Outcome]] = {
    "bits_per_byte": measure_bits_per_byte,
    "multiple_choice": measure_multiple_choice,
    "problems": measure_problems,
    "spelling": measure_spelling,
    "human_eval": measure_human_eval,
    "core": measure_core,
}


# What a task reads in the data folder.
NEEDED = {
    "bits_per_byte": "pretrain", "spelling": "pretrain", "multiple_choice": "eval/multiple_choice.jsonl",
    "problems": "rl/validation.jsonl", "human_eval": "eval/humaneval.jsonl",
}  # fmt: skip


def check_tasks(tasks: Sequence[str], data: str, needless: Collection[str] = ()) -> None:
    """`ValueError` for names that are no tasks, for none at all, and for data that is not there and not `needless`."""
    if not tasks or set(tasks) - set(TASKS):
        raise ValueError(f"expected tasks among {', '.join(TASKS)}; got {list(tasks)}")
    files = [Path(data, NEEDED[task]) for task in tasks if task in NEEDED and task not in needless]
    missing = [file for file in files if not file.exists()]
    if missing:
        raise ValueError(f"{missing[0]} does not exist; expected the data of `nanochat prepare_data`")
