"""Arithmetic problems with calculator calls: own short ones that a tiny model can learn, and reasoning-gym's.

`generate` makes questions of one or two steps in everyday wordings, with whole numbers below a hundred. What has to be
learnt is which operation a wording asks for, and to copy: numbers into the call, its output behind `#### `. The
calculator does the arithmetic, so a network of a million parameters can solve most of them after a million tokens of
practice, and reinforcement has something left to improve.

`in_the_head` is the same problem solved without the calculator, as people often write it. A small network cannot do
that, so a mixture that shows both ways gives reinforcement something to find out: that the calculator pays.

`generate_reasoning_gym` converts three of that package's data sets: the equations in a solution become calls if the
calculator agrees with them (the others stay text), and final answers lose the `.0` that some have.

Both yield rows {"messages": question and solution, "answer": "42"} without end, the same for the same seed.
"""

import math
import random
import re
from collections.abc import Iterator
from typing import Any

from modeling_nanochat.eval.tasks import gsm8k
from modeling_nanochat.tool_use import calculate

NAMES = (  # noqa: SIM905 (a list would take forty lines)
    "Tom Anna Ben Lucy Sam Emma Jack Mary Paul Sara Max Nina Leo Ella Adam Rosa Omar Mia Hugo Lena Ravi Zoe Ivan Ines "
    "Kofi Yuki Noah Ada Finn Amir"
).split()
THINGS = (  # noqa: SIM905
    "apples books coins cards stamps pens eggs cookies marbles shells stones balls flowers tickets stickers cups keys "
    "bottles toys hats"
).split()
BOXES = "boxes bags baskets shelves rooms drawers packs jars".split()  # noqa: SIM905

# Wordings of a + b, a - b and a * b: {a} and {b} are numbers, {e} is the expression itself.
PLAIN_QUESTIONS = (
    "What is {e}?",
    "What's {e}?",
    "How much is {e}?",
    "Calculate {e}.",
    "Compute {e}.",
    "Work out {e}.",
    "Please calculate {e}.",
    "Can you tell me what {e} is?",
    "{e} = ?",
    "{e}",
)
WORDED_QUESTIONS = {
    "+": (
        "What is {a} plus {b}?",
        "What is the sum of {a} and {b}?",
        "Add {a} and {b}.",
        "What do you get if you add {b} to {a}?",
        "How much is {a} and {b} together?",
        "What is {b} more than {a}?",
    ),
    "-": (
        "What is {a} minus {b}?",
        "What is the difference between {a} and {b}?",
        "Subtract {b} from {a}.",
        "What is left if you take {b} from {a}?",
        "What is {b} less than {a}?",
        "How much more is {a} than {b}?",
    ),
    "*": (
        "What is {a} times {b}?",
        "What is the product of {a} and {b}?",
        "Multiply {a} by {b}.",
        "What do you get if you multiply {a} and {b}?",
        "How much is {a} multiplied by {b}?",
        "What is {a} groups of {b}?",
    ),
}
STORIES = {
    "+": (
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have?",
        "{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have now?",
        "{name} has {a} {things} and {other} has {b}. How many {things} do they have together?",
        "{name} found {a} {things} on Monday and {b} on Tuesday. How many {things} did {name} find in all?",
        "There are {a} {things} on the table and {b} on the floor. How many {things} are there?",
        "{name} buys {a} {things} and then {b} more. How many {things} did {name} buy?",
    ),
    "-": (
        "{name} has {a} {things} and gives {b} to {other}. How many {things} are left?",
        "{name} had {a} {things} and lost {b}. How many {things} does {name} have now?",
        "{name} has {a} {things}. {other} takes {b} of them. How many {things} does {name} still have?",
        "There were {a} {things} in the box. {name} took out {b}. How many {things} remain?",
        "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have than {other}?",
        "{name} wants {a} {things} and has {b}. How many {things} does {name} still need?",
    ),
    "*": (
        "{name} has {a} {boxes} with {b} {things} each. How many {things} does {name} have?",
        "There are {a} {boxes}. Each has {b} {things}. How many {things} are there?",
        "{name} buys {b} {things} every day for {a} days. How many {things} does {name} buy?",
        "Each of {a} children has {b} {things}. How many {things} do they have together?",
        "{name} fills {a} {boxes} and puts {b} {things} in each. How many {things} is that?",
        "One of the {things} costs {b} dollars. How many dollars do {a} {things} cost?",
    ),
}
TWO_STEP_STORIES = {
    "{a} + {b} - {c}": (
        "{name} has {a} {things}, gets {b} more and gives {c} to {other}. How many {things} are left?",
        "{name} had {a} {things}. {name} found {b} and lost {c}. How many {things} does {name} have now?",
    ),
    "{a} + {b} + {c}": (
        "{name} has {a} {things}, {other} has {b} and I have {c}. How many {things} do we have together?",
        "{name} found {a} {things} on Monday, {b} on Tuesday and {c} on Friday. How many {things} is that in all?",
    ),
    "{a} - {b} - {c}": (
        "{name} has {a} {things}, gives {b} to {other} and loses {c}. How many {things} are left?",
        "There were {a} {things}. {name} took {b} and {other} took {c}. How many {things} remain?",
    ),
    "{a} * {b} + {c}": (
        "{name} has {a} {boxes} with {b} {things} each and {c} more. How many {things} does {name} have?",
        "There are {a} {boxes} with {b} {things} each. {name} brings {c} more {things}. How many are there now?",
    ),
    "{a} * {b} - {c}": (
        "{name} had {a} {boxes} with {b} {things} each and lost {c} {things}. How many {things} are left?",
        "There are {a} {boxes} with {b} {things} each. {other} takes {c} {things}. How many remain?",
    ),
}
OPENINGS = {"+": "Add: ", "-": "Subtract: ", "*": "Multiply: "}

