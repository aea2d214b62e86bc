"""Tasks: what is asked, what is taught, and that the checks accept right answers and no others."""

import itertools
import json
import random

import pytest

from modeling_nanochat.eval.tasks import arithmetic, gsm8k, humaneval, multiple_choice, spelling
from modeling_nanochat.tokenization_nanochat_gpt import message_text
from modeling_nanochat.tool_use import calculate

ENTRY = {
    "question": "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total?",
    "answer": "It takes 2/2=<<2/2=1>>1 bolt of white fiber\nSo the total is 2+1=<<2+1=3>>3 bolts\n#### 3",
}


def parts(row) -> list[tuple[str, str]]:
    return [(part["type"], part["text"]) for part in row["messages"][1]["content"]]


def test_gsm8k_calculations_become_calculator_calls():
    question, solution = gsm8k.to_messages(ENTRY)
    assert question == {"role": "user", "content": ENTRY["question"]}
    assert [(part["type"], part["text"]) for part in solution["content"]] == [
        ("text", "It takes 2/2="),
        ("python", "2/2"),
        ("python_output", "1"),
        ("text", "1 bolt of white fiber\nSo the total is 2+1="),
        ("python", "2+1"),
        ("python_output", "3"),
        ("text", "3 bolts\n#### 3"),
    ]


@pytest.mark.parametrize(
    ("calculation", "output"),
    [  # every way in which the 27,998 calculations of the real data set differ from the calculator
        ("48/2=24", "24"),
        ("2*15=30.00", "30"),  # 822 outputs are written otherwise: zeros behind the point,
        (".6*.5=.3", "0.3"),  # no zero before it,
        ("1000*60=60,000", "60000"),  # or commas
        ("3/4=3/4", "0.75"),  # one is no number
        ("560//10=56", None),  # two expressions have no value here: they stay text
        ("180//3=60", None),
    ],
)
def test_gsm8k_outputs_are_those_of_inference(calculation, output):
    _, solution = gsm8k.to_messages({"question": "?", "answer": f"So <<{calculation}>>it is.\n#### 5"})
    made = [(part["type"], part["text"]) for part in solution["content"]]
    if output is None:
        assert made == [("text", "So it is.\n#### 5")]
    else:
        expression = calculation.rpartition("=")[0]
        assert made == [
            ("text", "So "), ("python", expression), ("python_output", output), ("text", "it is.\n#### 5"),
        ]  # fmt: skip
        assert calculate(expression) == output


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\n#### 42", "42"),
        ("#### 24.0", "24"),
        ("#### $1,200.50.", "1200.5"),
        ("#### -.5", "-0.5"),
        ("#### 007", "7"),
        ("#### -0", "0"),
        ("#### 1.2.3", None),
        ("#### .", None),
        ("#### -1,234.5 dollars", "-1234.5"),
        ("#### 7\n#### 8", "7"),
        ("the answer is 42", None),
        ("####42", None),
        ("#### forty", None),
    ],
)
def test_final_answer_is_the_first_marked_number(text, answer):
    assert gsm8k.extract_answer(text) == answer
    assert gsm8k.is_correct(text, answer or "42") == (answer is not None)
    assert not gsm8k.is_correct(text, "43")


def test_reference_may_have_commas():
    assert gsm8k.is_correct("#### 1,200", "1200") and gsm8k.is_correct("#### 1200", "$1,200.00")
    with pytest.raises(ValueError, match="reference answer is 'many', expected a number"):
        gsm8k.is_correct("#### 1", "many")


def test_multiple_choice_is_rendered_exactly():
    row = {"question": "2 + 2?", "choices": ["three", "four", "five"], "answer": 1}
    assert multiple_choice.to_messages(row) == [
        {
            "role": "user",
            "content": "Multiple Choice question: 2 + 2?\n- three=A\n- four=B\n- five=C\n\n"
            "Respond only with the letter of the correct answer.",
        },
        {"role": "assistant", "content": "B"},
    ]
    with pytest.raises(ValueError, match="index of one of them"):
        multiple_choice.to_messages({**row, "answer": 3})


@pytest.mark.parametrize("generator", [arithmetic.generate, arithmetic.generate_reasoning_gym])
def test_arithmetic_is_deterministic_and_right(generator):
    rows = list(itertools.islice(generator(7), 400))
    assert rows == list(itertools.islice(generator(7), 400))
    assert rows != list(itertools.islice(generator(8), 400))
    for row in rows:
        solution = parts(row)
        assert gsm8k.is_correct(message_text(row["messages"][1]["content"]), row["answer"])
        assert solution[-1][1].endswith(f"\n#### {row['answer']}")
        for (kind, text), following in itertools.pairwise(solution):
            if kind == "python":
                assert following == ("python_output", calculate(text))


def test_own_problems_are_varied_small_and_solved_in_one_call():
    rows = list(itertools.islice(arithmetic.generate(0), 2000))
    assert len({row["messages"][0]["content"] for row in rows}) > 1850
    assert all([kind for kind, _ in parts(row)] == ["text", "python", "python_output", "text"] for row in rows)
    assert all(row["answer"].isdigit() and len(row["answer"]) <= 3 for row in rows)
    openings = {parts(row)[0][1] for row in rows}
    assert openings == {"Add: ", "Subtract: ", "Multiply: ", "Step by step: "}
    for row in rows:  # a question holds every number of its expression
        question = row["messages"][0]["content"]
        assert all(number in question for number in parts(row)[1][1].split()[::2])


