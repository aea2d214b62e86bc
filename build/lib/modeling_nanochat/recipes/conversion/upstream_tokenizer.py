"""Upstream's tokenizer file, a pickled tiktoken encoding, read without trusting it and written back.

A pickle can run any code that it likes, so the reader here knows exactly one name, tiktoken's `Encoding`, and even that
only as an empty stand-in that takes the state: four fields of plain values, checked before anything is built from
them. Anything else in the file is an error that names it. The fast tokenizer made of it gives the same ids; that is
not taken on trust either, but checked on a text that holds every token of the vocabulary.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import tiktoken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_nanochat import SPECIAL_TOKENS, encode_text
from modeling_nanochat.training.tokenizer import BYTES, tiktoken_encoding, tokenizer_from_ranks

NAME = "rustbpe"  # what upstream calls its encodings
PICKLE_PROTOCOL = 4  # what upstream's Python writes: the file comes out the same to the byte
FIELDS = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}


class EncodingState:
    """Takes the place of `tiktoken.Encoding` while a file is read: keeps the state and does nothing with it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class EncodingUnpickler(pickle.Unpickler):
    """Admits `tiktoken.core.Encoding`, as a stand-in, and no other name."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return EncodingState
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_upstream_tokenizer(file: str | Path, model_max_length: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer with exactly the ids of upstream's `tokenizer.pkl`.

    Raises:
        ValueError: the file holds anything but a tiktoken encoding with the nine special tokens at its end, or one
            whose ids a fast tokenizer does not reproduce.
    """
    state = read_encoding_state(Path(file))
    ranks, pattern = state["mergeable_ranks"], state["pat_str"]
    encoding = tiktoken.Encoding(NAME, pat_str=pattern, mergeable_ranks=ranks, special_tokens=state["special_tokens"])
    tokenizer = tokenizer_from_ranks(ranks, pattern=pattern, model_max_length=model_max_length)
    every_token = "".join(token.decode("utf-8", errors="ignore") for token in ranks)
    if encode_text(tokenizer, every_token) != encoding.encode_ordinary(every_token):
        raise ValueError(f"{file}: its split pattern {pattern!r} gives other ids in a fast tokenizer than in tiktoken")
    return tokenizer


def read_encoding_state(file: Path) -> dict[str, Any]:
    """The state of a pickled tiktoken encoding: name, split pattern, ranks of the byte strings, special tokens."""
    try:
        loaded = EncodingUnpickler(io.BytesIO(file.read_bytes())).load()
    except Exception as error:  # a file made to harm, or no pickle at all, can fail in any way
        raise ValueError(f"{file} is no pickled tiktoken encoding and nothing else: {error}") from error
    if not isinstance(loaded, EncodingState):
        raise ValueError(f"{file} holds a {type(loaded).__name__}, expected a tiktoken Encoding")
    state = loaded.state
    if not isinstance(state, dict) or {key: type(value) for key, value in state.items()} != FIELDS:
        raise ValueError(f"{file} holds an encoding made of {str(state)[:100]!r}, expected the fields {FIELDS}")
    ranks, special = state["mergeable_ranks"], state["special_tokens"]
    if not all(type(token) is bytes and type(rank) is int for token, rank in ranks.items()):
        raise ValueError(f"{file}: mergeable_ranks are not all bytes with a whole number")
    if missing := [byte for byte in range(BYTES) if bytes([byte]) not in ranks]:
        raise ValueError(f"{file}: the bytes {missing} are no tokens, expected all of the {BYTES}")
    expected = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    if special != expected:
        raise ValueError(f"{file}: special tokens are {special}, expected {expected}")
    return state


def upstream_encoding(tokenizer: PreTrainedTokenizerBase) -> tiktoken.Encoding:
    """The tiktoken encoding that upstream would have pickled for this tokenizer.

    Raises:
        ValueError: it is no byte-level BPE with the nine special tokens, and only those, at its end.
    """
    encoding = tiktoken_encoding(tokenizer)
    expected = {token: len(encoding._mergeable_ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    if encoding._special_tokens != expected:
        raise ValueError(f"the tokenizer's special tokens are {encoding._special_tokens}, expected {expected}")
    encoding.name = NAME
    return encoding


def write_upstream_tokenizer(tokenizer: PreTrainedTokenizerBase, file: str | Path) -> None:
    """Writes `tokenizer.pkl` as upstream does.

    Raises:
        ValueError: as `upstream_encoding`.
    """
    Path(file).write_bytes(pickle.dumps(upstream_encoding(tokenizer), protocol=PICKLE_PROTOCOL))
