"""CORE's evaluation bundle on this disk: fetched once, whole or not at all."""

import shutil
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from accelerate import PartialState

TIMEOUT = 60  # seconds without an answer


def provide_bundle(folder: str, url: str) -> Path:
    """The bundle's folder, fetched from `url` (a zip, with `core.yaml` at its top or one folder deeper) if missing.

    Raises:
        ValueError: it is not there and could not be fetched.
    """
    bundle = Path(folder)
    with PartialState().local_main_process_first():
        if not bundle.exists():
            fetch_bundle(bundle, url)
    return bundle


def fetch_bundle(bundle: Path, url: str) -> None:
    bundle.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=bundle.parent, prefix=f".{bundle.name}-") as place:
        archive, unpacked = Path(place, "bundle.zip"), Path(place, "unpacked")
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as source, archive.open("wb") as file:
                shutil.copyfileobj(source, file)
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(unpacked)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{bundle} is not there and {url} could not be fetched ({error}); expected upstream's eval_bundle.zip, "
                "unpacked (--core_bundle FOLDER)"
            ) from error
        tables = sorted(unpacked.glob("core.yaml")) + sorted(unpacked.glob("*/core.yaml"))
        if not tables:
            raise ValueError(f"{url} holds no core.yaml; expected upstream's eval_bundle.zip")
        tables[0].parent.rename(bundle)
