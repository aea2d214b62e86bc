"""From the tokens of an answer to what a person sees: text, and uses of the calculator as `[12 + 30 = 42]`.

Tokens come one by one and what is new comes back at once, at the same cost however long the answer is. Nothing is
shown that a later token could change: a character that is not whole yet, a call whose value may follow, and the
beginning of a stop string are held back. Special tokens outside a call are not shown. Only byte-level tokenizers, as
all of this project's are, can be read token by token like this.
"""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modeling_nanochat.tokenization_nanochat_gpt import (
    OUTPUT_END,
    OUTPUT_START,
    PYTHON_END,
    PYTHON_START,
    special_token_ids,
)


@dataclass(frozen=True)
class Call:
    """A use of the calculator; no output if the expression has no value."""

    expression: str
    output: str | None

    def __str__(self) -> str:
        return f"[{self.expression}]" if self.output is None else f"[{self.expression} = {self.output}]"


Shown = str | Call


class Vocabulary:
    """The bytes of every token, and which tokens are marks.

    Raises:
        ValueError: the tokenizer is not byte-level, or lacks the special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.special = special_token_ids(tokenizer)
        self.added = set(tokenizer.get_added_vocab().values())
        codes = {letter: byte for byte, letter in bytes_to_unicode().items()}
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        try:
            self.bytes = [
                token.encode() if index in self.added else bytes(codes[letter] for letter in token)
                for index, token in enumerate(tokens)
            ]
        except KeyError as error:
            raise ValueError(f"the tokenizer's tokens hold {error}; expected a byte-level tokenizer") from None
        self.longest = max(map(len, self.bytes))


class Answer:
    """One answer while it grows.

    Args:
        vocabulary: of the model's tokenizer.
        stop: strings that end the answer where they begin; they are looked for in the text between calls.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = ()):
        special = vocabulary.special
        self.vocabulary, self.stop = vocabulary, tuple(stop)
        self.opening = {special[PYTHON_START]: "python", special[OUTPUT_START]: "output"}
        self.closing = {special[PYTHON_END], special[OUTPUT_END]}
        self.kind = "text"  # of what is being written
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.written = ""  # inside a call or an output so far
        self.held = ""  # text that may be the beginning of a stop string
        self.expression: str | None = None  # of a call that has ended, whose value may follow
        self.stopped = False  # a stop string has been met

    def add(self, token: int) -> list[Shown]:
        """What is to be shown after one more token."""
        if token in self.opening:
            shown = self._close()
            self.kind = self.opening[token]
            return shown if self.kind == "output" else [*shown, *self._without_value()]
        if token in self.closing:
            return self._close()
        if token in self.vocabulary.added:
            return []
        text = self.decoder.decode(self.vocabulary.bytes[token])
        if self.kind != "text":
            self.written += text
            return []
        return [*self._without_value(), *self._until_stop(text)]

    def finish(self) -> list[Shown]:
        """What is to be shown when no further token comes; half a character, where an answer is cut off, is not."""
        self.decoder.reset()
        shown = [*self._close(), *self._without_value()]
        held, self.held = self.held, ""
        return shown + ([held] if held and not self.stopped else [])

    def _close(self) -> list[Shown]:
        """Ends the call, the output or the stretch of text that is being written."""
        kind, self.kind = self.kind, "text"
        rest = self.decoder.decode(b"", final=True)
        if kind == "text":
            return self._until_stop(rest) if rest else []
        written, self.written = self.written + rest, ""
        if kind == "python":
            shown, self.expression = self._without_value(), written
            return shown
        expression, self.expression = self.expression or "", None
        return self._with_held(Call(expression, written))

    def _without_value(self) -> list[Shown]:
        """The call that has ended, if there is one: it turned out to have no value."""
        expression, self.expression = self.expression, None
        return [] if expression is None else self._with_held(Call(expression, None))

    def _with_held(self, call: Call) -> list[Shown]:
        """A stop string does not reach over a call: what was held back for it comes before."""
        held, self.held = self.held, ""
        if self.stopped:
            return []
        return [held, call] if held else [call]

    def _until_stop(self, text: str) -> list[Shown]:
        if self.stopped:
            return []
        text = self.held + text
        found = [position for position in (text.find(stop) for stop in self.stop) if position >= 0]
        if found:
            self.stopped, self.held, text = True, "", text[: min(found)]
        else:
            longest = max(map(len, self.stop), default=1) - 1
            beginnings = (text[-n:] for n in range(min(longest, len(text)), 0, -1))
            self.held = next((end for end in beginnings if any(stop.startswith(end) for stop in self.stop)), "")
            text = text.removesuffix(self.held)
        return [text] if text else []


def message_parts(shown: Iterable[Shown]) -> list[dict[str, str]]:
    """An answer as the content of a message, from which the same tokens can be made again; empty if nothing was said.

    An output that the model made up without a call is text: the renderer takes no other.
    """
    parts: list[dict[str, str]] = []
    for piece in shown:
        if isinstance(piece, Call) and piece.expression:
            parts.append({"type": "python", "text": piece.expression})
            parts += [{"type": "python_output", "text": piece.output}] if piece.output else []
            continue
        text = (piece.output or "") if isinstance(piece, Call) else piece
        if parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += text
        elif text:
            parts.append({"type": "text", "text": text})
    return parts
