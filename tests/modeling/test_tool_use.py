"""The calculator: exact, bounded, impossible to break out of, and forced into the text of every way to generate."""

import random
import re
import time
import warnings
from fractions import Fraction

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_nanochat.tokenization_nanochat_gpt import encode_text, special_token_ids
from modeling_nanochat.tool_use import MAX_FORCED_TOKENS, CalculatorLogitsProcessor, calculate, forced_token_mask
from tests.toys import digit_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return digit_tokenizer()


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 + 30", "42"),
        ("12+30", "42"),
        (" 2*(3 - 5) ", "-4"),
        ("-(-3) - +2", "1"),
        ("10/4", "2.5"),
        ("10/5", "2"),
        ("0.1+0.2", "0.3"),
        ("0.1 + 0.2 - 0.3", "0"),
        ("1 / 3 * 3", "1"),
        ("2/3", "0.666666666667"),
        (".5 * 4.", "2"),
        ("-.0", "0"),
        ("1,000 * 1,234", "1234000"),
        ("$1,000.50 * 2", "2001"),
        ("12345678 * 12345678", str(12345678**2)),
        ("999999999999.5 * 1000", "999999999999500"),
        ("1/30000", "0.0000333333333333"),
        ("'strawberry'.count('r')", "3"),
        ('"strawberry".count("rr") + 1', "2"),
        ("'a,b,c'.count(',')", "2"),
        ("'a$b,c'.count('$')", "1"),
        ("'Straße'.count('ß')", "1"),
    ],
)
def test_calculates(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "   ",
        "()",
        "1 +",
        "12 30",
        "1\n+ 1",
        "007",
        "1 / 0",
        "1.0 / (2 - 2)",
        "2 ** 3",
        "7 // 2",
        "7 % 2",
        "1e5",
        "0x10",
        "1_000",
        "1j",
        "1 < 2",
        "1 if 1 else 2",
        "x + 1",
        "True",
        "abs(-1)",
        "(1)(2)",
        "(1).count(2)",
        "'a' * 9",
        "'a' + 'b'",
        "'abc'",
        "'abc'.count",
        "'abc'.count()",
        "'abc'.count('a', 1)",
        "'abc'.count(*'a')",
        "'abc'.upper()",
        "'abc'.count('a').real",
        "'abc'.count.__self__",
        "f'{1}'.count('1')",
        "b'abc'.count(b'a')",
        r"'\x41'.count('A')",
        "().__class__.__bases__[0].__subclasses__()",
        "__import__('os').system('true')",
        "[1, 2].count(1)",
        "lambda: 1",
        "(y := 1)",
        "9" * 16,
        "9" * 240 + ".0",
        "9" * 120 + "*" + "9" * 120,
        "(" * 250,
        "-" * 255 + "x",
        "1+" * 200 + "1",
        "1\x00",
        "1 / 3000000000",
        "5%",
        "$",
    ],
)
def test_anything_else_has_no_value(expression):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calculate(expression) is None


def random_expression(rng: random.Random, depth: int = 0) -> tuple[str, Fraction | None]:
    """An expression of the grammar and its value (None after a division by zero), worked out while it is written."""
    kind = rng.choice("nnn+-*/(u") if depth < 3 else "n"
    if kind == "n":
        number = rng.choice((rng.randint(0, 99), rng.randint(0, 10**6), round(rng.uniform(0, 100), rng.randint(1, 3))))
        written = f"{number:,}" if rng.random() < 0.3 else str(number)
        return rng.choice(("", "", "$")) + written, Fraction(str(number))
    left, a = random_expression(rng, depth + 1)
    if kind == "(":
        return f"({left})", a
    if kind == "u":
        return f"-({left})", None if a is None else -a
    right, b = random_expression(rng, depth + 1)
    value = None
    if a is not None and b is not None and not (kind == "/" and b == 0):
        value = a + b if kind == "+" else a - b if kind == "-" else a * b if kind == "*" else a / b
    space = rng.choice(("", " "))
    return f"({left}){space}{kind}{space}({right})", value


def test_fifty_thousand_right_expressions_have_the_value_of_their_fraction():
    rng = random.Random(0)
    for _ in range(50_000):
        expression, value = random_expression(rng)
        written = calculate(expression)
        if value is None or abs(value) >= 10**15 or 0 < abs(value) < Fraction(1, 10**9) or len(expression) > 256:
            assert written is None, expression
            continue
        assert abs(Fraction(written) - value) <= abs(value) / 10**11, expression
        assert re.fullmatch(r"-?\d+(\.\d*[1-9])?", written) and written != "-0"
        assert len(written) + 2 <= MAX_FORCED_TOKENS
        if value.denominator == 1:
            assert written == str(value)


def test_fifty_thousand_random_strings_are_refused_or_worth_what_python_says():
    rng, valued = random.Random(1), 0
    alphabet = "0123456789012345678900++--**//().,$ "
    odd = ["'ab'", ".count", "('a')", "e", "_", "\n", "x", "**", "//", "[", "你", "\x00", '"', "%"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python's, about what is evaluated here to compare with
        for _ in range(50_000):
            pieces = rng.choices(alphabet, k=rng.randint(1, 12))
            if rng.random() < 0.2:
                pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(odd))
            expression = "".join(pieces)
            value = calculate(expression)
            if value is not None:
                valued += 1
                plain = expression.replace(",", "").replace("$", "").strip()
                assert "**" not in plain and "//" not in plain
                assert float(value) == pytest.approx(eval(plain, {"__builtins__": {}}), rel=1e-9, abs=1e-9)
    assert valued > 5000


