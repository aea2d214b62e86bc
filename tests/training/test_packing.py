"""Packing: the rows of the obvious slow algorithm, exact resumption, and nothing cropped that fits in SFT."""

import random

import numpy as np
import pytest
import torch

from modeling_nanochat.training.data.packing import BestFitPacker, PackingStats, pack_with_cropping, pack_with_padding


def scan_and_crop(documents: list[list[int]], row_length: int, buffer_size: int) -> list[list[int]]:
    """The obvious twin: scan the whole buffer for every document placed."""
    waiting, buffer, rows = list(documents), [], []
    while True:
        row = []
        while len(row) < row_length:
            while waiting and len(buffer) < buffer_size:
                buffer.append(waiting.pop(0))
            if not buffer:
                return rows
            room = row_length - len(row)
            fitting = [document for document in buffer if len(document) <= room]
            if fitting:
                chosen = max(fitting, key=len)  # the first of the longest
            else:
                chosen = min(buffer, key=len)  # the first of the shortest
            del buffer[next(i for i, document in enumerate(buffer) if document is chosen)]
            row += chosen[:room]
        rows.append(row)


def random_documents(seed: int, count: int, longest: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randint(1, 30000) for _ in range(rng.randint(1, rng.randint(1, longest)))] for _ in range(count)]


@pytest.mark.parametrize(
    ("row_length", "buffer_size", "longest"), [(17, 8, 40), (33, 1, 20), (64, 50, 64), (9, 30, 300)]
)
def test_rows_equal_those_of_the_slow_twin(row_length, buffer_size, longest):
    documents = random_documents(row_length, 400, longest)
    expected = scan_and_crop(documents, row_length, buffer_size)
    rows = list(pack_with_cropping(documents, row_length, buffer_size))
    assert len(rows) > 10
    assert [row.tolist() for row in rows] == expected


def test_every_token_is_placed_or_counted_as_cropped():
    documents = random_documents(1, 300, 50)
    packer = BestFitPacker(40, buffer_size=20)
    rows = list(packer.pack(documents))
    stats = packer.stats
    assert stats.rows == len(rows) and stats.tokens == 40 * len(rows) and stats.utilisation == 1.0
    unfinished = sum(map(len, documents)) - stats.tokens - stats.cropped_tokens
    assert 0 <= unfinished < 40
    assert stats.cropped_share == stats.cropped_tokens / (stats.tokens + stats.cropped_tokens) > 0


@pytest.mark.parametrize("rows_before", [0, 1, 7])
def test_a_saved_packer_continues_exactly(rows_before, tmp_path):
    documents = random_documents(2, 300, 60)
    uninterrupted = [row.tolist() for row in BestFitPacker(25, 16).pack(documents)]
    packer, source = BestFitPacker(25, 16), iter(documents)
    rows = packer.pack(source)
    begun = [next(rows).tolist() for _ in range(rows_before)]
    torch.save(packer.state_dict(), tmp_path / "state.pt")

    resumed = BestFitPacker(25, 16)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.stats == packer.stats
    continued = [row.tolist() for row in resumed.pack(source)]
    assert begun + continued == uninterrupted
    next(resumed.pack([[5]] * 99))
    assert resumed.stats != packer.stats  # nothing is shared with the packer that was saved


def test_a_huge_document_keeps_only_what_a_row_can_use():
    huge = np.arange(2_500_000, dtype=np.int32)
    packer = BestFitPacker(100, buffer_size=2)
    row = next(packer.pack([huge, huge]))
    assert row.tolist() == list(range(100))
    assert packer.state_dict()["tokens"].numel() == 100
    assert packer.stats.cropped_tokens == 2_500_000 - 100


def test_empty_documents_and_no_documents():
    assert list(pack_with_cropping([], 8)) == []
    assert [row.tolist() for row in pack_with_cropping([[], [1, 2], [], [3, 4]], 2)] == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="positive"):
        BestFitPacker(0)


def test_padded_rows_hold_every_conversation_whole():
    rng = random.Random(3)
    sequences = []
    for number in range(200):
        length = rng.randint(2, 30)
        ids = [1000 + number] * length  # a conversation is told by its number
        sequences.append((ids, [rng.randint(0, 1) for _ in range(length - 1)] + [1]))
    rows, labels, stats = pack(sequences, 32, pad_token_id=7, buffer_size=50)
    assert rows.shape == labels.shape == (stats.rows, 32)
    for number, (ids, mask) in enumerate(sequences):
        place = rows == 1000 + number
        assert place.any(axis=1).sum() == 1 and place.sum() == len(ids)  # whole, in one row
        assert labels[place].tolist() == [token if trained else -100 for token, trained in zip(ids, mask)]
    assert (labels[rows == 7] == -100).all()
    assert stats.sequences == 200 and stats.trimmed_sequences == 0
    assert stats.padding_tokens == (rows == 7).sum() and stats.trained_tokens == (labels != -100).sum()
    assert stats.utilisation == stats.tokens / rows.size > 0.95


def pack(sequences, row_length, **options):
    """Rows and labels as arrays, and the counts."""
    stats = PackingStats()
    made = list(pack_with_padding(sequences, row_length, stats=stats, **options))
    rows = np.array([row for row, _ in made]).reshape(-1, row_length)
    return rows, np.array([labels for _, labels in made]).reshape(-1, row_length), stats


def test_padded_rows_are_filled_by_best_fit():
    sequences = [([length] * length, [1] * length) for length in (3, 6, 4, 5)]
    rows, _, _ = pack(sequences, 10, pad_token_id=0)
    assert rows.tolist() == [[6] * 6 + [4] * 4, [5] * 5 + [3] * 3 + [0] * 2]


def test_a_conversation_longer_than_a_row_is_trimmed_and_counted():
    rows, labels, stats = pack([(list(range(1, 26)), [0] * 5 + [1] * 20), ([50, 51], [0, 1])], 10, pad_token_id=0)
    assert rows.tolist() == [list(range(1, 11)), [50, 51] + [0] * 8]
    assert labels[0].tolist() == [-100] * 5 + [6, 7, 8, 9, 10]
    assert (stats.trimmed_sequences, stats.cropped_tokens, stats.sequences) == (1, 15, 2)
    with pytest.raises(ValueError, match="equal length"):
        pack([([1, 2], [1])], 10, pad_token_id=0)


def test_a_conversation_that_trains_nothing_within_a_row_is_left_out_and_counted():
    sequences = [([1] * 12, [0] * 10 + [1] * 2), ([2, 2], [0, 1]), ([3, 3], [1, 0]), ([], [])]
    rows, labels, stats = pack(sequences, 10, pad_token_id=0)
    assert rows.tolist() == [[2, 2] + [0] * 8] and (stats.untrained_sequences, stats.sequences) == (3, 1)
    assert (labels != -100).sum() == stats.trained_tokens == 1
    assert stats.trimmed_sequences == stats.cropped_tokens == 0


def test_stats_of_nothing():
    rows, _, stats = pack([], 10, pad_token_id=0)
    assert rows.shape == (0, 10) and stats == PackingStats()
    assert stats.utilisation == stats.cropped_share == 0.0
