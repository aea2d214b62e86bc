"""Local files of documents: which they are, what they hold by hash, and where one of them breaks."""

import glob
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from modeling_nanochat.training.whole_files import sampled_hash

LOCAL_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv"}


def format_of(file: Path) -> str | None:
    """The format that a file's ending names, packed or not; None if it names none, or for macOS's `._` companions."""
    return None if file.name.startswith("._") else LOCAL_FORMATS.get(Path(file.name.removesuffix(".gz")).suffix)


def find_files(names: Sequence[str]) -> list[Path]:
    """Files of a known format named by paths, folders and globs, sorted within each; empty if there are none.

    Raises:
        ValueError: a link that points nowhere.
    """
    found: list[Path] = []
    for name in names:
        paths = sorted(Path(name).iterdir()) if Path(name).is_dir() else sorted(map(Path, glob.glob(name)))
        for path in filter(format_of, paths):
            if path.is_symlink() and not path.exists():
                raise ValueError(
                    f"{path} is a link to {path.readlink()}, which is not there; expected a file, or no link"
                )
            found += [path] if path.is_file() else []
    return found


def first_fault(file: Path) -> str | None:
    """Where a text or JSON lines file breaks, and why; None if it does not."""
    if not file.stat().st_size:
        return f"{file} is empty"
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8")
                if format_of(file) == "json" and text.strip():
                    json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:
                return f"{file}:{number} holds half a surrogate pair, expected whole characters"
            except UnicodeDecodeError as error:
                place = f"byte {line[error.start]:#04x} at {error.start}"
                return f"{file}:{number} is not UTF-8 ({place}), expected UTF-8 text"
            except json.JSONDecodeError as error:
                return f"{file}:{number} is no JSON ({error.msg}), got {text.strip()[:60]!r}"
    return None


def known_files(files: Sequence[Path]) -> dict[str, str]:
    """Size and hash of every file by its name.

    Raises:
        ValueError: the last file, which is validation, is also among the others.
    """
    hashes = [sampled_hash(file) for file in files]
    if hashes[-1] in hashes[:-1]:
        raise ValueError(
            f"{files[-1]}, the last shard and so the validation set, is the same as {files[hashes.index(hashes[-1])]}, "
            "which is trained on; expected different files"
        )
    return {file.name: digest for file, digest in zip(files, hashes)}


def changed_documents(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """What has changed between two identities of a source, in words; None if nothing has."""
    missing, new = [name for name in before if name not in now], [name for name in now if name not in before]
    changed = [name for name in before if name in now and now[name] != before[name]]
    parts = [f"{what}: {', '.join(names[:5])}" for what, names in
             (("missing", missing), ("new", new), ("changed", changed)) if names]  # fmt: skip
    return "; ".join(parts) or None
