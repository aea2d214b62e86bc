"""Where pretraining text comes from: shards of documents, dealt to streams, with a position to continue from.

A source is a list of units (row groups of local parquet files, or shards of any data set that `datasets` can stream:
the Hub, JSON lines, plain text). The last shard is validation, the others are training; a source of a single shard
holds out every 100th document instead. `stream_documents` deals the units to the ranks' streams in a stride and gives
every document with the position after it, so a run goes on at the very next document.

Footers and columns of local files are checked when a source is opened: a truncated download is an error at the start,
not hours later. A source knows its files by size and contents, so that a run is not resumed, unnoticed, on other ones.
The price is a second or so for thousands of files.
"""

import glob
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from modeling_nanochat.training.data.shard_files import LOCAL_FORMATS, find_files, first_fault, format_of, known_files

HOLD_OUT = 100  # of a source with a single shard, every 100th document is validation
UNIT_STEP = 61  # documents of unit u are numbered from 61 u: no common factor with 100, so small units hold out fairly
SPLITS = ("train", "validation")


class Position(NamedTuple):
    """Where a stream of documents goes on: the next document of a unit in an epoch."""

    epoch: int = 0
    unit: int = 0
    document: int = 0


BEGINNING = Position()


class DocumentSource(Protocol):
    """Units of documents. `single_shard` says that both splits share the units and validation is held out of them."""

    single_shard: bool
    identity: dict[str, str]  # what the documents are, to be compared when a run is resumed

    def units(self, split: str) -> Sequence[Any]:
        """The units of `train` or `validation`, in order."""

    def read(self, unit: Any, start: int) -> Iterator[str | None]:
        """The documents of a unit from number `start` on."""


class ParquetDocuments:
    """Local parquet files; a unit is a row group.

    Args:
        files: the shards in order, the last one for validation.
        text_column: the column that holds a document in each row.

    Raises:
        ValueError: a file that is no complete parquet file, or lacks the column, or whose column is no text.
    """

    def __init__(self, files: Sequence[Path], text_column: str = "text"):
        self.text_column = text_column
        self.single_shard = len(files) == 1
        self.identity = known_files(files)
        shards = [[(file, group) for group in range(self._check(file))] for file in files]
        training = shards if self.single_shard else shards[:-1]
        self._units = {"train": list(itertools.chain.from_iterable(training)), "validation": shards[-1]}

    def _check(self, file: Path) -> int:
        """Number of row groups of a readable file."""
        try:
            with pq.ParquetFile(file) as parquet:
                schema, groups = parquet.schema_arrow, parquet.num_row_groups
        except PermissionError as error:
            raise ValueError(
                f"{file} may not be read by this user ({error.strerror}); expected read permission"
            ) from error
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file} is not a complete parquet file ({error}); remove it and download or prepare it again"
            ) from error
        if self.text_column not in schema.names:
            raise ValueError(f"{file} has no column {self.text_column!r}, only {schema.names}; set text_column")
        kind = schema.field(self.text_column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"column {self.text_column!r} of {file} must hold text, not {kind}")
        return groups

    def units(self, split: str) -> Sequence[tuple[Path, int]]:
        return self._units[split]

    def read(self, unit: tuple[Path, int], start: int) -> Iterator[str | None]:
        file, group = unit
        try:
            with pq.ParquetFile(file) as parquet:
                column = parquet.read_row_group(group, columns=[self.text_column]).column(0)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"row group {group} of {file} is damaged ({error}); download or prepare it again"
            ) from error
        for index in range(start, len(column)):
            try:
                yield column[index].as_py()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"row {index} of row group {group} of {file} is not UTF-8 ({error.reason}); expected text"
                ) from error


class StreamedDocuments:
    """Anything that `datasets` can stream; a unit is a shard of it.

    Args:
        dataset: a `datasets.IterableDataset`.
        text_column: the column that holds a document in each row.
        name: what to call it in errors.
        files: the local files it comes from, if it does.

    Raises:
        ValueError: there is no row, no such column, or the rows cannot be read.
    """

    def __init__(self, dataset: Any, text_column: str = "text", name: str = "the data set", files: Sequence[Path] = ()):
        self.dataset, self.text_column, self.name, self.files = dataset, text_column, name, files
        self.single_shard = dataset.num_shards == 1
        self.identity = known_files(files) if files else {name: f"{dataset.num_shards} shards"}
        first = next(self._rows(dataset), None)
        if first is None:
            raise ValueError(f"{name} is empty")
        if text_column not in first:
            raise ValueError(f"{name} has no text column {text_column!r}, only {list(first)}; set text_column")

    def units(self, split: str) -> Sequence[int]:
        shards = range(self.dataset.num_shards)
        if self.single_shard:
            return shards
        return shards[:-1] if split == "train" else shards[-1:]

    def read(self, unit: int, start: int) -> Iterator[str | None]:
        shard = self.dataset.shard(num_shards=self.dataset.num_shards, index=unit)
        for number, row in enumerate(self._rows(shard.skip(start)), start=start):
            text = row[self.text_column]
            if not (text is None or isinstance(text, str)):
                raise ValueError(
                    f"row {number} of shard {unit} of {self.name} holds {text!r:.80} in column {self.text_column!r}, "
                    "expected text"
                )
            yield text

    def _rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from dataset
        except Exception as error:  # whatever a builder raises; its own words rarely say where
            reason = next(filter(None, map(first_fault, self.files)), f"{self.name}: {error}")
            raise ValueError(f"documents cannot be read: {reason}") from error


