"""Conversations => token ids with masks => packed rows on disk: the data of fine-tuning, with memory that stays flat.

    lines of JSON, in a shuffled order  ->  ids and mask of each  ->  best fit into rows  ->  one Arrow file

Nothing is held but the places of the lines (8 bytes each), a thousand conversations to choose from, and a few rows: the
main process streams a mixture of any size through once, and all ranks read the rows it wrote through a memory map. The
price is 8 bytes of disk a token while a run lasts, and that all ranks must see one file system, as for checkpoints.

A conversation that cannot be rendered is an error which names file, line and what is wrong; or, if the user says so, it
is left out and counted.
"""

import json
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from modeling_nanochat.tokenization_nanochat_gpt import render_conversation
from modeling_nanochat.training.data.packing import PackingStats, pack_with_padding
from modeling_nanochat.training.whole_files import write_whole_file

CONVERSATIONS_AT_ONCE = 64  # that a process renders, and rows that are written together
ERRORS_SHOWN = 3
Rendered = tuple[str, list[int], list[int]]  # what is wrong (or nothing), ids, mask


class ConversationFile:
    """The conversations of a JSON lines file, read where they lie, always in the same shuffled order.

    Args:
        file: lines `{"messages": [...]}`; other fields are left alone, empty lines skipped.
        seed: of the order.
        limit: how many of them, at most; all if None.

    Raises:
        ValueError: there is no such file.
    """

    def __init__(self, file: str | Path, seed: int = 0, limit: int | None = None):
        if not Path(file).is_file():
            raise ValueError(f'{file} does not exist; expected JSON lines, each {{"messages": [...]}}')
        self.file = str(file)
        starts, numbers, position = [], [], 0
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    starts.append(position)
                    numbers.append(number)
                position += len(line)
        order = np.random.default_rng(seed).permutation(len(starts))[:limit]
        self.starts, self.numbers = np.array(starts, dtype=np.int64)[order], np.array(numbers, dtype=np.int64)[order]

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """{"line": as it stands there, "where": file and line number}."""
        with open(self.file, "rb") as lines:
            for start, number in zip(self.starts, self.numbers):
                lines.seek(start)
                yield {"line": lines.readline(), "where": f"{self.file}:{number}"}


def messages_of(row: dict[str, Any]) -> Any:
    """The messages of a row, which may be given as such, as their JSON, or as a line that is not parsed yet."""
    if "line" in row:
        parsed = json.loads(row["line"])
        if not isinstance(parsed, dict) or "messages" not in parsed:
            raise ValueError(f'expected {{"messages": [...]}} in one line, got {row["line"][:80]!r}')
        return parsed["messages"]
    return json.loads(row["messages"]) if isinstance(row["messages"], str) else row["messages"]


def in_chunks(items: Iterable[Any], size: int = CONVERSATIONS_AT_ONCE) -> Iterator[list[Any]]:
    items = iter(items)
    return iter(lambda: list(islice(items, size)), [])


def render_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """A row as ids and mask, or what is wrong with it, in one line."""
    try:
        messages = messages_of(row)
        if not isinstance(messages, list):
            raise ValueError(f"messages must be a list, not {messages!r}")
        return "", *render_conversation(tokenizer, messages)
    except json.JSONDecodeError as error:
        reason = f"no JSON ({error.msg} at character {error.pos})"
    except ValueError as error:
        reason = " ".join(str(error).split())[:400]
    return f"{row['where']}: {reason}", [], []


def render_all(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, processes: int | None = None
) -> Iterator[Rendered]:
    """`render_row` of all rows in their order; by several processes, few chunks ahead of what is taken, if told so."""
    if not processes or processes == 1:
        yield from (render_row(row, tokenizer) for row in rows)
        return
    chunks, context = in_chunks(rows), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, for all of them
    with ProcessPoolExecutor(processes, context, initializer=_keep_tokenizer, initargs=(tokenizer,)) as pool:
        waiting = deque(pool.submit(_render_chunk, chunk) for chunk in islice(chunks, 2 * processes))
        while waiting:
            yield from waiting.popleft().result()
            waiting.extend(pool.submit(_render_chunk, chunk) for chunk in islice(chunks, 1))


def _keep_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    global _tokenizer
    _tokenizer = tokenizer


def _render_chunk(rows: list[dict[str, Any]]) -> list[Rendered]:
    return [render_row(row, _tokenizer) for row in rows]


@dataclass
class PackedConversations:
    """What became of a data set: the counts of the packing, and the conversations that could not be rendered."""

    packing: PackingStats = field(default_factory=PackingStats)
    skipped: int = 0
    errors: list[str] = field(default_factory=list)  # the first few

    def figures(self) -> dict[str, float]:
        """For logs and reports: counts, and shares between 0 and 1."""
        return {
            "conversations": self.packing.sequences,
            "rows": self.packing.rows,
            "tokens": self.packing.tokens,
            "trained_tokens": self.packing.trained_tokens,
            "trained_share": self.packing.trained_tokens / max(self.packing.tokens, 1),
            "utilisation": self.packing.utilisation,
            "trimmed_conversations": self.packing.trimmed_sequences,
            "untrained_conversations": self.packing.untrained_sequences,
            "skipped_conversations": self.skipped,
        }


def write_rows(
    file: Path,
    rows: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    row_length: int,
    *,
    skip_bad: bool = False,
    processes: int | None = None,
) -> PackedConversations:
    """Render, pack and write: `input_ids` and `labels` of every row, int32, as an Arrow stream.

    Raises:
        ValueError: a conversation cannot be rendered, unless `skip_bad`.
    """
    packed = PackedConversations()

    def rendered() -> Iterator[tuple[list[int], list[int]]]:
        for wrong, ids, mask in render_all(rows, tokenizer, processes):
            if not wrong:
                yield ids, mask
                continue
            if not skip_bad:
                raise ValueError(f"{wrong}. --skip_bad_conversations true leaves such out and counts them")
            packed.skipped += 1
            packed.errors += [wrong] if len(packed.errors) < ERRORS_SHOWN else []

    made = pack_with_padding(rendered(), row_length, tokenizer.pad_token_id, packed.packing)
    schema = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})

    def write(path: Path) -> None:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            for chunk in in_chunks(made):
                columns = [pa.array(list(column), type=pa.list_(pa.int32())) for column in zip(*chunk)]
                stream.write_batch(pa.record_batch(columns, schema=schema))

    write_whole_file(file, write)
    return packed


def rows_for_all_ranks(
    file: Path, write: Callable[[Path], PackedConversations], is_main_process: bool
) -> tuple[Dataset, PackedConversations]:
    """Let the main process write the rows; every rank gets them through a memory map, or its error."""
    outcome: list[Any] = [None]
    if is_main_process:
        try:
            outcome = [write(file)]
        except (ValueError, OSError) as error:
            outcome = [error]
    (packed,) = broadcast_object_list(outcome)
    if isinstance(packed, Exception):
        raise packed
    return Dataset.from_file(str(file)), packed