REASONING_GYM = ("gsm_symbolic", "chain_sum", "basic_arithmetic")
NUMBER = r"[$€£]?\d[\d,]*(?:\.\d+)?"
UNIT = r"[A-Za-z]*(?:[ /][A-Za-z]+){0,4}?"
OPERATOR = r"(?:\s?[-+*/×÷]\s?| x )"
EQUATION = re.compile(rf"({NUMBER}{UNIT}(?:{OPERATOR}{NUMBER}{UNIT})+)\s?= ?([$€£]?)(\d[\d,]*(?:\.\d+)?)(?![\d%])")


def generate(seed: int) -> Iterator[dict[str, Any]]:
    """Rows {"messages", "answer"}: of five problems two are bare, two are stories of one step, one of two steps."""
    rng = random.Random(seed)
    while True:
        kind = rng.choice(("bare", "bare", "story", "story", "two steps"))
        if kind == "two steps":
            question, expression = two_step_story(rng)
            yield problem(question, "Step by step: ", expression)
            continue
        operation = rng.choice("+-*")
        a, b = numbers(operation, rng)
        expression = f"{a} {operation} {b}"
        if kind == "story":
            question = tell(rng.choice(STORIES[operation]), rng, a=a, b=b)
        else:
            wordings = PLAIN_QUESTIONS if rng.random() < 0.5 else WORDED_QUESTIONS[operation]
            question = rng.choice(wordings).format(a=a, b=b, e=expression)
        yield problem(question, OPENINGS[operation], expression)


def numbers(operation: str, rng: random.Random) -> tuple[int, int]:
    """Two operands; a difference is never negative, and a factor stays small as in a multiplication table."""
    if operation == "*":
        return rng.randint(2, 12), rng.randint(2, 20)
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    return (max(a, b), min(a, b)) if operation == "-" else (a, b)


def two_step_story(rng: random.Random) -> tuple[str, str]:
    """A question and its expression; nothing becomes negative on the way."""
    form = rng.choice(list(TWO_STEP_STORIES))
    while True:
        a, b = numbers("*" if "*" in form else "+", rng)
        c = rng.randint(1, 50)
        expression = form.format(a=a, b=b, c=c)
        if float(calculate(expression)) >= 0:
            return tell(rng.choice(TWO_STEP_STORIES[form]), rng, a=a, b=b, c=c), expression


