"""Questions with lettered choices, as MMLU, ARC and BoolQ are asked.

The letter stands after its choice and directly after `=`, so that in the list and in the answer it is the same single
token: a small model then only has to copy it.
"""

from string import ascii_uppercase as LETTERS
from typing import Any


def to_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """{"question": str, "choices": list of str, "answer": index} -> the question and the letter of the answer.

    Raises:
        ValueError: if there are fewer than two or more than 26 choices, or the answer is none of them.
    """
    choices, answer = row["choices"], row["answer"]
    if not 2 <= len(choices) <= len(LETTERS) or not 0 <= answer < len(choices):
        raise ValueError(f"expected 2 to 26 choices and the index of one of them, got {choices!r} and {answer!r}")
    listed = "".join(f"- {choice}={letter}\n" for letter, choice in zip(LETTERS, choices))
    question = (
        f"Multiple Choice question: {row['question']}\n{listed}\nRespond only with the letter of the correct answer."
    )
    return [{"role": "user", "content": question}, {"role": "assistant", "content": LETTERS[answer]}]


def is_correct(completion: str, answer: int) -> bool:
    """Whether a completion with its special tokens is the letter of the answer, and nothing else."""
    return completion.partition("<|assistant_end|>")[0].strip() == LETTERS[answer]
