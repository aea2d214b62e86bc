"""`make hf-tests`: Transformers' own common tests of a model and a configuration, run against this one.

They are the library's word on how a model behaves: saving, loading, resizing, checkpointing, attention kernels, output
capture, compilation, offload. The wheel does not carry them but the source distribution does: pip fetches it once,
verified by its hash before anything in it is read. Some folders the tests import are in neither; `STAND_INS` fills in
the few names they take from there. The tests of generation are not in the distribution either: TRANSFORMERS_TESTS names
the folder `tests` of a checkout of the same version, and they run too; without it pytest shows them as skipped. What
generation and export must do is tested by this project's own tests as well.

Needs the package index, so it is no part of `make test`. Further arguments go to pytest (`-k resize`).
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[2]
VERSION = "5.23.0"  # of constraints.txt; another version needs its own hash here
SHA256 = "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71"
CACHE = ROOT / "out" / "hf-tests" / VERSION
PACKAGE = CACHE / "transformers_tests"
CHECKOUT, GENERATION = "TRANSFORMERS_TESTS", "generation/test_utils.py"
TAKEN = ("test_modeling_common.py", "test_configuration_common.py", "test_training_mixin.py")
STAND_INS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    GENERATION: (
        "import unittest\n\n\n"
        "class GenerationTesterMixin:\n"
        "    @unittest.skip('TRANSFORMERS_TESTS names no folder with generation/test_utils.py')\n"
        "    def test_generation(self):\n"
        "        pass\n"
    ),
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {\n"
        "    'return_dict': False,\n"
        "    'output_hidden_states': True,\n"
        "    'output_attentions': True,\n"
        "    'dtype': 'float16',\n"
        "    'chunk_size_feed_forward': 5,\n"
        "    'architectures': ['BestModel'],\n"
        "    'problem_type': 'regression',\n"
        "    'id2label': {0: 'label'},\n"
        "    'label2id': {'label': 0},\n"
        "}\n"
    ),
}


def fetch() -> Path:
    """The source distribution, downloaded unless it is in the cache already."""
    archive = CACHE / f"transformers-{VERSION}.tar.gz"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        requirements = CACHE / "requirements.txt"
        requirements.write_text(f"transformers=={VERSION} --hash=sha256:{SHA256}\n")
        options = ["--no-deps", "--no-binary", "transformers", "--dest", str(CACHE), "--requirement", str(requirements)]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options], check=True)
    return archive


def lay_out(archive: Path) -> None:
    """Writes the wanted test files and their stand-ins as the package `transformers_tests`."""
    files = {name: text.encode() for name, text in STAND_INS.items()}
    if checkout := os.environ.get(CHECKOUT):
        files[GENERATION] = (Path(checkout) / GENERATION).read_bytes()
    with tarfile.open(archive) as source:
        for name in TAKEN:
            files[name] = source.extractfile(f"transformers-{VERSION}/tests/{name}").read()
    for name, content in files.items():
        path = PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def main() -> None:
    if transformers.__version__ != VERSION:
        raise SystemExit(f"transformers is {transformers.__version__}, expected {VERSION}, whose tests these are")
    checkout = os.environ.get(CHECKOUT)
    if checkout and not (Path(checkout) / GENERATION).is_file():
        raise SystemExit(
            f"{CHECKOUT}={checkout} has no {GENERATION}; expected the folder `tests` of Transformers {VERSION}"
        )
    if not checkout:
        print(f"{CHECKOUT} names no folder `tests` of a checkout: the tests of generation are skipped", flush=True)
    lay_out(fetch())
    tests = str(Path(__file__).with_name("common_tests.py"))
    paths = os.pathsep.join([str(ROOT), str(CACHE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = [
        "-q",
        "--override-ini",
        "addopts=",
        "--disable-warnings",
        "-n",
        "2",
        "--dist",
        "worksteal",
    ]  # their marks
    command = [sys.executable, "-m", "pytest", tests, *options, *sys.argv[1:]]
    raise SystemExit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
