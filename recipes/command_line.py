"""How every recipe reads its settings, and how it fails: configs found by name, one line of error.

    nanochat prepare_data --config demo/data    # recipes/configs/demo/data.yaml, wherever the package lies
    accelerate launch -m modeling_nanochat.recipes.pretrain --config demo/pretrain    # on several devices

What a user can get wrong is a `ValueError` or an `OSError` anywhere below: it ends the process with one line and exit
code 2; NANOCHAT_TRACEBACK=1 shows where it came from. Anything else is a fault of this code and keeps its traceback.
"""

import argparse
import ctypes
import errno
import itertools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from modeling_nanochat.recipes.stages.record import is_main_process
from modeling_nanochat.training.ranks import meet
from modeling_nanochat.training.trainers.settings import unused_settings
from modeling_nanochat.training.trainers.stopping import Stopped

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
CONFIGS = Path(__file__).with_name("configs")


def run(recipe: Callable[[], None]) -> None:
    """Run a recipe's `main`; what the user got wrong becomes one line on the error stream, and exit code 2."""
    end_with_launcher()
    # TRL sets what Transformers calls deprecated: nothing that a user of a recipe could mend.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
    try:
        meet()
        recipe()
    except Stopped as stopped:
        if is_main_process():
            print(f"{program()}: {stopped}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(128 + stopped.number) from None
    except (KeyboardInterrupt, SystemError) as error:
        if not isinstance(error.__cause__ or error, KeyboardInterrupt):  # on its way through C it becomes the other
            raise
        print(f"{program()}: stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except (ValueError, OSError) as error:
        if os.environ.get("NANOCHAT_TRACEBACK"):
            raise
        print(f"{program()}: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def end_with_launcher() -> None:
    """Be sent SIGTERM when `accelerate launch` dies of one, which it does not pass on to a single process: the run
    would go on, unseen. Linux only."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ and os.getppid() != 1:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def program() -> str:
    """What was called, as messages name it."""
    return Path(sys.argv[0]).stem if "/" in sys.argv[0] else sys.argv[0]


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full: {error.filename or 'a file'} could not be written; expected free space"
    return " ".join(str(error).split()) or type(error).__name__


def parse(*classes: type, refused: Mapping[str, str] | None = None) -> tuple[Any, ...]:
    """An instance of each dataclass from `--config FILE.yaml` and the command line, which wins.

    A config that is no file is looked for by its name among the shipped ones. Settings that would do nothing are
    neither taken nor shown by `--help`: those that a class of training arguments inherits and does not use, and
    those in `refused`, with what to use instead.

    Raises:
        ValueError: for a config that is not there, or a setting that does not exist or would do nothing.
    """
    from trl import TrlParser  # here: `nanochat` alone needs none of it

    unused = {name: instead for each in classes for name, instead in unused_settings(each).items()} | (refused or {})
    arguments = with_config_found(sys.argv[1:])
    for name in given_settings(arguments):
        if name in unused:
            raise ValueError(f"--{name} would do nothing here; use {unused[name]}")
    parser = TrlParser(classes, allow_abbrev=False)
    for action in parser._actions:
        if action.dest in unused:
            action.help = argparse.SUPPRESS
    parser.usage = f"{sys.argv[0]} [--config FILE.yaml] [--setting value ...]"
    return parser.parse_args_and_config(args=arguments)


def given_settings(arguments: Sequence[str]) -> list[str]:
    """The names set on the command line and in the config."""
    names = [part[2:].split("=")[0].replace("-", "_") for part in arguments if part.startswith("--")]
    if "--config" in arguments[:-1]:
        config = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text(encoding="utf-8"))
        names += [str(name) for name in config] if isinstance(config, dict) else []
    return names


def with_config_found(arguments: Sequence[str]) -> list[str]:
    """The arguments with the file that `--config` means in the place of its name."""
    arguments = list(itertools.chain(*(each.split("=", 1) if each.startswith("--config=") else [each]
                                       for each in arguments)))  # fmt: skip
    if "--config" in arguments[:-1]:
        at = arguments.index("--config") + 1
        arguments[at] = str(find_config(arguments[at]))
    return arguments


def find_config(name: str) -> Path:
    """`name` if it is a file, else the shipped config of that name, with or without `.yaml`.

    Raises:
        ValueError: if it is neither.
    """
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
    raise ValueError(f"--config {name} is no file; expected a YAML file or one of {', '.join(shipped)}")