def test_hostile_expressions_are_cheap():
    worst = ["(" * 100 + "1" + ")" * 100, "-" * 255 + "1", "9*" * 127 + "9", "1." * 128, "." * 256, "'" * 255]
    started = time.perf_counter()
    values = [calculate(expression) for expression in worst for _ in range(20)]
    assert time.perf_counter() - started < 1.0
    assert values[20] == "-1"  # 255 signs are within the bounds, and right


def render(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


CALL = "Sum: <|python_start|>12 + 30<|python_end|>"


@pytest.mark.parametrize(
    ("text", "forced"),
    [
        (CALL, "<|output_start|>42<|output_end|>"),
        (CALL + "<|output_start|>", "42<|output_end|>"),
        (CALL + "<|output_start|>42", "<|output_end|>"),
        (CALL + "<|output_start|>42<|output_end|>", ""),
        (CALL + "<|output_start|>41", ""),
        (CALL + "<|assistant_end|>", ""),
        (CALL + "<|output_start|>42<|output_end|> so " + CALL, "<|output_start|>42<|output_end|>"),
        ("<|python_start|>1 / 0<|python_end|>", ""),
        ("<|python_start|>1 + <|bos|>1<|python_end|>", ""),
        ("1<|python_start|>2 + <|python_start|>3 + 4<|python_end|>", "<|output_start|>7<|output_end|>"),
        (CALL + "5<|python_end|>", ""),
        ("5<|python_end|>", ""),
        ("12 + 30", ""),
        ("<|python_start|>'strawberry'.count('r')<|python_end|>", "<|output_start|>3<|output_end|>"),
    ],
)
def test_what_has_to_follow(tokenizer, text, forced):
    processor = CalculatorLogitsProcessor(tokenizer)
    ids = render(tokenizer, text)
    produced = []
    while (token := processor.next_forced_token(ids + produced)) is not None:
        produced.append(token)
    assert produced == render(tokenizer, forced)
    mask = forced_token_mask(tokenizer, ids + produced + encode_text(tokenizer, " ok"))
    tail = len(produced) + len(encode_text(tokenizer, " ok"))
    assert mask[-tail:] == [1] * len(produced) + [0] * (tail - len(produced))


def test_mask_covers_what_was_forced_and_nothing_else(tokenizer):
    spans = [
        ("a <|python_start|>12 + 30<|python_end|>", 0),
        ("<|output_start|>42<|output_end|>", 1),
        (" b <|python_start|>1 / 0<|python_end|><|output_start|>9<|output_end|>", 0),  # the model made this one up
        ("<|python_start|>2 * 617<|python_end|>", 0),
        ("<|output_start|>12", 1),  # cut off before the last digits
    ]
    ids, mask = [], []
    for text, forced in spans:
        tokens = render(tokenizer, text)
        ids, mask = ids + tokens, mask + [forced] * len(tokens)
    assert forced_token_mask(tokenizer, ids) == mask


def scripted_model(tokenizer, scripts: list[str]) -> LlamaForCausalLM:
    """A tiny network whose logits at each step prefer the next token of a script: row i follows script i."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.scripts = [render(tokenizer, script) for script in scripts]
    return model


class FollowScript(CalculatorLogitsProcessor):
    """Stands for a trained model: prefers the script's next token, then lets the calculator have its way.

    The script holds no calculator output, so a row's place in it is the number of its own (unforced) tokens.
    """

    def __init__(self, tokenizer, scripts, prompt_length):
        super().__init__(tokenizer)
        self.scripts, self.prompt_length = scripts, prompt_length

    def __call__(self, input_ids, scores):
        repeat = len(input_ids) // len(self.scripts)
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            script = self.scripts[row // repeat]
            place = len(ids) - sum(self.forced_token_mask(ids))
            scores[row] = -50.0
            scores[row, script[min(place, len(script) - 1)]] = 0.0
        return super().__call__(input_ids, scores)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_batched_generation_calls_the_calculator_several_times_a_row(tokenizer, options):
    scripts = [
        "<|python_start|>12 + 30<|python_end|> then <|python_start|>42 / 8<|python_end|>.<|assistant_end|>",
        "no call<|assistant_end|>",
        "<|python_start|>1 / 0<|python_end|> <|python_start|>'aaa'.count('a')<|python_end|><|assistant_end|>",
    ]
    expected = [
        "<|python_start|>12 + 30<|python_end|><|output_start|>42<|output_end|> then "
        "<|python_start|>42 / 8<|python_end|><|output_start|>5.25<|output_end|>.<|assistant_end|>",
        "no call<|assistant_end|>",
        "<|python_start|>1 / 0<|python_end|> "
        "<|python_start|>'aaa'.count('a')<|python_end|><|output_start|>3<|output_end|><|assistant_end|>",
    ]
    model = scripted_model(tokenizer, scripts)
    prompt = torch.full((3, 4), special_token_ids(tokenizer)["<|assistant_start|>"])
    processor = FollowScript(tokenizer, model.scripts, prompt.shape[1])
    torch.manual_seed(0)
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=90, logits_processor=[processor], **options
    )
    repeat = len(output) // 3
    for row, ids in enumerate(output[:, 4:].tolist()):
        text = tokenizer.decode(ids)
        want = expected[row // repeat]
        assert text[: len(want)] == want
        assert set(ids[len(render(tokenizer, want)) :]) <= {tokenizer.pad_token_id}


def test_rows_without_a_call_are_left_alone(tokenizer):
    processor = CalculatorLogitsProcessor(tokenizer)
    ids = torch.tensor([render(tokenizer, CALL), [0] * len(render(tokenizer, CALL))])
    scores = torch.randn(2, len(tokenizer))
    result = processor(ids, scores.clone())
    assert torch.equal(result[1], scores[1])
    assert result[0].isfinite().sum() == 1 and result[0].argmax() == special_token_ids(tokenizer)["<|output_start|>"]
