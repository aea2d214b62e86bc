"""Rows of tokens -> batches for one rank, made ahead of training, with a position that any number of ranks can resume.

The data of a run is a fixed number of streams of packed rows, by default one for each rank of its first start. Row i of
the run comes from stream i mod streams, and goes to rank i mod ranks. So the ranks of an ordinary run read their own
stream and nothing else, and a run that is resumed on another number of ranks sees the very same rows in the very same
optimizer steps; the price there is that several streams are read by one rank, or one stream by several.

A thread tokenises, packs and pins while the device computes. The position that is saved is that of the last batch
handed out, not of the last one made: a copy of each stream's state taken now and then, and the rows since.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from math import gcd
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

BATCHES_AHEAD = 8  # enough to ride out a slow document; at 32 x 2049 tokens about 4 MB
BATCHES_BETWEEN_COPIES = 32  # resuming replays at most this many batches: less than a second of packing


class RowStream(Protocol):
    """An endless stream of rows (T + 1,) that can say where it is, in what `torch.load(weights_only=True)` reads."""

    def __next__(self) -> np.ndarray: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class RowLoader:
    """Endless batches `{"input_ids", "shift_labels"}`, each (rows, T) int64: all T targets of a row count.

    Args:
        open_stream: called with (stream, streams), gives that stream of rows of T + 1 tokens from its beginning.
        rows: rows of a micro-batch on one rank.
        sequence_length: T.
        rank, ranks: this process and how many there are.
        streams: number of streams of the run; as many as ranks if None. A loaded position brings its own number.
        device: where the batches go.

    `open_streams` are the streams this rank is reading, by number: for their statistics.
    """

    def __init__(
        self,
        open_stream: Callable[[int, int], RowStream],
        rows: int,
        sequence_length: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        streams: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self.open_stream, self.rows, self.sequence_length = open_stream, rows, sequence_length
        self.rank, self.ranks = rank, ranks
        self.device = torch.device(device)
        self.streams = streams or ranks
        self.open_streams: dict[int, RowStream] = {}
        # Of the last batch that was handed out: rows of the whole run, and each stream's state at an earlier row.
        self.position = {"states": {}, "copied_at": 0, "row": 0}

    @property
    def own_streams(self) -> list[int]:
        """The streams some of whose rows go to this rank."""
        shared = gcd(self.streams, self.ranks)
        return [stream for stream in range(self.streams) if stream % shared == self.rank % shared]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        ready: queue.Queue = queue.Queue(maxsize=BATCHES_AHEAD)
        stop = threading.Event()
        worker = threading.Thread(target=self._work, args=(ready, stop), daemon=True, name="rows")
        worker.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                batch, self.position = item
                batch = batch.to(self.device, non_blocking=True)  # (rows, T + 1)
                yield {"input_ids": batch[:, :-1], "shift_labels": batch[:, 1:]}
        finally:
            stop.set()
            while worker.is_alive():  # it may be waiting for room
                while not ready.empty():
                    ready.get_nowait()
                worker.join(timeout=0.01)

    def _work(self, ready: queue.Queue, stop: threading.Event) -> None:
        try:
            for item in self._batches():
                ready.put(item)
                if stop.is_set():
                    return
        except BaseException as error:
            ready.put(error)

    def _batches(self) -> Iterator[tuple[torch.Tensor, dict]]:
        """Batches with the position after each. Every stream advances past the rows of all ranks."""
        position = self.position
        self.open_streams = streams = {stream: self.open_stream(stream, self.streams) for stream in self.own_streams}
        for stream, state in position["states"].items():
            streams[stream].load_state_dict(state)
        self._rows(streams, position["copied_at"], position["row"])  # replayed, thrown away
        for made in itertools.count():
            if made % BATCHES_BETWEEN_COPIES == 0:
                states = {stream: rows.state_dict() for stream, rows in streams.items()}
                position = {"states": states, "copied_at": position["row"], "row": position["row"]}
            end = position["row"] + self.rows * self.ranks
            batch = torch.from_numpy(np.stack(self._rows(streams, position["row"], end))).long()  # (rows, T + 1)
            position = {**position, "row": end}
            yield batch.pin_memory() if self.device.type == "cuda" else batch, position

    def _rows(self, streams: dict[int, RowStream], begin: int, end: int) -> list[np.ndarray]:
        """Take the streams of this rank from row `begin` of the run to row `end`; gives the rows that are its own."""
        own = []
        for index in range(begin, end):
            if (stream := streams.get(index % self.streams)) is not None:
                row = next(stream)
                if index % self.ranks == self.rank:
                    own.append(row)
        return own

    def save(self, folder: str | Path) -> None:
        """Write the position into a checkpoint: one file for each stream, by the first rank that reads it."""
        position = self.position
        for stream, state in position["states"].items():
            if stream % gcd(self.streams, self.ranks) == self.rank:
                record = {"copied_at": position["copied_at"], "row": position["row"], "state": state}
                torch.save(record, Path(folder) / f"rows_of_stream_{stream:05d}.pt")

    def load(self, folder: str | Path) -> None:
        """Go on, from the next `iter`, where a checkpoint of any number of ranks left off.

        Raises:
            ValueError: the folder holds no position.
        """
        files = sorted(Path(folder).glob("rows_of_stream_*.pt"))
        if not files:
            raise ValueError(f"{folder} holds no rows_of_stream_*.pt; expected a checkpoint written by PretrainTrainer")
        self.streams = len(files)
        records = {stream: torch.load(files[stream], weights_only=True) for stream in self.own_streams}
        first = records[self.own_streams[0]]
        states = {stream: record["state"] for stream, record in records.items()}
        self.position = {"states": states, "copied_at": first["copied_at"], "row": first["row"]}
