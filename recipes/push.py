"""Pushes a finished model to the Hub in one commit, after trying whether a stranger can use it.

    nanochat push --model out/demo/rl --repo you/nanochat-demo --dry_run     # writes and tries what would be uploaded
    nanochat push --model out/demo/rl --repo you/nanochat-demo --private

First the folder is written that is uploaded: weights, code, tokenizer, a card made from the records of the stages, its
curves and results. Then it is loaded and asked a question in a process that has torch and transformers only, as on
somebody else's machine. What can go wrong goes wrong before anything is online; an upload that breaks off is gone on
with by the same command. The price is loading the model once, on the CPU.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.publishing.card import is_chat, write_model_card
from modeling_nanochat.recipes.publishing.clean_process import answer
from modeling_nanochat.recipes.publishing.history import history
from modeling_nanochat.recipes.stages.lock import held
from modeling_nanochat.recipes.stages.numbers import readable_number
from modeling_nanochat.recipes.stages.record import check_as_left
from modeling_nanochat.training import hub
from modeling_nanochat.training.model_card import NAME as CARD
from modeling_nanochat.training.model_card import is_own
from modeling_nanochat.training.whole_files import whole_folder

FOLDER = Path("out/push")


@dataclass
class PushArguments:
    """What is pushed, and where."""

    repo: str = field(metadata={"help": "Name on the Hub: owner/name, or name for your own account."})
    model: str = field(default="out/demo/rl", metadata={"help": "Folder of a finished model."})
    private: bool = field(
        default=False, metadata={"help": "Make a new repository private; without it as your account's settings say."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the weights for the card, such as mit; none by default."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Write and try what would be uploaded, and upload nothing."})

    def check(self) -> None:
        """`ValueError` for a name that is none, or a folder without a model."""
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise ValueError(f"--repo {self.repo} is no name for the Hub, expected owner/name: {error}") from None
        if not Path(self.model, "config.json").is_file():
            raise ValueError(
                f"--model {self.model} holds no model (no config.json); expected the folder of a trained one"
            )


def main() -> None:
    (arguments,) = parse(PushArguments)
    push(arguments)


def push(arguments: PushArguments) -> None:
    """Write the folder, try it, upload it.

    Raises:
        ValueError: the folder cannot be used by a stranger.
        OSError: the Hub did not take it.
    """
    arguments.check()
    check_as_left(arguments.model)
    repository = arguments.repo
    if not arguments.dry_run:  # first: what cannot be pushed need not be tried
        repository = hub.create_repository(repository, arguments.private or None)
    folder = FOLDER / repository
    with held(folder.parent, f".{folder.name}.lock"):
        write_folder(arguments, repository, folder)
        chat = is_chat(history(arguments.model))
        print(f"asked in a process with torch and transformers only, it answers: {answer(folder, chat=chat)!r}")
        if arguments.dry_run:
            print(f"nothing was uploaded; what would be is in {folder}")
            return
        commit = hub.upload(folder, repository, f"Upload {Path(arguments.model).resolve().name}")
        shutil.rmtree(folder)
        print(f"pushed in one commit: {commit.commit_url}")


def write_folder(arguments: PushArguments, repository: str, folder: Path) -> None:
    """What is uploaded: links to the model's files where the disk allows it, and its card for the Hub."""
    model = Path(arguments.model)
    files = [name for name in hub.published_files(model) if not is_rewritten(model, name)]
    with whole_folder(folder) as partial:
        for name in files:
            link_or_copy(model / name, partial / name)
        said = write_model_card(model, repository, arguments.license, into=partial)
    print(f"{folder}: {', '.join(f'{name} ({size_of(folder / name)})' for name in hub.published_files(folder))}")
    left_out = sorted({name.split("/")[0] for name in set(hub.files_of(model)) - set(hub.published_files(model))})
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    if said:
        print(f"the card is the one in {model}, which a person has edited" + named_otherwise(model, repository))


def is_rewritten(model: Path, name: str) -> bool:
    """What belongs to a card that is made anew."""
    own_card = not (model / CARD).is_file() or is_own((model / CARD).read_text(encoding="utf-8"))
    return own_card and (name == CARD or name.startswith("curves/"))


def named_otherwise(model: Path, repository: str) -> str:
    text = (model / CARD).read_text(encoding="utf-8")
    return "" if repository in text else f"; it does not name {repository} as what to load"


def link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)  # of a file in the Hub's cache, which is a link itself
    except OSError:  # another disk, or one that knows no links
        shutil.copyfile(source, target)


def size_of(file: Path) -> str:
    return readable_number(file.stat().st_size).strip() + "B"


if __name__ == "__main__":
    run(main)
