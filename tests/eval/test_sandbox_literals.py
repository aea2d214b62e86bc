"""What passes between the tests and a candidate: literals as they are, and nothing that harms who reads it."""

import collections
import ctypes
import ctypes.util
import json
import math
import os
import time

import pytest

from modeling_nanochat.eval.sandbox import seccomp
from modeling_nanochat.eval.sandbox.literals import (
    MAX_DEPTH,
    MAX_MESSAGE_BYTES,
    BrokenMessage,
    Channel,
    NotLiteral,
    decode,
    encode,
)


def passed_on(value):
    read_from, write_to = os.pipe()
    try:
        channel = Channel(read_from, write_to)
        channel.send({"value": encode(value)})
        return decode(channel.receive()["value"])
    finally:
        os.close(read_from)
        os.close(write_to)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -1, 2**53, -(2**53), 10**5000, -(10**40), 0.1, -0.0, 1e308, math.inf, -math.inf, 2 + 3j,
        "", "é\ud800\x00\n", b"\x00\xff", bytearray(b"x"), [], (), (1,), {1, 2}, frozenset({"a"}), set(), {},
        {"a": [1, (2.0, None)], (1, 2): {3}, None: True, 1.5: b""}, [[[1], (2,)], {"int": 3}, {"tuple": [1]}],
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) or abs(value) < 10**50 else "long",
)  # fmt: skip
def test_a_literal_arrives_as_it_is(value):
    arrived = passed_on(value)
    assert arrived == value and type(arrived) is type(value)
    if isinstance(value, float):
        assert math.copysign(1, arrived) == math.copysign(1, value)


def test_nan_and_the_depths_that_are_allowed_arrive():
    assert math.isnan(passed_on(math.nan)) and math.isnan(passed_on([(math.nan,)])[0][0])
    nested = 1
    for _ in range(MAX_DEPTH):
        nested = (nested,)
    assert passed_on(nested) == nested


def test_a_subclass_arrives_as_what_it_derives_from():
    pair = collections.namedtuple("pair", "a b")
    for value, kind in (
        (collections.Counter("aab"), dict), (collections.defaultdict(list, a=[1]), dict), (pair(1, 2), tuple),
    ):  # fmt: skip
        assert passed_on(value) == value and type(passed_on(value)) is kind

    class Equal(int):
        __eq__ = __ne__ = lambda *_: True
        __hash__ = int.__hash__

    assert Equal(3) == 4 and passed_on(Equal(3)) == 3 and passed_on(Equal(3)) != 4


@pytest.mark.parametrize(
    "value, name", [(object(), "object"), (len, "builtin"), (range(3), "range"), ([{1: {}.keys()}], "dict_keys")]
)
def test_what_is_no_literal_is_refused_by_name(value, name):
    with pytest.raises(NotLiteral, match=name):
        encode(value)


@pytest.mark.parametrize(
    "spelling",
    [
        {"int": "x"}, {"int": 3}, {"float": "1"}, {"float": []}, {"object": 1}, {}, {"tuple": [1], "set": [1]},
        {"set": [[]]}, {"set": 3}, {"dict": [[1]]}, {"dict": [[[], 1]]}, {"bytes": "xy"}, {"bytes": 5},
        {"complex": [1, {"int": "0x" + "f" * 5000}]}, {"__class__": "os"},
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_value_is_refused(spelling):
    with pytest.raises(NotLiteral):
        decode(spelling)


@pytest.mark.parametrize(
    "sent",
    [
        b"", b"\x00\x00", b"\x00\x00\x00\x09{", b"\xff\xff\xff\xff" + b"x" * 99, b"\x00\x00\x00\x02[]",
        b"\x00\x00\x00\x09{\"a\":NaN}", b"\x00\x00\x00\x01\xff",
        (50_000).to_bytes(4, "big") + b"[" * 50_000,
        (50_006).to_bytes(4, "big") + b'{"a":' + b"9" * 50_000 + b"}",
    ],
    ids=lambda sent: repr(sent[:12]),
)  # fmt: skip
def test_a_broken_message_is_refused_at_once(sent):
    read_from, write_to = os.pipe()
    os.write(write_to, sent)
    os.close(write_to)
    start = time.monotonic()
    with pytest.raises(BrokenMessage):
        Channel(read_from, read_from, start + 20).receive()
    assert time.monotonic() - start < 10
    os.close(read_from)


def test_a_silent_or_deaf_other_side_ends_at_the_deadline():
    read_from, write_to = os.pipe()
    for act in (
        lambda channel: channel.receive(),
        lambda channel: channel.send({"value": "x" * (MAX_MESSAGE_BYTES - 99)}),
    ):
        with pytest.raises(BrokenMessage, match="time is up"):
            act(Channel(read_from, write_to, time.monotonic() + 0.2))
    os.close(read_from)
    os.close(write_to)


def test_encoding_is_bounded():
    read_from, write_to = os.pipe()
    with pytest.raises(NotLiteral, match="bytes"):
        Channel(read_from, write_to).send({"value": "x" * MAX_MESSAGE_BYTES})
    loop = []
    loop.append(loop)
    with pytest.raises(NotLiteral, match="nested"):
        encode(loop)
    with pytest.raises(NotLiteral, match="nested"):
        decode(json.loads("[" * 500 + "]" * 500))


@pytest.mark.skipif(not ctypes.util.find_library("seccomp"), reason="libseccomp is not installed")
def test_numbers_of_system_calls_are_those_of_libseccomp():
    library = ctypes.CDLL(ctypes.util.find_library("seccomp"))
    for column, architecture in seccomp.MACHINES.values():
        for name, numbers in {**seccomp.CALLS, **seccomp.FILE_CALLS}.items():
            found = library.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(architecture), name.encode())
            assert numbers[column] == (found if found >= 0 else None), name
