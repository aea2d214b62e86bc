"""CORE: DCLM's mean of centered accuracies over 22 tasks, for base models, as upstream computes it, and faster.

    examples => prompts with shots => tokens and spans (`prompts`) => scores (`eval/span_scores.py`) => decisions

A choice is right if the mean loss of its span is the lowest (the first of equals); a continuation, if every token is
the likeliest. A task's accuracy is centered so that guessing is 0. Guessing is taken from DCLM's first table (`core`),
and from its later correction of three tasks (`core_v2`).

The number is called `core` only if it is CORE: its 22 tasks, all of their examples, no control. Anything else has in
its name what it is, such as `core_of_18_tasks_cut_to_500`.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_nanochat.eval.core.bundle import LABELS, CoreTask, load_examples
from modeling_nanochat.eval.core.prompts import Question, make_questions
from modeling_nanochat.eval.intervals import Z_95, Accuracy, Interval
from modeling_nanochat.eval.models import context_length, hard_context
from modeling_nanochat.eval.span_scores import SpanScore, SpanScorer

# DCLM's later table: the share of commonsense_qa's commonest answer, and one in four for two tasks of four choices.
CORRECTED_BASELINES = {"commonsense_qa": 0.403, "agi_eval_lsat_ar": 0.25, "bigbench_language_identification": 0.25}
Dealer = Callable[[Callable[[Sequence[Question]], list], Sequence[Question]], list]


@dataclass(frozen=True)
class Answer:
    """What the model made of a question: mean loss of each span in nats, and of how many tokens it was certain."""

    scores: list[float]
    certain: list[int]
    correct: bool


@dataclass(frozen=True)
class TaskResult:
    """A task's answers, in the order of its examples, and facts about its prompts.

    Attributes:
        longest_prompt: in tokens, after cropping.
        beyond_context: prompts longer than the model was made for, cropped ones included.
        cropped: prompts that lost their beginning.
        shots: shown before each example.
        complete: whether these are all examples that the task has.
        seconds: that answering took.
    """

    task: CoreTask
    answers: list[Answer]
    longest_prompt: int
    beyond_context: int
    cropped: int
    shots: int
    complete: bool
    control: str | None
    seconds: float

    def accuracy(self, baseline: float | None = None) -> Accuracy:
        """Over the examples; the baseline is the task's own by default."""
        baseline = self.task.baseline if baseline is None else baseline
        return Accuracy.of([answer.correct for answer in self.answers], baseline)


def judge(question: Question, scores: Sequence[SpanScore]) -> Answer:
    """Whether the gold choice has the lowest loss (the first of equals), or every token was certain."""
    losses, certain = [score.loss for score in scores], [score.certain for score in scores]
    if question.gold is None:
        ((start, end),) = question.group.spans
        return Answer(losses, certain, certain[0] == end - start)
    return Answer(losses, certain, losses.index(min(losses)) == question.gold)


def do_it_alone(work: Callable[[Sequence[Question]], list], questions: Sequence[Question]) -> list:
    return work(questions)


def evaluate_task(
    scorer: SpanScorer,
    tokenizer: PreTrainedTokenizerBase,
    task: CoreTask,
    *,
    max_examples: int | None = None,
    max_length: int | None = None,
    control: str | None = None,
    deal: Dealer = do_it_alone,
    quiet: bool = False,
) -> TaskResult:
    """Answer a task's examples.

    Args:
        max_examples: cut the shuffled examples to so many.
        max_length: crop longer prompts on the left; by default at the hard end of the model's context, if it has one.
        control: one of `CONTROLS`.
        deal: called with (work, questions); gives the work's results for all of them, shared out however it likes.
        quiet: show no progress.
    """
    start = time.perf_counter()
    whole = load_examples(task)
    examples = whole[:max_examples]
    limits = [limit for limit in (max_length, hard_context(scorer.model)) if limit is not None]
    questions = make_questions(task, examples, tokenizer, min(limits, default=None), control)
    answers = deal(lambda some: answer(scorer, some, None if quiet else task.label), questions)
    context = context_length(scorer.model) or math.inf
    return TaskResult(
        task=task,
        answers=answers,
        longest_prompt=max(question.group.longest for question in questions),
        beyond_context=sum(question.cropped or question.group.longest > context for question in questions),
        cropped=sum(question.cropped for question in questions),
        shots=0 if control == "no_shots" else min(task.num_fewshot, len(examples) - 1),
        complete=len(examples) == len(whole),
        control=control,
        seconds=time.perf_counter() - start,
    )


def answer(scorer: SpanScorer, questions: Sequence[Question], label: str | None = None) -> list[Answer]:
    """The model's answers to the questions; `label` names the progress bar."""
    scores = scorer([question.group for question in questions], label)
    return [judge(question, found) for question, found in zip(questions, scores)]


def core_name(results: Sequence[TaskResult]) -> str:
    """`core`, or what it is instead."""
    parts = ["core"]
    if sorted(result.task.label for result in results) != sorted(LABELS):
        parts.append(f"of_{len(results)}_tasks")
    cut = [len(result.answers) for result in results if not result.complete]
    if cut:
        parts.append(f"cut_to_{max(cut)}")
    if results[0].control:
        parts.append(results[0].control)
    return "_".join(parts)


def summarize_core(results: Sequence[TaskResult]) -> dict[str, Interval | float]:
    """Centered accuracies by task, and their mean with its interval, as `core_name` calls it; `_v2` has the corrected
    baselines. The interval is that of independent examples: other weights of the same recipe differ by more."""
    name = core_name(results)
    figures: dict[str, Any] = {f"core/{result.task.label}": result.accuracy().centered for result in results}
    for version, corrected in ((name, {}), (f"{name}_v2", CORRECTED_BASELINES)):
        scores = [result.accuracy(corrected.get(result.task.label)) for result in results]
        errors = [score.stderr / (1 - score.baseline) for score in scores]
        mean = sum(score.centered for score in scores) / len(scores)
        stderr = math.sqrt(sum(error**2 for error in errors)) / len(errors)
        figures[version] = Interval(mean, mean - Z_95 * stderr, mean + Z_95 * stderr)
    return figures


def core_facts(results: Sequence[TaskResult]) -> dict[str, Any]:
    """What the number rests on, for the record: examples a second, missing tasks, prompts beyond the context."""
    examples = sum(len(result.answers) for result in results)
    return {
        "core_examples": examples,
        "core_examples_per_second": examples / max(sum(result.seconds for result in results), 1e-9),
        "core_missing_tasks": ", ".join(sorted(set(LABELS) - {result.task.label for result in results})) or "none",
        "core_prompts_beyond_context": sum(result.beyond_context for result in results),
        "core_prompts_cropped": sum(result.cropped for result in results),
    }
