"""Documents -> tokens -> rows: one stream of packed rows whose position can be saved between any two rows.

The state holds the packer's buffer and the position of the next document to be read, so a stream that is loaded goes on
with exactly the rows that would have come. The price is its size: the beginnings of a thousand documents, some
megabytes, in each checkpoint.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from modeling_nanochat.training.data.documents import DocumentSource, Position, stream_documents
from modeling_nanochat.training.data.packing import BUFFER_SIZE, BestFitPacker, PackingStats
from modeling_nanochat.training.data.shard_files import changed_documents
from modeling_nanochat.training.tokenizer import BulkEncoder


class PackedRows:
    """An iterator of rows `(row_length,)`, int32; endless for training, one pass for validation.

    Args:
        source: the documents.
        tokenizer: a byte-level fast tokenizer with a BOS token.
        row_length: tokens in a row, the context length plus one.
        split: `train` or `validation`.
        stream: which of `num_streams` equal shares of the documents this is.
        buffer_size: documents the packer chooses from.
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: PreTrainedTokenizerBase,
        row_length: int,
        *,
        split: str = "train",
        stream: int = 0,
        num_streams: int = 1,
        buffer_size: int = BUFFER_SIZE,
    ):
        self.source, self.split, self.stream, self.num_streams = source, split, stream, num_streams
        self.encode = BulkEncoder(tokenizer)
        self.packer = BestFitPacker(row_length, buffer_size)
        self.position = Position()
        self.rows = self.packer.pack(self._documents())

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        return next(self.rows)

    def _documents(self) -> Iterator[np.ndarray]:
        """Token ids of the documents from `position` on, which follows what the packer has taken."""
        documents = stream_documents(
            self.source, self.split, stream=self.stream, num_streams=self.num_streams, position=self.position
        )
        for text, position in documents:
            self.position = position
            yield self.encode(text)

    @property
    def stats(self) -> PackingStats:
        """Counts of the rows given so far."""
        return self.packer.stats

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands between two rows: plain numbers and tensors."""
        return {
            "documents": dict(self.source.identity),
            "position": list(self.position),
            "packer": self.packer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the row after the one at which `state` was taken.

        Raises:
            ValueError: the documents are not those that were read then.
        """
        if changes := changed_documents(state["documents"], self.source.identity):
            raise ValueError(
                f"the documents are not those that the run began with ({changes}), so its position in them means "
                "nothing; expected the same files, or --rerun true"
            )
        self.position = Position(*state["position"])
        self.packer.load_state_dict(state["packer"])
        self.rows = self.packer.pack(self._documents())
