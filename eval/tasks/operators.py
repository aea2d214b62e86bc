"""Missing operators: `7?5?3=32`, a puzzle that is solved by trying, with the calculator as the judge of a try.

A try writes operators into the puzzle and takes the target away, `7*5-3-32`: the calculator shows 0 for the right ones.
What is taught are solutions as a book prints them, the right try, at times after one that was wrong. To go on for as
long as it takes, and to try what is likely first, is left to reinforcement, which sees nothing but whether the answer
is right.

Any expression with the numbers in their order and the right value is an answer. `generate` yields rows {"messages",
"answer", "checker"} without end, the same for the same seed; the answer is the puzzle itself, which `is_correct` reads.
"""

import itertools
import random
import re
from collections.abc import Iterator
from typing import Any

from modeling_nanochat.tool_use import calculate

OPERATORS = "+-*"
NUMBERS = range(2, 21)
FINAL = re.compile(r"#### ([\d+*-]+)")
MAX_TRIES = 2


def generate(seed: int, numbers: int = 3, max_tries: int = MAX_TRIES) -> Iterator[dict[str, Any]]:
    """Puzzles of so many numbers, solved in 1 to `max_tries` tries, each number of tries as often."""
    rng = random.Random(seed)
    while True:
        given = [rng.choice(NUMBERS) for _ in range(numbers)]
        values = {expression: int(calculate(expression)) for expression in expressions(given)}
        target = rng.choice([value for value in values.values() if value >= 0])
        right = [expression for expression, value in values.items() if value == target]
        wrong = [expression for expression, value in values.items() if value != target]
        tries = [*rng.sample(wrong, min(rng.randrange(max_tries), len(wrong))), rng.choice(right)]
        yield problem("?".join(map(str, given)) + f"={target}", tries)


def expressions(numbers: list[int]) -> list[str]:
    """Every way to put operators between the numbers."""
    return [
        str(numbers[0]) + "".join(f"{operator}{number}" for operator, number in zip(chosen, numbers[1:]))
        for chosen in itertools.product(OPERATORS, repeat=len(numbers) - 1)
    ]


def problem(puzzle: str, tries: list[str]) -> dict[str, Any]:
    """The row of a puzzle and of tries that solve it, the last one right; without tries, of the answer alone."""
    target = puzzle.partition("=")[2]
    parts = []
    for expression in tries:
        check = f"{expression}-{target}"
        parts += [
            {"type": "python", "text": check},
            {"type": "python_output", "text": calculate(check)},
            {"type": "text", "text": "\n"},
        ]
    parts[-1] = {"type": "text", "text": f"\n#### {tries[-1]}"}
    messages = [{"role": "user", "content": f"Fill in: {puzzle}"}, {"role": "assistant", "content": parts}]
    return {"messages": messages, "answer": puzzle, "checker": "operators"}


def is_correct(completion: str, puzzle: str) -> bool:
    """Whether what follows the first `#### ` has the puzzle's numbers in their order, and its value."""
    found = FINAL.search(completion)
    left, _, target = puzzle.partition("=")
    if not found or re.split(r"[+*-]", found.group(1)) != left.split("?"):
        return False
    return calculate(found.group(1)) == target
