"""From documents to what a run reads: the training rows of this rank, and the validation batches.

    documents => ids => rows => batches
    documents.py  bulk_encoding.py  packing.py, packed_rows.py  row_loader.py

Everything that measures or trains on packed documents asks here, so that all of them see the same rows: those of
validation do not depend on the number of ranks. The price is that every rank packs all validation rows.
"""

from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedTokenizerBase

from modeling_nanochat.training.data.documents import DocumentSource
from modeling_nanochat.training.data.packed_rows import PackedRows
from modeling_nanochat.training.data.packing import IGNORE_INDEX
from modeling_nanochat.training.data.row_loader import RowLoader


@dataclass(frozen=True)
class RowSource:
    """Documents, what encodes them, T tokens of a row, and which of how many ranks reads."""

    documents: DocumentSource
    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    rank: int = 0
    ranks: int = 1

    def training(self, rows: int, device: torch.device | str = "cpu") -> RowLoader:
        """Endless batches of `rows` rows for this rank, from the beginning."""

        def open_stream(stream: int, streams: int) -> PackedRows:
            return PackedRows(
                self.documents, self.tokenizer, self.sequence_length + 1, stream=stream, num_streams=streams
            )

        return RowLoader(open_stream, rows, self.sequence_length, rank=self.rank, ranks=self.ranks, device=device)

    def validation(self, tokens: int, rows: int) -> list[dict[str, torch.Tensor]]:
        """This rank's share of about `tokens` tokens of validation rows, in batches of at most `rows`.

        Returns:
            `{"input_ids", "shift_labels"}`, (B, T) int64 each; as many batches on every rank, which sharded weights
            need: where rows run out, rows without a target stand in.

        Raises:
            ValueError: the validation documents do not fill a single row.
        """
        length = self.sequence_length
        packed = PackedRows(self.documents, self.tokenizer, length + 1, split="validation")
        found = [torch.from_numpy(row).long() for row in islice(packed, max(1, tokens // length))]  # (T + 1,) each
        if not found:
            raise ValueError(
                f"the validation documents do not fill one row of {length} tokens; expected more documents or a "
                "shorter sequence_length"
            )
        empty = {"input_ids": found[0][:-1], "shift_labels": torch.full((length,), IGNORE_INDEX)}
        own = [{"input_ids": row[:-1], "shift_labels": row[1:]} for row in found[self.rank :: self.ranks]]
        own += [empty] * (-(-len(found) // self.ranks) - len(own))
        return [
            {name: torch.stack([row[name] for row in own[start : start + rows]]) for name in empty}
            for start in range(0, len(own), rows)
        ]