def tell(story: str, rng: random.Random, **values: int) -> str:
    name, other = rng.sample(NAMES, 2)
    return story.format(name=name, other=other, things=rng.choice(THINGS), boxes=rng.choice(BOXES), **values)


def problem(question: str, opening: str, expression: str) -> dict[str, Any]:
    """The row of a question that one expression solves; its value is what the calculator says."""
    value = calculate(expression)
    answer = normalise_number(value)
    solution = [
        {"type": "text", "text": opening},
        {"type": "python", "text": expression},
        {"type": "python_output", "text": value},
        {"type": "text", "text": f"\n#### {answer}"},
    ]
    return row_of(question, solution, answer)


def in_the_head(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `generate` whose solution states the result as text, with no call of the calculator."""
    question, solution = (message["content"] for message in row["messages"])
    expression = next(part["text"] for part in solution if part["type"] == "python")
    text = f"{expression} = {row['answer']}\n#### {row['answer']}"
    return row_of(question, [{"type": "text", "text": text}], row["answer"])


def in_pairs(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `generate` with a second answer, `rejected`: the same in the head."""
    return {**row, "rejected": in_the_head(row)["messages"][-1:]}


def row_of(question: str, solution: list[dict[str, str]], answer: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]
    return {"messages": messages, "answer": answer}


def generate_reasoning_gym(seed: int, chunk: int = 500) -> Iterator[dict[str, Any]]:
    """Rows {"messages", "answer"} from reasoning-gym's data sets in turn; those it cannot express are left out."""
    import reasoning_gym

    while True:
        data_sets = [reasoning_gym.create_dataset(name, size=chunk, seed=seed) for name in REASONING_GYM]
        for index in range(chunk):
            for data_set in data_sets:
                row = convert_reasoning_gym(data_set[index])
                if row is not None:
                    yield row
        seed += 1_000_003  # the next chunk; far enough that neighbouring seeds of a run never meet


def convert_reasoning_gym(entry: dict[str, Any]) -> dict[str, Any] | None:
    """A row of reasoning-gym as ours, or None if its value is beyond the calculator or contradicts its solution."""
    answer, metadata = normalise_number(entry["answer"]), entry["metadata"]
    if "expression" in metadata:
        value = calculate(metadata["expression"])
        if value is None or normalise_number(value) != answer:
            return None
        return problem(entry["question"], "Calculate: ", metadata["expression"])
    steps, _, final = metadata["answer_cot"].rpartition("####")
    if normalise_number(final) != answer:
        return None
    solution = [*with_calculator_calls(steps.rstrip()), {"type": "text", "text": f"\n#### {answer}"}]
    return row_of(entry["question"], solution, answer)


def with_calculator_calls(text: str) -> list[dict[str, str]]:
    """Text -> parts in which `5 apples * $3 = $15` is followed, after its `= $`, by the call `5 * 3` and its output."""
    parts, position = [], 0
    for equation in EQUATION.finditer(text):
        terms = re.split(rf"({OPERATOR}(?=[$€£]?\d))", equation.group(1))
        signs = {"×": "*", "x": "*", "÷": "/"}
        cleaned = [
            signs.get(term.strip(), term.strip()) if index % 2 else re.search(r"\d[\d,.]*\d|\d", term).group()
            for index, term in enumerate(terms)
        ]
        expression = " ".join(cleaned).replace(",", "")
        value = calculate(expression)
        claimed = float(equation.group(3).replace(",", ""))
        if value is None or not math.isclose(float(value), claimed, rel_tol=1e-9):
            continue
        parts.append({"type": "text", "text": text[position : equation.start(3)]})
        parts.append({"type": "python", "text": expression})
        parts.append({"type": "python_output", "text": value})
        position = equation.start(3)
    return [*parts, {"type": "text", "text": text[position:]}]


def normalise_number(text: str) -> str | None:
    """A number as it stands behind `#### `: no commas, no `.0`. None if it is no number."""
    cleaned = gsm8k.extract_answer(f"#### {text.strip()}")
    if cleaned is None:
        return None
    whole, _, fraction = cleaned.partition(".")
    fraction = fraction.rstrip("0")
    return f"{whole}.{fraction}" if fraction else whole
