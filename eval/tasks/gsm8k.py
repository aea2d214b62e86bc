"""Grade-school word problems whose solutions call a calculator, and the check that every task with a number shares.

GSM8K marks a calculation as `<<48/2=24>>`; it becomes a call of the calculator and its output. A final answer is what
follows the first `#### `, compared as text after dropping commas: strict (`18.0` is not `18`), but it never takes a
number from the middle of a solution.
"""

import re
from typing import Any

ANSWER = re.compile(r"#### (-?[0-9.,]+)")
CALCULATION = re.compile(r"<<([^<>]*)>>")


def to_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """{"question", "answer"} of GSM8K -> the question and a solution in text, python and python_output parts."""
    parts = []
    for index, piece in enumerate(CALCULATION.split(row["answer"])):
        if index % 2 == 0:
            parts.append({"type": "text", "text": piece})
        else:
            expression, _, result = piece.rpartition("=")
            parts.append({"type": "python", "text": expression or result})
            parts.append({"type": "python_output", "text": result if expression else ""})
    return [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": [part for part in parts if part["text"]]},
    ]


def extract_answer(text: str) -> str | None:
    """The number after the first `#### `, without commas; None if there is none."""
    found = ANSWER.search(text)
    return found.group(1).replace(",", "") if found else None


def is_correct(completion: str, reference: str) -> bool:
    """Whether a completion's final answer is the reference number, as text."""
    return extract_answer(completion) == reference.replace(",", "")
