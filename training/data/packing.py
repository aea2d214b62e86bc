"""Packing token sequences into rows of one length: best fit with cropping, and best fit with padding.

**Cropping** (pretraining): a buffer of documents is kept full; every row takes the largest document that still fits,
again and again, and when none fits, the beginning of the shortest one fills the row exactly. No padding, and every row
begins with the beginning of a document (its BOS), so nothing is learnt from text whose start cannot be seen. The price
is the cropped tails: about 35% of FineWeb-Edu's tokens at rows of 2048 are never seen (`PackingStats` counts them). Of
a document longer than a row only the beginning can ever be used, but its whole length counts: the shortest is cropped.

**Padding** (SFT): the same choice, but a conversation is never cropped to fill a row; what is left becomes padding.

Both choose through an index of the buffer by length (bisection), not by scanning it: the same rows as the obvious scan
of all documents, which the tests keep as a twin, at a cost that hardly depends on the size of the buffer.
"""

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from modeling_nanochat.chunked_cross_entropy import IGNORE_INDEX

BUFFER_SIZE = 1000  # documents to choose from (upstream's); more fits better, but mixes the order of documents more


@dataclass
class PackingStats:
    """Counts of what went into rows and what did not.

    `cropped_tokens` are tokens of documents that fell off at the end of a row (or of a sequence trimmed to a row),
    `padding_tokens` fill what nothing fitted into, `trimmed_sequences` counts sequences longer than a row. Of
    conversations, `trained_tokens` carry loss, and `untrained_sequences` had none within a row and are in no row.
    """

    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    cropped_tokens: int = 0
    padding_tokens: int = 0
    trimmed_sequences: int = 0
    trained_tokens: int = 0
    untrained_sequences: int = 0

    @classmethod
    def of(cls, state: dict[str, Any]) -> "PackingStats":
        """The counts in the state of a packer; older ones have some that are no longer made."""
        return cls(**{name: count for name, count in state["stats"].items() if name in cls.__dataclass_fields__})

    @property
    def utilisation(self) -> float:
        """Share of the rows' positions that hold a token."""
        return self.tokens / max(self.tokens + self.padding_tokens, 1)

    @property
    def cropped_share(self) -> float:
        """Share of the sequences' tokens that no row holds."""
        return self.cropped_tokens / max(self.tokens + self.cropped_tokens, 1)


class LengthIndex:
    """A buffer of items found by length; among items of one length, the first that came is the first that goes."""

    def __init__(self) -> None:
        self.items: dict[int, deque[Any]] = {}  # length -> items in order of arrival
        self.lengths: list[int] = []  # the distinct lengths, sorted
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def add(self, length: int, item: Any) -> None:
        if length not in self.items:
            self.items[length] = deque()
            insort(self.lengths, length)
        self.items[length].append(item)
        self.size += 1

    def pop_largest(self, limit: int) -> tuple[int, Any] | None:
        """Remove and return (length, item) of the longest item of at most `limit`, or None."""
        position = bisect_right(self.lengths, limit) - 1
        return self._pop(position) if position >= 0 else None

    def pop_smallest(self) -> tuple[int, Any]:
        """Remove and return (length, item) of the shortest item."""
        return self._pop(0)

    def _pop(self, position: int) -> tuple[int, Any]:
        length = self.lengths[position]
        waiting = self.items[length]
        item = waiting.popleft()
        if not waiting:
            del self.items[length], self.lengths[position]
        self.size -= 1
        return length, item

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """(length, item) of everything in it, in an order that rebuilds an equal index."""
        return ((length, item) for length in self.lengths for item in self.items[length])


