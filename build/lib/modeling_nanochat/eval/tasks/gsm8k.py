"""Grade-school word problems whose solutions call a calculator, and the check that every task with a number shares.

GSM8K marks a calculation as `<<48/2=24>>`; it becomes a call of the calculator and its output. The output is what our
calculator says, not what the data says (`24` for `24.00`): a network must train on what it will see. Of the 27,998
calculations of the real data set three are affected beyond the writing of a number: two have no value here and stay
text, one has another output (tests/eval/test_tasks.py lists them).

A final answer is what follows the first `#### `: it never takes a number from the middle of a solution. Answers are
compared as numbers (`$1,200.0` is `1200`).
"""

import re
from typing import Any

from modeling_nanochat.tool_use import calculate

ANSWER = re.compile(r"#### ([-$0-9.,]+)")
NUMBER = re.compile(r"(-?)(\d*)(?:\.(\d*))?(?<=\d)\.?")  # the last point may be that of a sentence
CALCULATION = re.compile(r"<<([^<>]*)>>")


def to_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """{"question", "answer"} of GSM8K -> the question and a solution in text, python and python_output parts."""
    parts = []

    def add_text(text: str) -> None:
        if parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += text
        elif text:
            parts.append({"type": "text", "text": text})

    for index, piece in enumerate(CALCULATION.split(row["answer"])):
        expression = piece.rpartition("=")[0] if index % 2 else ""
        value = calculate(expression)
        if index % 2 == 0:
            add_text(piece)
        elif value is not None:
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": value})
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": parts}]


def extract_answer(text: str) -> str | None:
    """The number after the first `#### `, as one writes it: no commas, no dollar sign, no zeros behind the point. None
    if there is none."""
    found = ANSWER.search(text)
    return read_number(found.group(1)) if found else None


def read_number(text: str) -> str | None:
    """`-$1,234.50` -> `-1234.5`; None for what is no number."""
    found = NUMBER.fullmatch(re.sub(r"[,$\s]", "", text))
    if not found:
        return None
    sign, whole, fraction = found.group(1), found.group(2).lstrip("0") or "0", (found.group(3) or "").rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return number if number == "0" else sign + number  # there is no negative zero


def is_correct(completion: str, reference: str) -> bool:
    """Whether a completion's final answer is the reference number.

    Raises:
        ValueError: the reference is no number.
    """
    expected = read_number(reference)
    if expected is None:
        raise ValueError(f"the reference answer is {reference!r}, expected a number")
    return extract_answer(completion) == expected
