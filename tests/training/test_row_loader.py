"""The data of a run: every rank gets its rows, and a saved position gives the same rows to any number of ranks."""

import numpy as np
import pytest
import torch

from modeling_nanochat.training.data.row_loader import BATCHES_BETWEEN_COPIES, RowLoader

LENGTH = 4  # T


class CountingRows:
    """Rows of one number each, which tells the stream and the place in it."""

    def __init__(self, stream: int, streams: int):
        self.stream, self.place = stream, 0

    def __next__(self) -> np.ndarray:
        self.place += 1
        return np.full(LENGTH + 1, 1000 * self.stream + self.place - 1, dtype=np.int32)

    def state_dict(self) -> dict:
        return {"place": self.place}

    def load_state_dict(self, state: dict) -> None:
        self.place = state["place"]


def take(loaders: list[RowLoader], batches: int) -> list[int]:
    """What all ranks are given in so many micro-batches, in the order of the run's rows."""
    iterators = [iter(loader) for loader in loaders]
    numbers = []
    for _ in range(batches):
        parts = [next(iterator) for iterator in iterators]
        for place in range(loaders[0].rows):
            numbers += [int(part["input_ids"][place, 0]) for part in parts]
    for iterator in iterators:
        iterator.close()
    return numbers


def make_loaders(rows: int, ranks: int, streams: int | None = None) -> list[RowLoader]:
    return [RowLoader(CountingRows, rows, LENGTH, rank=rank, ranks=ranks, streams=streams) for rank in range(ranks)]


def test_batches_hold_inputs_and_all_targets():
    class Ramp(CountingRows):
        def __next__(self):
            return np.arange(LENGTH + 1, dtype=np.int32)

    batch = next(iter(RowLoader(Ramp, 2, LENGTH)))
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3]] * 2 and batch["input_ids"].dtype == torch.int64
    assert batch["shift_labels"].tolist() == [[1, 2, 3, 4]] * 2


def test_each_rank_reads_its_own_stream():
    first, second = make_loaders(rows=2, ranks=2)
    assert (first.own_streams, second.own_streams) == ([0], [1])
    assert take([first, second], 2) == [0, 1000, 1, 1001, 2, 1002, 3, 1003]


@pytest.mark.parametrize(("before", "after"), [((3, 2), (6, 1)), ((6, 1), (3, 2)), ((2, 2), (1, 4)), ((4, 3), (3, 2))])
def test_position_is_for_any_number_of_ranks(tmp_path, before, after):
    """(rows, ranks) before and after: the rows of the run stay the same and in the same order."""
    straight = make_loaders(*before)
    taken = 12 * (BATCHES_BETWEEN_COPIES + 3)  # rows, some of them after a copy of the streams' states
    first_half = take(straight, taken // (before[0] * before[1]))
    for loader in straight:
        loader.save(tmp_path)
    resumed = make_loaders(*after)
    for loader in resumed:
        loader.load(tmp_path)
    second_half = take(resumed, 24 // (after[0] * after[1]))

    expected = take(make_loaders(1, 1, streams=before[1]), taken + 24)
    assert first_half + second_half == expected


def test_what_was_made_ahead_is_not_skipped(tmp_path):
    loader = RowLoader(CountingRows, 1, LENGTH)
    iterator = iter(loader)
    assert [int(next(iterator)["input_ids"][0, 0]) for _ in range(3)] == [0, 1, 2]  # more lie in the queue
    loader.save(tmp_path)
    again = RowLoader(CountingRows, 1, LENGTH)
    again.load(tmp_path)
    assert int(next(iter(again))["input_ids"][0, 0]) == 3


def test_errors_reach_the_reader(tmp_path):
    class Broken(CountingRows):
        def __next__(self):
            raise ValueError("row group 3 is corrupt")

    with pytest.raises(ValueError, match="row group 3 is corrupt"):
        next(iter(RowLoader(Broken, 1, LENGTH)))
    with pytest.raises(ValueError, match=r"holds no rows_of_stream_\*\.pt"):
        RowLoader(CountingRows, 1, LENGTH).load(tmp_path)
