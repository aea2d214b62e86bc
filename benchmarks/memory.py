"""Memory of a pretraining process on a CPU: what is announced against the peak that the kernel counted.

    python -m benchmarks.memory [--shapes 2:8:false 4:2:false 4:8:false 4:8:true]      (depth:rows:compiled)
    python -m benchmarks.memory --length 8192 --shapes 2:1:false [--checkpointing]

Each shape runs four steps of `PretrainTrainer` in a process of its own on random tokens, rows of 512 (or `--length`)
and 8,192 words; the peak is `VmHWM`, Python and libraries included. Linux only.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

VOCABULARY, STEPS = 8192, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["2:8:false", "4:2:false", "4:8:false", "4:8:true"])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(*arguments.one.split(":"), arguments.length, arguments.checkpointing)
        return
    more = [f"--length={arguments.length}", *(["--checkpointing"] if arguments.checkpointing else [])]
    print(f"{'depth':>5} {'rows':>5} {'compiled':>9} {'announced MB':>13} {'peak MB':>8} {'ratio':>6}")
    for shape in arguments.shapes:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", "--one", shape, *more],
            capture_output=True,
            text=True,
            check=True,
        )
        announced, peak = map(float, done.stdout.split()[-2:])
        depth, rows, compiled = shape.split(":")
        print(f"{depth:>5} {rows:>5} {compiled:>9} {announced:13,.0f} {peak:8,.0f} {peak / announced:6.2f}", flush=True)


class RandomRows:
    """An endless stream of random rows."""

    def __init__(self, length: int):
        self.generator, self.length = np.random.default_rng(0), length

    def __next__(self) -> np.ndarray:
        return self.generator.integers(0, VOCABULARY, self.length + 1, dtype=np.int32)

    def state_dict(self) -> dict:
        return {}


def measure(depth: str, rows: str, compiled: str, length: int, checkpointing: bool) -> None:
    """Print the announced and the peak memory of one shape, in MB."""
    import modeling_nanochat.recipes.pretrain  # noqa: F401 (what a run has imported)
    from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
    from modeling_nanochat.training.data.row_loader import RowLoader
    from modeling_nanochat.training.devices import choose_dtype
    from modeling_nanochat.training.memory import memory_per_device
    from modeling_nanochat.training.trainers.pretrain import PretrainConfig, PretrainTrainer

    config = NanoChatGPTConfig.from_depth(
        int(depth), vocab_size=VOCABULARY, head_dim=64, max_position_embeddings=length
    )
    loader = RowLoader(lambda stream, streams: RandomRows(length), int(rows), length)
    with tempfile.TemporaryDirectory() as folder:
        settings = PretrainConfig(
            output_dir=folder, max_steps=STEPS, use_cpu=True, disable_tqdm=True, save_strategy="no",
            torch_compile=compiled == "true", torch_compile_backend="inductor" if compiled == "true" else None,
            activation_checkpointing=checkpointing,
        )  # fmt: skip
        PretrainTrainer(NanoChatGPTForCausalLM(config), settings, loader).train()
    needed = memory_per_device(config, int(rows), length, 1, choose_dtype("auto", "cpu"), "cpu", checkpointing)
    print(sum(needed.values()) / 1e6, peak_memory() / 1e6)


def peak_memory() -> int:
    """Bytes of this process at its largest, as the kernel counted."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    main()
