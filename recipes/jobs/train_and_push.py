# /// script
# requires-python = ">=3.10"
# dependencies = ["uv"]
#
# [tool.hf-jobs]
# flavor = "a10g-small"
# timeout = "2h"
# secrets = ["HF_TOKEN"]
# ///
"""Trains on a GPU rented from the Hub, and pushes the models: a job's disk is gone when it ends.

    hf jobs uv run -v .:/code recipes/jobs/train_and_push.py --repo you/nanochat-demo
    hf jobs uv run -v .:/code --flavor a100-large --timeout 12h recipes/jobs/train_and_push.py \\
        --repo you/nanochat-d12 --recipe speedrun --depth 12

From the root of a clone, which is mounted read-only at /code. `demo` is `make demo`, a few minutes; `speedrun` is
recipes/speedrun.sh. The header above says machine, time limit and that the job gets your token; the flags of `hf jobs`
win over it, and `--dry-run` shows what would be submitted. `--show` prints the commands instead of running them. If the
training fails, what was finished is pushed all the same; a job that its time limit ends pushes nothing, so leave room.
What a job costs is its time: `hf jobs hardware` has the prices.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

WORK = Path("/tmp/nanochat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repo", required=True, help="owner/name on the Hub; -base and -sft are added for the others")
    parser.add_argument("--recipe", choices=("demo", "speedrun"), default="demo")
    parser.add_argument("--depth", type=int, default=12, help="of the speedrun")
    parser.add_argument("--code", type=Path, default=Path("/code"), help="where the clone is mounted")
    parser.add_argument("--work", type=Path, default=WORK, help="where it is copied to, with room for the data")
    parser.add_argument("--show", action="store_true", help="print the commands and run nothing")
    arguments = parser.parse_args()
    if not (arguments.code / "recipes").is_dir():
        sys.exit(f"{arguments.code} is no clone of the project; expected `hf jobs uv run -v .:/code ...` from its root")
    training, pushes = training_of(arguments), pushes_of(arguments)
    if arguments.show:
        print("\n".join(shlex.join(command) for command in [*training, *pushes.values()]))
        return
    if not os.environ.get("HF_TOKEN"):
        sys.exit("there is no HF_TOKEN, so nothing could be pushed; expected `--secrets HF_TOKEN`")
    left_out = shutil.ignore_patterns(".git", ".venv", ".venv-docs", "out")
    shutil.copytree(arguments.code, arguments.work, dirs_exist_ok=True, ignore=left_out)
    trained = all(run(command, arguments.work) for command in training)
    finished = [stage for stage in pushes if (arguments.work / stage / "stage.json").is_file()]
    pushed = [run(pushes[stage], arguments.work) for stage in finished]
    if not (trained and all(pushed)):
        sys.exit(f"not all went well: {len(finished)} of {len(pushes)} models were trained, {sum(pushed)} pushed")


def run(command: list[str], folder: Path) -> bool:
    print("$ " + shlex.join(command), flush=True)
    return subprocess.run(command, cwd=folder).returncode == 0


def training_of(arguments: argparse.Namespace) -> list[list[str]]:
    if arguments.recipe == "demo":
        return [["make", "install"], ["make", "demo"]]
    return [["make", "install"], ["env", f"DEPTH={arguments.depth}", "bash", "recipes/speedrun.sh"]]


def pushes_of(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """A push by the folder of each model; the last one keeps the plain name."""
    names = {"base": f"{arguments.repo}-base", "sft": f"{arguments.repo}-sft", "rl": arguments.repo}
    folders = {f"out/{arguments.recipe}/{stage}": name for stage, name in names.items()}
    return {
        folder: [".venv/bin/nanochat", "push", "--model", folder, "--repo", name] for folder, name in folders.items()
    }


if __name__ == "__main__":
    main()
