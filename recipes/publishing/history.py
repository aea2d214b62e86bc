"""How a model came to be: the records of the stages that led to it, and what an evaluation found.

Records name their inputs by paths, as they were typed; they are looked for from here, and from the folders above the
model's. A model whose ancestors are elsewhere has a shorter history, and nothing is guessed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_nanochat.recipes.evaluation.identity import model_hash
from modeling_nanochat.recipes.stages.record import FILE_NAME, read_stage

Record = dict[str, Any]
LEVELS = 3  # a stage's input is its folder, or lies so many levels below it


@dataclass(frozen=True)
class Done:
    """A finished stage: where, and its record."""

    folder: Path
    record: Record

    @property
    def name(self) -> str:
        return self.record["name"]

    @property
    def arguments(self) -> Record:
        return self.record["arguments"]

    @property
    def results(self) -> Record:
        return self.record["results"]

    @property
    def inputs(self) -> list[str]:
        return list(self.record["inputs"])


@dataclass(frozen=True)
class Measured:
    """What `nanochat evaluate` found of a model: its column, and the stage it stands in."""

    figures: Record
    stage: Done

    @property
    def date(self) -> float:
        """Of the record, in seconds since the epoch."""
        return (self.stage.folder / FILE_NAME).stat().st_mtime


def history(folder: str | Path) -> list[Done]:
    """The stages that led to a model, itself last; each once, after those it rests on."""
    found: dict[Path, Done] = {}
    follow(Path(folder), Path(folder), found)
    return list(found.values())


def follow(place: Path, start: Path, found: dict[Path, Done]) -> None:
    stage = stage_of(place)
    if stage is None or stage.folder.resolve() in found:
        return
    for name in stage.inputs:
        if (path := find(name, start)) is not None:
            follow(path, start, found)
    found[stage.folder.resolve()] = stage


def stage_of(path: Path) -> Done | None:
    """The stage that made a file or folder."""
    for folder in [path, *path.parents][:LEVELS]:
        record = read_stage(folder) if folder.is_dir() else None
        if record is not None:
            return Done(folder, record)
    return None


def find(name: str, start: Path) -> Path | None:
    """An input by the name in a record: seen from here, or from any folder above `start`."""
    return next((root / name for root in roots(start) if (root / name).exists()), None)


def roots(start: Path) -> Iterator[Path]:
    yield Path()
    yield from start.resolve().parents


def measured(folder: str | Path) -> Measured | None:
    """The latest evaluation of just these weights, among the stages beside the model's folder."""
    folder = Path(folder)
    own, found = None, []
    for file in folder.resolve().parent.glob(f"*/{FILE_NAME}"):
        stage = Done(file.parent, read_stage(file.parent) or {"name": ""})
        if stage.name != "eval":
            continue
        columns = dict(zip(stage.arguments.get("weights") or {}, stage.results))
        for model, column in columns.items():
            if (path := find(model, folder)) is None or path.resolve() != folder.resolve():
                continue
            own = own or model_hash(str(folder))
            if stage.arguments["weights"][model] == own:
                found.append(Measured(stage.results[column], stage))
    return max(found, key=lambda each: each.date, default=None)
