"""HumanEval: 164 Python functions to complete from their signature and docstring, judged by running tests.

The program that is judged is built here and run in `eval/sandbox/`. A chat model may answer with the body alone, the
whole function, or either of them in a fenced block with talk around it; all of these are taken.
"""

import re
from typing import Any

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


def to_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """The prompt as the user's message and the reference solution as the assistant's."""
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": f"{row['prompt']}{row['canonical_solution']}"},
    ]


def program(row: dict[str, Any], completion: str) -> str:
    """The completion, what the prompt imports and defines before it, and the row's tests, as one program."""
    fenced = FENCE.search(completion)
    code = fenced.group(1) if fenced else completion
    if re.search(rf"^def {re.escape(row['entry_point'])}\b", code, re.MULTILINE):
        header = row["prompt"][: row["prompt"].rindex("def " + row["entry_point"])]
        code = header + code
    else:
        code = row["prompt"] + code
    return f"{code}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"
