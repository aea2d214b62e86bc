"""A model's folder on the Hub: which of its files go there, and their upload in one commit.

What goes is named here (`PUBLISHED`), so nothing that merely lies in the folder does: no training arguments, which hold
a token, no packed conversations, no record with the paths of a machine. A commit shows all of its files or none. Large
files are sent before it and kept by the Hub under their hashes, so an upload that broke off sends, when it is begun
again, only those that are missing. A card that a person edited on the Hub stays, unless this one was edited too.
`HfApi.upload_folder` is not used: it may make several commits.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from modeling_nanochat.training.model_card import NAME as CARD
from modeling_nanochat.training.model_card import is_own

PUBLISHED = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py", "custom_generate/*",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "*.jinja", "adapter_config.json",
    "README.md", "LICENSE*", "NOTICE*", "curves/*.png", ".eval_results/*.yaml",
)  # fmt: skip
# Of these, what an earlier commit has and this one has not would be loaded instead, or beside: it is removed.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.py")


def published_files(folder: str | Path) -> list[str]:
    """The files of a model's folder that go to the Hub, relative to it."""
    return [name for name in files_of(Path(folder)) if any(matches(name, pattern) for pattern in PUBLISHED)]


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def matches(name: str, pattern: str) -> bool:
    """As `fnmatch`, but a star does not reach into folders."""
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def create_repository(name: str, private: bool | None = None, token: str | None = None) -> str:
    """Make sure that the repository is there, and that this token may write to it; returns `owner/name`.

    Raises:
        OSError: it may not, or the Hub cannot be reached.
    """
    try:
        return HfApi(token=token).create_repo(name, private=private, exist_ok=True).repo_id
    except Exception as error:  # whatever the client, the network or the Hub raises
        raise OSError(f"{name} cannot be pushed to: {reason(error)}") from error


def upload(
    folder: str | Path,
    repository: str,
    message: str,
    *,
    files: Sequence[str] | None = None,
    contents: Mapping[str, bytes] | None = None,
    subfolders: Mapping[str, str | Path] | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Upload a model in one commit.

    Args:
        folder: what holds it.
        repository: `owner/name`, which exists.
        message: title of the commit.
        files: names of those that go; `published_files` by default.
        contents: further files by their names, or others in the place of those in the folder.
        subfolders: whole folders by the names they get there, such as a checkpoint to resume from.

    Raises:
        OSError: it did not succeed, in one line; what was sent by then need not be sent again.
    """
    folder, contents = Path(folder), dict(contents or {})
    files = published_files(folder) if files is None else files
    sources: dict[str, str | bytes] = {name: str(folder / name) for name in files} | contents
    for name, place in (subfolders or {}).items():
        sources |= {f"{name}/{each}": str(Path(place, each)) for each in files_of(Path(place))}
    api = HfApi(token=token)
    try:
        there = api.list_repo_files(repository, revision=revision)
        both = CARD in sources and CARD in there
        if both and is_own(as_text(sources[CARD])) and is_of_a_person(api, repository, revision):
            del sources[CARD]
        stale = [name for name in there
                 if name not in sources and any(matches(name, pattern) for pattern in REPLACED)]  # fmt: skip
        operations = [CommitOperationAdd(name, source) for name, source in sources.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        return api.create_commit(repository, operations, commit_message=message, revision=revision)
    except Exception as error:  # as above
        raise OSError(f"{folder} was not pushed to {repository}: {reason(error)}") from error


def is_of_a_person(api: HfApi, repository: str, revision: str | None) -> bool:
    """Whether the card on the Hub was edited, in its pages or elsewhere."""
    return not is_own(Path(api.hf_hub_download(repository, CARD, revision=revision)).read_text(encoding="utf-8"))


def as_text(source: str | bytes) -> str:
    return source.decode() if isinstance(source, bytes) else Path(source).read_text(encoding="utf-8")


def reason(error: BaseException) -> str:
    """Why the Hub was of no use, in one line: the first lines of the message and of what caused it."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    lines = [next(iter(str(each).strip().splitlines()), type(each).__name__).rstrip(".") for each in chain]
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        lines.append("is there a token (`hf auth login`, or the variable HF_TOKEN), and does it allow to write?")
    elif server := getattr(error, "server_message", None):
        lines.append(server)
    return ": ".join(dict.fromkeys(lines))
