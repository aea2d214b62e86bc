"""One stage of a run: says what is about to happen, remembers what came out, and skips what is already done.

Every recipe that produces a folder wraps its work in a `Stage`. What a stage did is written last and whole, as
`stage.json` in that folder: its arguments, the state of its inputs, its results, its log and the machine. A stage is
done when that file exists and was made with the same arguments from the same inputs, as in make; so running a
pipeline again costs nothing, and changing one setting redoes that stage and what follows from it.

A record vouches for the files beside it by their hashes, and is withdrawn before the first of them changes. Inputs are
known by their contents: the hashes in the record of the stage that made them, or for a user's own files size and a
sample of the bytes (whole, up to 16 MB). The price is reading what a stage left once more, at its end and before it is
called done. Of several ranks the first one reads, and tells the others.
"""

import dataclasses
import datetime
import glob
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from modeling_nanochat.recipes.stages.lock import NAME as LOCK
from modeling_nanochat.recipes.stages.lock import release as release_lock
from modeling_nanochat.recipes.stages.lock import take as take_lock
from modeling_nanochat.recipes.stages.numbers import readable_number, readable_time
from modeling_nanochat.recipes.stages.sentences import sentence
from modeling_nanochat.training.ranks import launched, on_main_process
from modeling_nanochat.training.whole_files import CHECKSUMS, STAGING, checksums, damage, sampled_hash, write_json

FILE_NAME = "stage.json"
# Where a run writes, where it is pushed, and how it is resumed or restarted, does not change what it computes; and a
# token belongs into no file.
NOT_PART_OF_THE_WORK = {
    "output_dir", "rerun", "resume_from_checkpoint", "logging_dir", "run_name", "disable_tqdm",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision",
}  # fmt: skip
# What a person may rewrite, and a later stage may add to: the model's card and what belongs to it.
NOT_VOUCHED_FOR = ("README.md", "curves", ".eval_results")
BEGUN = "stage.begun.json"
OWN_FILES = (FILE_NAME, BEGUN, LOCK)


class Stage:
    """The record of one stage.

    Args:
        name: what the stage is called in messages and in the report.
        output_dir: folder the stage fills; `stage.json` appears there when it is finished.
        arguments: dataclass instances that say how the work is done; only what differs from the defaults is kept.
        inputs: files, folders or Hub names that the stage reads.
        rerun: do the work even if it is done.
    """

    def __init__(
        self, name: str, output_dir: str, arguments: Iterable[Any], inputs: Sequence[str] = (), rerun: bool = False
    ):
        self.name = name
        self.output_dir = Path(output_dir)
        self.file = self.output_dir / FILE_NAME
        self.begun = self.output_dir / BEGUN
        self.identity = {
            "name": name,
            "arguments": {key: value for part in arguments for key, value in changed_fields(part).items()},
            "inputs": on_main_process(lambda: {str(path): fingerprint(path) for path in inputs}),
        }
        self.rerun = rerun
        self.goes_on = False  # from a checkpoint in the folder
        self.facts: dict[str, Any] = {}
        self.started = time.time()

    def is_done(self) -> bool:
        """True, with a line that says so, when the same work from the same inputs has been finished before and what it
        left is still there, to the byte."""
        return on_main_process(self._is_done)

    def _is_done(self) -> bool:
        record = read_stage(self.output_dir)
        if self.rerun or record is None:
            return False
        if {key: record.get(key) for key in self.identity} != self.identity:
            self.say("settings or inputs have changed since the last run: doing it again")
            return False
        if found := damage(self.output_dir, record.get("files", {})):
            self.say(f"{self.output_dir} is not as it was left ({found}): doing it again")
            return False
        self.say(f"already done in {self.output_dir} (--rerun true does it again)")
        return True

    def can_continue(self) -> bool:
        """True if the same work was begun here and not finished: its checkpoints belong to this run."""
        return not self.rerun and read_json(self.begun) == self.identity

    def announce(self, **facts: Any) -> None:
        """Print one line about what will happen (`parameters, tokens, flops, seconds, bytes` in readable units), and
        `begin`."""
        self.facts = facts
        self.begin()
        self.say(", ".join(describe(key, value) for key, value in facts.items()) + f" -> {self.output_dir}")

    def begin(self) -> None:
        """Before the first file changes: lock the folder, withdraw the record of what was there, and note what has
        begun, so that an interrupted run can be told from another one (`can_continue`). Checkpoints of a run that is
        not gone on with are removed."""
        if is_main_process():
            take_lock(self.output_dir)
            if read_json(self.begun) != self.identity:
                write_json(self.begun, self.identity)
            self.file.unlink(missing_ok=True)
            shutil.rmtree(self.output_dir / STAGING, ignore_errors=True)  # what a killed process left half written
            for old in [] if self.goes_on else list(self.output_dir.glob("checkpoint-*")):
                shutil.rmtree(old)

    def finish(self, results: dict[str, Any], log_history: Sequence[dict] = (), samples: Sequence[dict] = ()) -> None:
        """Write the record (main process only) and print what came out."""
        seconds = time.time() - self.started
        if not is_main_process():
            return
        record = {
            **self.identity,
            "announced": self.facts,
            "results": results,
            "seconds": seconds,
            "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "git": git_state(),
            "machine": describe_machine(),
            "samples": list(samples),
            "log_history": [{name: finite_or_none(value) for name, value in line.items()} for line in log_history],
            "files": files_of_a_stage(self.output_dir),
        }
        write_json(self.file, record)
        self.begun.unlink(missing_ok=True)
        release_lock(self.output_dir / LOCK)
        shown = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in results.items() if isinstance(value, (int, float, str)))  # fmt: skip
        self.say(f"done in {readable_time(seconds)}" + (f": {shown}" if shown else ""))
        if said := sentence(record):
            self.say(said)

    def say(self, text: str) -> None:
        """Print one line of this stage, from the main process only."""
        if is_main_process():
            print(f"[{self.name}] {text}", flush=True)


