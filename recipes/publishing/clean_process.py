"""Whether a stranger can load a folder: Python as it is for somebody who has torch and transformers and nothing else.

The process runs without this package: isolated from the working folder, PYTHONPATH and installed hooks, and what is
imported is only what torch and transformers themselves ask for. It runs the very lines that the card tells people to
type, and must answer something.
"""

import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

from modeling_nanochat.training.model_card import snippet

GIVEN = ("torch", "transformers")
MINUTES = 30  # for a large model on a slow disk
START = """
import importlib.machinery, json, sys

folders, allowed, code = json.loads(sys.stdin.read())
sys.path += folders


class Only(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name not in allowed:
            path = [each for each in sys.path if each not in folders]
        return super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Only
import torch
torch.set_num_threads(THREADS)
from transformers.utils import logging
logging.disable_progress_bar()
logging.set_verbosity_error()
torch.manual_seed(0)
exec(compile(code, "the card", "exec"))
"""


def answer(folder: str | Path, *, chat: bool, threads: int = 1) -> str:
    """What the model in a folder answers to the card's question there.

    Raises:
        ValueError: it cannot be loaded there, or says nothing; the message has the last line of the error.
    """
    folder = Path(folder).resolve()
    folders = list(dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))))
    asked = json.dumps([folders, sorted(importable(GIVEN)), snippet(folder, str(folder), chat=chat)])
    with tempfile.TemporaryDirectory() as home:
        environment = {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "HOME": home}
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", START.replace("THREADS", str(threads))],
                input=asked, capture_output=True, text=True, cwd=home, env=environment, timeout=60 * MINUTES,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ValueError(f"{folder} did not answer within {MINUTES} minutes in a clean process") from None
    if done.returncode:
        last = next(iter(reversed(done.stderr.strip().splitlines())), f"exit code {done.returncode}")
        raise ValueError(f"{folder} cannot be used by somebody without this package: {last}")
    text = done.stdout.strip()
    if not text:
        raise ValueError(f"{folder} loads, but answers nothing; expected some text")
    return text


def importable(names: tuple[str, ...]) -> set[str]:
    """Top-level modules of the packages, of what these require, and so on; extras left out."""
    modules: set[str] = set()
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another platform
            continue
        for file in package.files or ():
            modules.add(file.parts[0].split(".")[0])
        for requirement in package.requires or ():
            if "extra ==" not in requirement:
                waiting.append(re.match(r"[\w.-]+", requirement)[0])
    return modules - {"..", ""}
