"""What may pass between the tests and a candidate: literals, as bounded messages over two pipes.

JSON spells None, booleans, strings, lists, finite floats and small integers as themselves. Everything else is an object
of one member, whose name is the type: `{"tuple": [1, 2]}`, `{"float": "nan"}`, `{"dict": [[1, "a"]]}`. Reading it
builds nothing but these types, so it is safe whatever the other side sends; a subclass (a `Counter`, a named tuple)
arrives as the type it derives from, and what is no literal is refused by the name of its type.
"""

import json
import math
import os
import select
import time
from typing import Any

MAX_DEPTH = 64
MAX_MESSAGE_BYTES = 1 << 18
HEADER_BYTES = 4
SMALL_INTEGER = 1 << 53
MAX_DIGITS = 17  # of an integer that is spelled in decimal


class NotLiteral(Exception):
    """A value that cannot pass, or a message that spells no value."""


class BrokenMessage(Exception):
    """The other side has gone, sends something else than messages, or takes too long."""


def encode(value: Any, depth: int = MAX_DEPTH) -> Any:
    """The value as JSON's types.

    Raises:
        NotLiteral: with the name of the type that is no literal.
    """
    if depth < 0:
        raise NotLiteral(f"a value nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value) if -SMALL_INTEGER < value < SMALL_INTEGER else {"int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, list):
        return [encode(each, depth - 1) for each in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key, depth - 1), encode(each, depth - 1)] for key, each in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(each, depth - 1) for each in value]}
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__name__: value.hex()}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    raise NotLiteral(type(value).__name__)


DECODERS = {
    "int": lambda text, depth: int(text, 16),
    "float": lambda text, depth: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[text],
    "complex": lambda parts, depth: complex(*(decode(part, depth) for part in parts)),
    "bytes": lambda text, depth: bytes.fromhex(text),
    "bytearray": lambda text, depth: bytearray.fromhex(text),
    "tuple": lambda items, depth: tuple(decode(items, depth)),
    "set": lambda items, depth: set(decode(items, depth)),
    "frozenset": lambda items, depth: frozenset(decode(items, depth)),
    "dict": lambda pairs, depth: {decode(key, depth): decode(each, depth) for key, each in pairs},
}


def decode(value: Any, depth: int = 2 * MAX_DEPTH) -> Any:
    """The value that `encode` was given.

    Raises:
        NotLiteral: no value is spelled like this.
    """
    if depth < 0:
        raise NotLiteral(f"a value nested more than {MAX_DEPTH} deep")  # most kinds take two levels here
    if isinstance(value, list):
        return [decode(each, depth - 1) for each in value]
    if not isinstance(value, dict):
        return value
    try:
        ((kind, content),) = value.items()
        return DECODERS[kind](content, depth - 1)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise NotLiteral("a message that spells no value") from error


class Channel:
    """Messages over two descriptors: four bytes of length, then JSON. With a deadline the descriptors do not block."""

    def __init__(self, read_from: int, write_to: int, deadline: float | None = None):
        self.read_from, self.write_to, self.deadline = read_from, write_to, deadline
        if deadline is not None:
            os.set_blocking(read_from, False)
            os.set_blocking(write_to, False)

    def send(self, message: dict[str, Any]) -> None:
        """Raises: NotLiteral: too long. BrokenMessage."""
        body = json.dumps(message, allow_nan=False).encode("ascii")
        if len(body) > MAX_MESSAGE_BYTES:
            raise NotLiteral(f"a value of more than {MAX_MESSAGE_BYTES} bytes")
        rest = memoryview(len(body).to_bytes(HEADER_BYTES, "big") + body)
        while rest:
            self._wait([], [self.write_to])
            try:
                rest = rest[os.write(self.write_to, rest) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise BrokenMessage("the process ended") from error

    def receive(self) -> dict[str, Any]:
        """Raises: BrokenMessage."""
        length = int.from_bytes(self._read(HEADER_BYTES), "big")
        if length > MAX_MESSAGE_BYTES:
            raise BrokenMessage(f"a message of {length} bytes")
        body = self._read(length)
        try:
            message = json.loads(body.decode("ascii"), parse_int=_small_integer, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise BrokenMessage("a malformed message") from error
        if not isinstance(message, dict):
            raise BrokenMessage("a malformed message")
        return message

    def _read(self, length: int) -> bytes:
        parts = []
        while length:
            self._wait([self.read_from], [])
            try:
                part = os.read(self.read_from, length)
            except BlockingIOError:
                continue
            if not part:
                raise BrokenMessage("the process ended")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _wait(self, read: list[int], write: list[int]) -> None:
        if self.deadline is not None:
            remaining = self.deadline - time.monotonic()
            if remaining <= 0 or not any(select.select(read, write, [], remaining)):
                raise BrokenMessage("time is up")


def _small_integer(digits: str) -> int:
    """Long decimals are spelled in hexadecimal, as reading them as decimals takes quadratic time."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _refuse(constant: str) -> None:
    raise ValueError(constant)