def test_most_reasoning_gym_solutions_gain_calls():
    rows = list(itertools.islice(arithmetic.generate_reasoning_gym(0), 900))
    stories = [row for row in rows if "Give the result" in row["messages"][0]["content"]]
    assert 250 < len(stories) < 350
    assert sum(any(kind == "python" for kind, _ in parts(row)) for row in stories) > 0.94 * len(stories)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So 35 × 3 = 105 kiwi", [("So 35 × 3 = ", "35 * 3", "105"), "105 kiwi"]),
        ("5 balls * £14/ball = £70.", [("5 balls * £14/ball = £", "5 * 14", "70"), "70."]),
        ("1,000 x $2 = $2,000", [("1,000 x $2 = $", "1000 * 2", "2000"), "2,000"]),
        ("12 ÷ 1 = 12 times", [("12 ÷ 1 = ", "12 / 1", "12"), "12 times"]),
        ("8 kg * 2 - 3 = 13 kg/goat", [("8 kg * 2 - 3 = ", "8 * 2 - 3", "13"), "13 kg/goat"]),
        ("5 balls * £15/ball = £70.", ["5 balls * £15/ball = £70."]),
        ("2x = 54 and 1/4 = 25%", ["2x = 54 and 1/4 = 25%"]),
    ],
)
def test_equations_become_calls_only_where_the_calculator_agrees(text, expected):
    flat = []
    for piece in expected:
        if isinstance(piece, str):
            flat.append(("text", piece))
        else:
            flat += zip(("text", "python", "python_output"), piece)
    assert [(part["type"], part["text"]) for part in arithmetic.with_calculator_calls(text)] == flat


def test_numbers_are_normalised():
    assert [arithmetic.normalise_number(text) for text in ("168.0", " 2,142.50", "100", "-4", "0.0", "x")] == [
        "168", "2142.5", "100", "-4", "0", None,
    ]  # fmt: skip


def test_spelling_counts_right_and_agrees_with_the_calculator():
    words = ["strawberry", "banana", "tea", "don't", "a", "x" * 30]
    rows = list(itertools.islice(spelling.counting_problems(words, 3), 200))
    for row in rows:
        solution = dict(parts(row))
        assert calculate(solution["python"]) == solution["python_output"] == row["answer"]
        assert gsm8k.is_correct(message_text(row["messages"][1]["content"]), row["answer"])
    spelled = list(itertools.islice(spelling.spelling_problems(words, 3), 200))
    assert spelled == list(itertools.islice(spelling.spelling_problems(words, 3), 200))
    assert {row["messages"][1]["content"] for row in spelled} == {f"{word}:{','.join(word)}" for word in words[:3]}
    with pytest.raises(ValueError, match="none of the 1 words"):
        next(spelling.spelling_problems(["don't"], 0))


def test_every_language_asks_about_both_the_letter_and_the_word():
    for question in spelling.COUNT_QUESTIONS:
        assert "'r'" in question.format(letter="'r'", word="berry") and "berry" in question.format(
            letter="", word="berry"
        )
    assert len({json.dumps(spelling.count_letter("berry", random.Random(seed))) for seed in range(100)}) > 50


PROBLEM = {
    "task_id": "t/0",
    "prompt": 'import math\n\n\ndef half(x):\n    """Half of x."""\n',
    "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
    "entry_point": "half",
}


@pytest.mark.parametrize(
    "completion",
    [
        "    return x / 2\n",
        "def half(x):\n    return x / 2",
        "Here it is:\n```python\ndef half(x):\n    return x / 2\n```\nDone.",
        "```\n    return x / 2\n```",
        "```python\nimport os\n\ndef half(x):\n    return x / 2",
        "Call it:\n```\nhalf(4)\n```\nwith\n```python3\ndef half(x):\n    return x / 2\n```",
        "```Python\r\ndef half(x):\r\n    return x / 2\r\n```",
    ],
)
def test_humaneval_takes_bodies_functions_and_fenced_blocks(completion):
    case = humaneval.case(PROBLEM, completion)
    namespace = {}
    exec(case.program, namespace)
    assert namespace[case.function](4) == 2 and case.program.startswith("import math")
    assert "Here it is" not in case.program and "```" not in case.program
    assert case.tests == PROBLEM["test"] and case.setup == "import math\n\n\n"


def test_humaneval_reference_is_the_whole_function():
    messages = humaneval.to_messages(PROBLEM)
    assert messages[0]["content"] == PROBLEM["prompt"]
    assert messages[1]["content"] == PROBLEM["prompt"] + PROBLEM["canonical_solution"]


def test_mental_arithmetic_has_the_same_problems_and_no_calculator():
    rows = list(itertools.islice(arithmetic.generate(1), 20))
    for row in rows:
        mental = arithmetic.in_the_head(row)
        assert mental["messages"][0] == row["messages"][0] and mental["answer"] == row["answer"]
        assert [part["type"] for part in mental["messages"][1]["content"]] == ["text"]
        assert gsm8k.is_correct(mental["messages"][1]["content"][0]["text"], row["answer"])