def open_documents(name: str | Sequence[str], text_column: str = "text") -> DocumentSource:
    """The documents behind a name in a YAML file.

    Args:
        name: local files, folders or globs (parquet, or JSON lines, text, CSV), one or several; or a data set on the
            Hub, with its subset after a colon if it has several: `HuggingFaceFW/fineweb-edu:sample-10BT`.
        text_column: the column that holds the text.

    Raises:
        ValueError: nothing is there, or it cannot be read, or it has no such column.
    """
    names = [name] if isinstance(name, str) else list(name)
    files = find_files(names)
    if files:
        formats = {format_of(file) for file in files}
        if formats == {"parquet"}:
            return ParquetDocuments(files, text_column)
        if len(formats) > 1:
            raise ValueError(f"{names} mixes files of several formats, {sorted(formats)}; name those of one")
        return StreamedDocuments(load_streaming(formats.pop(), files=files), text_column, ", ".join(names), files)
    if len(names) == 1 and not is_local_path(names[0]):
        return StreamedDocuments(load_streaming(names[0]), text_column, names[0])
    raise ValueError(f"no files with an ending of {list(LOCAL_FORMATS)} in {names}")


def is_local_path(name: str) -> bool:
    """Whether a name can only be meant as a path: a Hub name is `owner/name`, without wildcards or file endings."""
    return (
        Path(name).exists()
        or format_of(Path(name)) is not None
        or name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or glob.has_magic(name)
    )


def load_streaming(name: str, files: Sequence[Path] | None = None, split: str = "train") -> Any:
    """`datasets.load_dataset(..., streaming=True)` of `owner/name` or `owner/name:subset`, or of local files."""
    from datasets import load_dataset  # takes seconds, and local parquet needs none of it

    path, _, subset = name.partition(":")
    data_files = [str(file) for file in files] if files else None
    try:
        return load_dataset(path, subset or None, data_files=data_files, split=split, streaming=True)
    except Exception as error:  # whatever the network, the Hub or a builder raises
        if files:
            fault = next(filter(None, map(first_fault, files)), f"{type(error).__name__} {error}".strip())
            raise ValueError(f"{', '.join(map(str, files))} cannot be read: {fault}") from error
        raise ValueError(f"{name} is neither a local path nor a data set that could be opened: {error}") from error


def stream_documents(
    source: DocumentSource,
    split: str,
    *,
    stream: int = 0,
    num_streams: int = 1,
    position: Position = BEGINNING,
) -> Iterator[tuple[str, Position]]:
    """Documents of one stream, each with the position after it; training repeats for ever, validation ends.

    Units go to streams in a stride. If there are fewer units than streams, the documents do.

    Raises:
        ValueError: no document in a whole epoch (all empty, or too few for so many streams).
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    units = source.units(split)
    deal_units = len(units) >= num_streams
    for epoch in itertools.count(position.epoch):
        start = position if epoch == position.epoch else BEGINNING
        found = 0
        for unit in range(start.unit, len(units)):
            if deal_units and unit % num_streams != stream:
                continue
            first = start.document if unit == start.unit else 0
            for index, text in enumerate(source.read(units[unit], first), first):
                number = unit * UNIT_STEP + index
                kind, number = hold_out(number) if source.single_shard else (split, number)
                if kind == split and text and (deal_units or number % num_streams == stream):
                    found += 1
                    yield text, Position(epoch, unit, index + 1)
        if split == "validation":
            return
        if not found and start[1:] == BEGINNING[1:]:
            raise ValueError(f"stream {stream} of {num_streams} finds no document with text in {len(units)} units")


def hold_out(number: int) -> tuple[str, int]:
    """The split of a document of a single shard, and its number within that split."""
    block, place = divmod(number, HOLD_OUT)
    return ("train", number - block - 1) if place else ("validation", block)
