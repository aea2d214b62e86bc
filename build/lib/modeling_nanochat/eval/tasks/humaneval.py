"""HumanEval: 164 Python functions to complete from their signature and docstring, judged by running tests.

A chat model may answer with the body alone, the whole function, or either of them in a fenced block with talk around
it; all of these are taken. What is judged is put together here and run in `eval/sandbox/`: the completion on the
inside, the row's tests, which are trusted, on the outside.
"""

import re
from collections.abc import Sequence
from typing import Any

from modeling_nanochat.eval.sandbox.judge import Case, Sandbox, Verdict

FENCE = re.compile(r"```[\w+-]*[ \t]*\r?\n(.*?)(?:\n```|\Z)", re.DOTALL)


def to_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """The prompt as the user's message and the reference solution as the assistant's."""
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": f"{row['prompt']}{row['canonical_solution']}"},
    ]


def case(row: dict[str, Any], completion: str) -> Case:
    """The completion with what the prompt imports and defines before it, and the row's tests.

    Args:
        row: `{"prompt", "entry_point", "test"}`.
        completion: a model's answer. Of several fenced blocks, the first that defines the function counts.
    """
    name, prompt = row["entry_point"], row["prompt"]
    header = prompt[: prompt.rindex(f"def {name}")]
    defines = re.compile(rf"^def {re.escape(name)}\b", re.MULTILINE)
    codes = FENCE.findall(completion) or [completion]
    code = next(filter(defines.search, codes), codes[0])
    program = (header if defines.search(code) else prompt) + code
    return Case(program=program, function=name, tests=row["test"], setup=header)


def judge(sandbox: Sandbox, answers: Sequence[tuple[dict[str, Any], str]]) -> list[Verdict]:
    """Verdicts on (row, completion) pairs, in their order."""
    return sandbox.judge([case(row, completion) for row, completion in answers])
