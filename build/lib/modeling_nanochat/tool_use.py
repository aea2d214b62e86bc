"""The calculator: what an expression is worth, and how its value gets into the text while a model generates.

A model calls it by writing an expression between `<|python_start|>` and `<|python_end|>`. If the expression has a
value, the next tokens are not the model's choice any more: `<|output_start|> value <|output_end|>` is forced. The
processor keeps no state of its own and reads everything from the tokens so far; so it works for batched rows, beams,
several calls a row, assisted decoding and any cache. That costs one small comparison a step, and a look at the rows
that have just called.

Expressions are untrusted text. They are checked against an alphabet, parsed, and their syntax tree is walked; nothing
is ever evaluated by Python itself. Without powers a result has no more digits than the expression, which is bounded in
length: so depth, size and time are bounded too.

Values are exact fractions and are written as people write them: 48/2 is 24, 0.1+0.2 is 0.3, never 24.0 or
0.30000000000000004. What training data shows as an output (`eval/tasks`) is written by this same function.

A checkpoint whose generation settings say `use_calculator` brings this along by itself (`_get_logits_processor` in
modeling_nanochat_gpt.py), with the tokenizer that lies in its folder.
"""

import ast
import operator
import re
from collections.abc import Sequence
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.generation.continuous_batching.cb_logits_processors import (
    CLASSIC_TO_CB_PROCESSORS_MAP,
    ContinuousBatchingLogitsProcessor,
)

from .tokenization_nanochat_gpt import (
    OUTPUT_END,
    OUTPUT_START,
    PYTHON_END,
    PYTHON_START,
    encode_text,
    special_token_ids,
)

MAX_EXPRESSION_LENGTH = 256  # characters; the longest of GSM8K's 28,000 has 30
MAX_MAGNITUDE = 10**15  # values from there on, and nearer to 0 than MIN_MAGNITUDE, are not written
MIN_MAGNITUDE = Fraction(1, 10**9)
SIGNIFICANT = Context(prec=12)  # digits of a value that is not whole: more than any reader needs
MAX_FORCED_TOKENS = 2 + len("-0.00000000123456789012")  # both marks and the longest value, one token a character

STRING = r"'[^'\\\r\n]*'|\"[^\"\\\r\n]*\""
COMMA_OR_DOLLAR_OUTSIDE_STRINGS = re.compile(rf"({STRING})|[,$]")
ALPHABET = re.compile(rf"(?:[0-9+\-*/.() ]|\.count|{STRING})+")
BINARY_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
UNARY_OPERATORS = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str | None:
    """The value of an expression as people write numbers, or None if it has none.

    Allowed are `+ - * / ( )` on numbers, with commas and dollar signs as in $1,000 dropped, and `'string'.count('x')`.
    Anything else, a division by zero, an expression over 256 characters or a result of 10^15 and more, or nearer to 0
    than 10^-9, has no value. Whole values are exact; others are rounded to 12 significant digits.
    """
    if len(expression) > MAX_EXPRESSION_LENGTH:
        return None
    expression = COMMA_OR_DOLLAR_OUTSIDE_STRINGS.sub(r"\1", expression).strip()
    if not ALPHABET.fullmatch(expression):
        return None
    try:
        value = _value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None
    if abs(value) >= MAX_MAGNITUDE or 0 < abs(value) < MIN_MAGNITUDE:
        return None
    return write_number(value)


def write_number(value: Fraction) -> str:
    """A value without an exponent, and without a point if it is whole."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"{SIGNIFICANT.divide(Decimal(value.numerator), Decimal(value.denominator)).normalize():f}"


def _value(node: ast.expr) -> Fraction:
    """The value of a syntax tree of allowed nodes; `ValueError` for any other."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(str(number))  # the decimal that was written, not the binary number nearest to it
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY_OPERATORS:
            return UNARY_OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY_OPERATORS:
            return BINARY_OPERATORS[type(op)](_value(left), _value(right))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return Fraction(text.count(part))
    raise ValueError(f"{type(node).__name__} is not arithmetic")