def read_stage(folder: str | Path) -> dict[str, Any] | None:
    """The record that a finished stage left in `folder`, or None."""
    return read_json(Path(folder) / FILE_NAME)


def read_stages(run: Path) -> list[dict[str, Any]]:
    """The records of the finished stages in the subfolders of a run, each with its `folder`.

    Raises:
        ValueError: there is none.
    """
    files = sorted(run.glob(f"*/{FILE_NAME}"))
    records = [record | {"folder": file.parent.name} for file in files if (record := read_json(file)) is not None]
    if not records:
        others = f" ({', '.join(found)})" if run.is_dir() and (found := unfinished_stages(run)) else ""
        raise ValueError(f"no stage has been finished in {run}{others}; expected at least one {run}/*/{FILE_NAME}")
    return records


def unfinished_stages(run: Path) -> list[str]:
    """The stages of a run that `read_stages` has no record of, each with the reason."""
    reasons = []
    for folder in sorted(path for path in run.iterdir() if path.is_dir()):
        if (folder / FILE_NAME).exists():
            reasons += [f"{folder.name} ({FILE_NAME} cannot be read)"] if read_stage(folder) is None else []
        elif (folder / BEGUN).exists():
            reasons.append(f"{folder.name} (begun and not finished)")
    return reasons


def read_json(file: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None if it is not there, or was cut off (then it says nothing that can be relied on)."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def files_of_a_stage(folder: Path) -> dict[str, str]:
    """sha256 of what a stage leaves behind."""
    return checksums(folder, is_vouched_for)


def finite_or_none(value: Any) -> Any:
    """JSON has no infinity and nothing that is not a number: a log's figure that is one becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def changed_fields(arguments: Any) -> dict[str, Any]:
    """The fields of a dataclass instance that differ from its defaults, as JSON values."""
    changed = {}
    for field in dataclasses.fields(arguments):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value = getattr(arguments, field.name)
        if field.name not in NOT_PART_OF_THE_WORK and not field.name.startswith("_") and value != default:
            changed[field.name] = value
    return json.loads(json.dumps(changed, default=str))


def fingerprint(path: str | Path) -> str:
    """What identifies the state of an input: what the record of the stage that made it vouches for (the record of the
    folder itself, or of one or two above), and names, sizes and contents of all other files that are there, also of
    those that a pattern such as `texts/*.parquet` finds; else, as of the Hub, its name.

    Raises:
        ValueError: a stage made the input, and it is no longer as the stage left it.
    """
    path = Path(path)
    if (path / CHECKSUMS).is_file() and (found := damage(path)):
        raise ValueError(f"{path} is damaged: {found}; expected a whole checkpoint")
    files = {file for found in map(Path, glob.glob(str(path))) for file in files_below(found)}
    hashes: dict[str, str] = {}
    for folder in [each for each in (path, *path.parents[:2]) if (each / FILE_NAME).is_file()][:1]:
        record = read_stage(folder) or {}
        inside = {name: digest for name, digest in record.get("files", {}).items()
                  if path in (folder / name, *(folder / name).parents)}  # fmt: skip
        if found := damage(folder, inside):
            raise ValueError(
                f"{folder} is not as the stage {record['name']} left it: {found}; expected what its {FILE_NAME} "
                "vouches for: run that stage again, or remove its record to use the folder as it is"
            )
        hashes |= inside
        files -= {folder / name for name in inside}
    top = path.parent if path.is_file() or not path.exists() else path
    hashes |= {os.path.relpath(file, top): sampled_hash(file) if file.exists() else "nothing" for file in files}
    return digest_of(hashes) if hashes else "by name"


def check_as_left(path: str | Path) -> None:
    """`ValueError` if a stage made what is there, and it is no longer as the stage left it."""
    fingerprint(path)


def files_below(path: Path) -> Iterator[Path]:
    """A file, or all files below a folder that a stage could vouch for; links that point nowhere are files too."""
    if path.is_file() or not path.exists():
        yield path
    for file in path.rglob("*"):
        if (file.is_file() or not file.exists()) and is_vouched_for(file.relative_to(path)):
            yield file


def is_vouched_for(name: Path) -> bool:
    """Whether a file belongs to what a stage leaves: not checkpoints, which only an unfinished run needs, nor what is
    half written, nor records, nor the model's card."""
    first = name.parts[0]
    return first not in (*OWN_FILES, STAGING, *NOT_VOUCHED_FOR) and not first.startswith("checkpoint-")


def digest_of(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]


def describe_machine() -> dict[str, Any]:
    """Processor, accelerators, memory and versions, for the report."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":")[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "world_size": launched(),
    }


def git_state() -> str | None:
    """The commit of this code, with a word if files differ from it; None where it is not in a clone."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + (", with changes" if changed.stdout.strip() else "")


def describe(key: str, value: Any) -> str:
    if key == "seconds":
        return f"about {readable_time(value)}"
    if key == "flops":
        return f"{readable_number(value)}FLOP"
    if key == "bytes":
        return f"{readable_number(value)}B"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{readable_number(value)} {key.replace('_', ' ')}".replace("  ", " ")
    return f"{key.replace('_', ' ')} {value}"
