"""The fault suite: every stage killed, stopped, damaged and disturbed, by its real command on tiny data.

    python -m tests.faults.run [--kills 3] [--seed 0]        (make fault-test; minutes, not in CI)

Each line of the table is a fault that was done and what came of it. A stage that is killed and started again must end
in the files of one that was not, to the byte; what cannot go on must say so in one line with exit code 2. The exit code
of the suite is 1 if anything was lost or hidden. The quick half of these faults is in `make test` (tests/training/
test_resume.py, test_stopping.py, test_shard_files.py, tests/recipes/test_stages.py).
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from modeling_nanochat.training.whole_files import checksums

WORDS = "the a of king queen castle river mountain says goes sees dark bright garden winter quiet bridge"
RECIPE = [sys.executable, "-m"]
IN_VAIN = ("stage.json", "stage.lock", "stage.begun.json")  # times and machines differ


class Suite:
    """The tiny run in a folder, and the table of what was done to it."""

    def __init__(self, folder: Path, kills: int, seed: int):
        self.folder, self.kills, self.rng = folder, kills, random.Random(seed)
        self.rows: list[tuple[str, str, bool]] = []
        self.make_data()

    def make_data(self) -> None:
        shards = self.folder / "shards"
        shards.mkdir(parents=True)
        for number in range(3):
            texts = [" ".join(self.rng.choices(WORDS.split(), k=60)) for _ in range(300)]
            pq.write_table(pa.table({"text": texts}), shards / f"shard_{number}.parquet", row_group_size=50)
        for use in ("sft", "rl"):
            (self.folder / use).mkdir()
            for split, count in (("train", 120), ("validation", 10)):
                rows = [self.conversation() for _ in range(count)]
                (self.folder / use / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def conversation(self) -> dict:
        a, b = self.rng.randint(1, 9), self.rng.randint(1, 9)
        messages = [{"role": "user", "content": f"{a} + {b}"}, {"role": "assistant", "content": f"#### {a + b}"}]
        return {"messages": messages, "answer": str(a + b)}

    def command(self, stage: str, output: str) -> list[str]:
        """The command of a stage that writes into `output`; tens of steps each."""
        at = self.folder
        common = ["--output_dir", str(at / output)]
        train = [*common, "--use_cpu", "true", "--disable_tqdm", "true", "--polar_dtype", "float32",
                 "--save_strategy", "steps", "--save_steps", "3"]  # fmt: skip
        arguments = {
            "train_tokenizer": ["--data", f"{at}/shards", "--vocab_size", "320", *common],
            "pretrain": ["--data", f"{at}/shards", "--tokenizer", f"{at}/tokenizer", "--depth", "2", "--head_dim", "32",
                         "--sequence_length", "64", "--total_batch_tokens", "512", "--max_steps", "40",
                         "--validation_tokens", "512", "--validate_every", "20", *train],
            "sft": ["--model", f"{at}/base", "--data", f"{at}/sft", "--per_device_train_batch_size", "2",
                    "--max_steps", "12", *train],
            "rl": ["--model", f"{at}/sft_model", "--data", f"{at}/rl", "--num_generations", "4", "--max_steps", "8",
                   "--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1",
                   "--max_completion_length", "8", "--validation_problems", "4", *train],
        }  # fmt: skip
        return [*RECIPE, f"modeling_nanochat.recipes.{stage}", *arguments[stage]]

    def start(self, command: list[str]) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    def finish(self, command: list[str]) -> tuple[int, str]:
        process = self.start(command)
        output, _ = process.communicate(timeout=900)
        return process.returncode, output

    def files(self, output: str) -> dict[str, str]:
        """Hashes of what a finished stage left, checkpoints aside."""
        folder = self.folder / output
        kept = checksums(folder, lambda path: not path.parts[0].startswith("checkpoint-"))
        return {name: digest for name, digest in kept.items() if name not in IN_VAIN}

    def note(self, fault: str, result: str, good: bool) -> None:
        self.rows.append((fault, result, good))
        print(f"{'ok  ' if good else 'LOST'}  {fault:58} {result}", flush=True)

    # ---------------------------------------------------------------- the faults

    def whole(self, stage: str, output: str) -> float:
        """The stage undisturbed: what the others are held against. Returns its seconds."""
        started = time.time()
        code, text = self.finish(self.command(stage, output))
        self.note(f"{stage}: undisturbed", f"exit code {code}", code == 0)
        if code:
            raise SystemExit(text)
        return time.time() - started

    def killed(self, stage: str, reference: str, seconds: float) -> None:
        """SIGKILL at a random moment, again and again, then to the end."""
        output = f"{reference}_killed"
        for _ in range(self.kills):
            process = self.start(self.command(stage, output))
            time.sleep(seconds * self.rng.uniform(0.3, 1.0))
            process.kill()
            process.communicate()
        code, _ = self.finish(self.command(stage, output))
        same = code == 0 and self.files(output) == self.files(reference)
        self.note(
            f"{stage}: {self.kills} x SIGKILL at random", "the same files" if same else f"other files, {code}", same
        )

    def stopped(self, stage: str, reference: str, number: signal.Signals) -> None:
        """A signal while training: its exit code, then the same command to the end."""
        output = f"{reference}_{number.name}"
        process = self.start(self.command(stage, output))
        wait_for(lambda: any((self.folder / output).glob("checkpoint-*")) or process.poll() is not None)
        process.send_signal(number)
        text, _ = process.communicate(timeout=600)
        said = text.strip().splitlines()[-1] if text.strip() else ""
        code, _ = self.finish(self.command(stage, output))
        good = process.returncode == 128 + number and code == 0 and self.files(output) == self.files(reference)
        self.note(
            f"{stage}: {number.name}", f"exit code {process.returncode}, {said[-70:]!r}, then the same files", good
        )

    def damaged(self, kind: str, harm: Callable[[Path], object]) -> None:
        """The last checkpoint of an interrupted pretraining is harmed; the one before it must be used, and said."""
        output = f"base_{kind.replace(' ', '_')}"
        process = self.start(self.command("pretrain", output))
        wait_for(lambda: len(list((self.folder / output).glob("checkpoint-*"))) > 1 or process.poll() is not None)
        process.kill()
        process.communicate()
        harm(max((self.folder / output).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])))
        code, text = self.finish(self.command("pretrain", output))
        good = code == 0 and "is damaged, so it is passed over" in text and self.files(output) == self.files("base")
        result = "passed over, and said; the same files" if good else f"exit code {code}, {text.strip()[-100:]!r}"
        self.note(f"pretrain: last checkpoint {kind}", result, good)

    def refused(self, fault: str, command: list[str], expected: str) -> None:
        """A command that must end with exit code 2 and one line that says `expected`."""
        code, text = self.finish(command)
        lines = [line for line in text.strip().splitlines() if expected in line]
        good = code == 2 and bool(lines) and "Traceback" not in text
        self.note(fault, (lines or text.strip().splitlines()[-1:] or ["nothing"])[-1][:110], good)

    def other_shards(self) -> None:
        """A shard is replaced while a run is interrupted."""
        output = "base_other_shards"
        process = self.start(self.command("pretrain", output))
        wait_for(lambda: any((self.folder / output).glob("checkpoint-*")) or process.poll() is not None)
        process.kill()
        process.communicate()
        shard = self.folder / "shards" / "shard_0.parquet"
        before = shard.read_bytes()
        pq.write_table(pa.table({"text": ["another text"] * 300}), shard, row_group_size=50)
        self.refused(
            "pretrain: a shard replaced before resuming", self.command("pretrain", output), "other settings or inputs"
        )
        shard.write_bytes(before)

    def two_processes(self) -> None:
        """The same stage twice at once."""
        output = "base_twice"
        long = [*self.command("pretrain", output), "--max_steps", "100000"]
        process = self.start(long)
        wait_for(lambda: (self.folder / output / "stage.lock").exists() or process.poll() is not None)
        self.refused("pretrain: a second process in the folder", long, "is at work in")
        process.kill()
        process.communicate()

    def disk_full(self) -> None:
        """A disk of a few megabytes that fills while checkpoints are saved."""
        small = self.folder / "small_disk"
        small.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(small)], capture_output=True
        ).returncode:
            self.note("pretrain: disk full", "skipped: this user may not mount a small disk", True)
            return
        try:
            self.refused("pretrain: disk full", self.command("pretrain", "small_disk/base"), "the disk is full")
        finally:
            subprocess.run(["umount", str(small)], check=False)


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.02)


def flip_a_bit(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=3, help="SIGKILLs of each stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which they come")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults"))
    try:
        suite = Suite(folder, arguments.kills, arguments.seed)
        stages = (("train_tokenizer", "tokenizer"), ("pretrain", "base"), ("sft", "sft_model"), ("rl", "rl_model"))
        for stage, output in stages:
            seconds = suite.whole(stage, output)
            suite.killed(stage, output, seconds)
            if stage != "train_tokenizer":
                suite.stopped(stage, output, signal.SIGTERM)
        suite.stopped("pretrain", "base", signal.SIGINT)
        suite.damaged("with one bit flipped", flip_a_bit)
        suite.damaged("empty", lambda checkpoint: [path.unlink() for path in checkpoint.iterdir() if path.is_file()])
        suite.damaged("half", lambda checkpoint: (checkpoint / "scheduler.pt").unlink())
        suite.other_shards()
        suite.two_processes()
        suite.disk_full()
        diverging = [*suite.command("pretrain", "base_diverging"), "--matrix_lr", "1e30"]
        suite.refused("pretrain: --matrix_lr 1e30", diverging, "step")
        missing = [*suite.command("pretrain", "base_missing"), "--resume_from_checkpoint", "nowhere"]
        suite.refused("pretrain: --resume_from_checkpoint nowhere", missing, "is no checkpoint")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lost = [fault for fault, _, good in suite.rows if not good]
    print(f"\n{len(suite.rows)} faults, {len(lost)} lost or hid something" + "".join(f"\n  {fault}" for fault in lost))
    raise SystemExit(1 if lost else 0)


if __name__ == "__main__":
    main()