class CalculatorLogitsProcessor(LogitsProcessor):
    """Forces the calculator's answer after a call: for `generate(..., logits_processor=[...])` of any model.

    Args:
        tokenizer: a fast tokenizer with the nine special tokens.

    Raises:
        ValueError: if the tokenizer lacks one of the special tokens.
    """

    supports_continuous_batching = False  # as it is; CalculatorForContinuousBatching takes its place

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        special = special_token_ids(tokenizer)
        self.tokenizer = tokenizer
        self.python_start, self.python_end = special[PYTHON_START], special[PYTHON_END]
        self.output_start, self.output_end = special[OUTPUT_START], special[OUTPUT_END]
        self.answer_tokens = lru_cache(maxsize=4096)(self._answer_tokens)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(B, T) tokens so far and (B, V) scores of the next one -> scores in which forced tokens are certain."""
        called = (input_ids[:, -MAX_FORCED_TOKENS:] == self.python_end).any(dim=1)  # (B,)
        for row in called.nonzero().flatten().tolist():
            token = self.next_forced_token(input_ids[row].tolist())
            if token is not None:
                scores[row] = -float("inf")
                scores[row, token] = 0.0  # the logarithm of certainty: beams pay nothing for it
        return scores

    def next_forced_token(self, ids: Sequence[int]) -> int | None:
        """The token that has to follow `ids`, or None where the model is free to choose."""
        for end in range(len(ids) - 1, max(len(ids) - 1 - MAX_FORCED_TOKENS, -1), -1):
            if ids[end] == self.python_end:
                answer, written = self.answer_after(ids, end), ids[end + 1 :]
                if len(written) < len(answer) and list(written) == answer[: len(written)]:
                    return answer[len(written)]
                return None
        return None

    def forced_token_mask(self, ids: Sequence[int]) -> list[int]:
        """1 for every token of a sampled completion that was forced on it, else 0. A cut-off answer counts too."""
        mask = [0] * len(ids)
        for end, token in enumerate(ids):
            if token == self.python_end:
                for position, answer in enumerate(self.answer_after(ids, end), start=end + 1):
                    if position >= len(ids) or ids[position] != answer:
                        break
                    mask[position] = 1
        return mask

    def answer_after(self, ids: Sequence[int], end: int) -> list[int]:
        """What is forced after the call that ends with the mark at position `end`; empty if it has no value."""
        for start in range(end - 1, -1, -1):
            if ids[start] == self.python_start:
                return self.answer_tokens(tuple(ids[start + 1 : end]))
            if ids[start] == self.python_end:
                break  # this mark closes nothing
        return []

    def _answer_tokens(self, expression: tuple[int, ...]) -> list[int]:
        value = calculate(self.tokenizer.decode(expression, clean_up_tokenization_spaces=False))
        if value is None:
            return []
        return [self.output_start, *encode_text(self.tokenizer, value), self.output_end]


class CalculatorForContinuousBatching(ContinuousBatchingLogitsProcessor):
    """The same for `generate_batch`, where rows join and leave: the next forced token of each is worked out from its
    request before the network runs, so that batch must not be prepared while the one before is still being computed."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 (a field of the parent class)
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, calculator: CalculatorLogitsProcessor):
        self.calculator = calculator

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.fill_(-1)

    def prepare_tensor_args(self, requests_with_new_token: list) -> torch.Tensor:
        """(requests,) int32: the token that each must go on with, -1 where the model is free to choose."""
        states = [request.state for request in requests_with_new_token]
        forced = [self.calculator.next_forced_token(state.initial_tokens + state.generated_tokens) for state in states]
        return torch.tensor([-1 if token is None else token for token in forced], dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        forced = tensor_arg[: len(scores)].long().unsqueeze(1)  # (B, 1)
        certain = torch.full_like(scores, -float("inf")).scatter_(1, forced.clamp(min=0), 0.0)
        return torch.where(forced >= 0, certain, scores)


CLASSIC_TO_CB_PROCESSORS_MAP[CalculatorLogitsProcessor] = CalculatorForContinuousBatching


def has_calculator(processors: LogitsProcessorList) -> bool:
    """By name: a checkpoint's own copy of this file and the installed one have different classes of that name."""
    names = (parent.__name__ for processor in processors for parent in type(processor).__mro__)
    return CalculatorLogitsProcessor.__name__ in names


@lru_cache(maxsize=8)
def tokenizer_of_checkpoint(name_or_path: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or a repository, read once; `ValueError` if there is none."""
    try:
        if not name_or_path:
            raise OSError("the network came from no folder")
        return PreTrainedTokenizerFast.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"generation_config says use_calculator, which needs a tokenizer, but {name_or_path!r} has none "
            f"({str(error).splitlines()[0]}); expected use_calculator=False, or "
            "logits_processor=[model.calculator(tokenizer)]"
        ) from error


def forced_token_mask(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """1 for every token of a sampled completion that the calculator forced, else 0: these carry no loss in RL."""
    return CalculatorLogitsProcessor(tokenizer).forced_token_mask(ids)