class BestFitPacker:
    """Best fit with cropping, whose state between two rows can be saved and restored exactly.

    Args:
        row_length: tokens in a row (the context length plus one, as inputs and targets overlap).
        buffer_size: documents kept to choose from.
    """

    def __init__(self, row_length: int, buffer_size: int = BUFFER_SIZE):
        if row_length < 1 or buffer_size < 1:
            raise ValueError(f"row_length and buffer_size must be positive, not {row_length} and {buffer_size}")
        self.row_length = row_length
        self.buffer_size = buffer_size
        self.index = LengthIndex()
        self.stats = PackingStats()

    def pack(self, documents: Iterable[Sequence[int] | np.ndarray]) -> Iterator[np.ndarray]:
        """Rows `(row_length,)` of int32 tokens. A document is taken only when the buffer has room for it, so between
        two rows everything taken so far lies in a row or in the state. An unfinished last row is dropped."""
        documents = iter(documents)
        while (row := self._next_row(documents)) is not None:
            yield row

    def _next_row(self, documents: Iterator[Sequence[int] | np.ndarray]) -> np.ndarray | None:
        row = np.empty(self.row_length, dtype=np.int32)
        filled = sequences = cropped = 0
        while filled < self.row_length:
            self._refill(documents)
            if not self.index:
                return None
            room = self.row_length - filled
            length, document = self.index.pop_largest(room) or self.index.pop_smallest()
            taken = min(length, room)
            row[filled : filled + taken] = document[:taken]
            filled, sequences, cropped = filled + taken, sequences + 1, cropped + length - taken
        self.stats.rows += 1
        self.stats.sequences += sequences
        self.stats.tokens += filled
        self.stats.cropped_tokens += cropped
        return row

    def _refill(self, documents: Iterator[Sequence[int] | np.ndarray]) -> None:
        while len(self.index) < self.buffer_size:
            document = next(documents, None)
            if document is None:
                return
            if len(document):  # of a document longer than a row, no more than a row's beginning can ever be used
                self.index.add(len(document), np.asarray(document[: self.row_length], dtype=np.int32).copy())

    def state_dict(self) -> dict[str, Any]:
        """The buffered documents end to end with their lengths, and the counts: what a `weights_only` load reads."""
        documents = [document for _, document in self.index]
        return {
            "tokens": torch.from_numpy(np.concatenate(documents) if documents else np.empty(0, dtype=np.int32)),
            "lengths": torch.tensor([length for length, _ in self.index], dtype=torch.int64),
            "stats": asdict(self.stats),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where the packer stood that gave `state`."""
        self.index = LengthIndex()
        kept = [min(length, self.row_length) for length in state["lengths"].tolist()]
        documents = np.split(state["tokens"].numpy(), np.cumsum(kept)[:-1]) if kept else []
        for length, document in zip(state["lengths"].tolist(), documents, strict=True):
            self.index.add(length, document)
        self.stats = PackingStats.of(state)


def pack_with_cropping(
    documents: Iterable[Sequence[int] | np.ndarray], row_length: int, buffer_size: int = BUFFER_SIZE
) -> Iterator[np.ndarray]:
    """Rows `(row_length,)` of int32 tokens, packed by best fit with cropping; see `BestFitPacker`."""
    return BestFitPacker(row_length, buffer_size).pack(documents)


def pack_with_padding(
    sequences: Iterable[tuple[Sequence[int], Sequence[int]]],
    row_length: int,
    pad_token_id: int,
    stats: PackingStats,
    buffer_size: int = BUFFER_SIZE,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Conversations to rows without cropping any that fits a row.

    Args:
        sequences: pairs (ids, mask) of equal length, mask 1 where a token is trained on. One that trains nothing within
            a row is left out.
        row_length: tokens in a row; a longer sequence loses its end.
        pad_token_id: what fills the rest of a row; it is never a target.
        stats: counts what becomes of everything.
        buffer_size: sequences to choose from.

    Yields:
        `input_ids` and `labels`, both int32 `(row_length,)`, labels not shifted and -100 where not trained on.
    """
    source, index = iter(sequences), LengthIndex()
    while True:
        input_ids = np.full(row_length, pad_token_id, dtype=np.int32)
        labels = np.full(row_length, IGNORE_INDEX, dtype=np.int32)
        filled = 0
        while True:
            _refill_with_conversations(index, source, row_length, buffer_size, stats)
            found = index.pop_largest(row_length - filled)
            if found is None:
                break
            length, (ids, targets) = found
            input_ids[filled : filled + length], labels[filled : filled + length] = ids, targets
            filled += length
            stats.sequences += 1
        if not filled:
            return
        stats.rows, stats.tokens = stats.rows + 1, stats.tokens + filled
        stats.trained_tokens += int((labels != IGNORE_INDEX).sum())
        stats.padding_tokens += row_length - filled
        yield input_ids, labels


def _refill_with_conversations(
    index: LengthIndex, source: Iterator, row_length: int, buffer_size: int, stats: PackingStats
) -> None:
    while len(index) < buffer_size:
        pair = next(source, None)
        if pair is None:
            return
        ids, mask = pair
        if len(ids) != len(mask):
            raise ValueError(f"ids and mask must be of equal length, not {len(ids)} and {len(mask)}")
        trained = np.asarray(mask[:row_length]) == 1
        if not trained[1:].any():  # the first token of a row is no target
            stats.untrained_sequences += 1
            continue
        if len(ids) > row_length:
            stats.trimmed_sequences += 1
            stats.cropped_tokens += len(ids) - row_length
        ids = np.asarray(ids[:row_length], dtype=np.int32)
        index.add(len(ids), (ids, np.where(trained, ids, IGNORE_INDEX)))
