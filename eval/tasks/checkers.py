"""Whether an answer is right, for every task by name: what reinforcement rewards, and evaluation counts.

A problem says which checker it wants in its field `checker`; without one, its `answer` is a number.
"""

import atexit
from collections.abc import Callable
from functools import cache

from modeling_nanochat.eval.sandbox.judge import Sandbox
from modeling_nanochat.eval.tasks import factors, gsm8k, humaneval, multiple_choice
from modeling_nanochat.eval.tasks.rows import Row

Checker = Callable[[str, Row], bool]  # (completion with its special tokens, problem)


def check_number(text: str, problem: Row) -> bool:
    return gsm8k.is_correct(text, problem["answer"])


def check_factor(text: str, problem: Row) -> bool:
    return factors.is_correct(text, problem["answer"])


def check_letter(text: str, problem: Row) -> bool:
    return multiple_choice.is_correct(text, problem["answer"])


def check_program(text: str, problem: Row) -> bool:
    """HumanEval's: runs the program, shut in; the problem has its `prompt` as `question`, `entry_point` and `test`."""
    row = {**problem, "prompt": problem["question"]}
    return humaneval.judge(sandbox(), [(row, text.split("<|assistant_end|>")[0])])[0].passed


@cache
def sandbox() -> Sandbox:
    """Of this process, until it ends."""
    opened = Sandbox(workers=1)
    atexit.register(opened.close)
    return opened


CHECKERS: dict[str, Checker] = {
    "number": check_number,
    "factor": check_factor,
    "letter": check_letter,
    "program": check_program,
}


def checker_of(problem: Row) -> Checker:
    """The checker that a problem asks for.

    Raises:
        ValueError: there is none of that name.
    """
    name = problem.get("checker", "number")
    if name not in CHECKERS:
        raise ValueError(f"checker is {name!r}, expected one of {', '.join(CHECKERS)}")
    return CHECKERS[name]


def is_right(text: str, problem: Row) -> bool:
    """As the problem's own checker has it."""
    return checker_of(problem)(text, problem)
