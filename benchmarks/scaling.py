"""Several processes on this machine: what they send, how the step's time grows, and what the exchange hides behind.

    python -m benchmarks.scaling [--processes 1 2 4 --depth 4 --rows 4 --picture docs/overlap.png]

Each number of processes is started by torchrun, over gloo, one thread each. Weak scaling keeps the rows of a process,
strong scaling those of all together; the first step warms up, medians of the others count. Bytes are those that all
processes together send in one step: counted by wrapping the collectives; by theory, `bytes_exchanged` of
`training/step_time.py`, where a ring over n processes sends each tensor n - 1 times; by gloo, whose reduce-scatter is
an all-reduce; and by the loopback device, headers included, and whatever else the machine sends itself meanwhile.
Exchange and what of it is hidden behind computing come from torch's profiler on the first process.

More processes than cores slow each other down; processes of one machine share its memory and have no network.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.training.optimizer.groups import build_param_groups
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.optimizer.shards import Exchange, find_ranks
from modeling_nanochat.training.step_time import bytes_exchanged

# The functions of torch.distributed, their short names, and which argument is the whole tensor.
COLLECTIVES = {
    "reduce_scatter_tensor": ("reduce_scatter", 1),
    "all_gather_into_tensor": ("all_gather", 0),
    "all_reduce": ("all_reduce", 0),
}
LENGTH, VOCABULARY = 256, 4096
HEADINGS = (
    f"{'':>8} {'n':>2} {'rows':>4} {'step ms':>8} {'optimizer ms':>12} {'of it waiting':>13} {'exchange ms':>11} "
    f"{'of it hidden':>11} {'MB counted':>10} {'by theory':>9} {'by gloo':>9} {'on loopback':>11}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4, help="of a process (weak), of all (strong)")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--picture", type=Path, help="where to draw the trace of as many processes as there are cores")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        work(arguments)
        return
    print(HEADINGS)
    fitting = max(n for n in arguments.processes if n <= max(2, os.cpu_count()))
    for kind in ("weak", "strong"):
        for processes in arguments.processes:
            rows = arguments.rows if kind == "weak" else arguments.rows // processes
            found = launch(processes, rows, arguments, drawn=kind == "weak" and processes == fitting)
            print(line_of(kind, processes, rows, found), flush=True)


def line_of(kind: str, processes: int, rows: int, found: dict[str, float]) -> str:
    mega = {name: found[name] / 1e6 for name in ("counted", "theory", "gloo", "loopback")}
    return (
        f"{kind:>8} {processes:>2} {rows:>4} {found['step']:8.0f} {found['optimizer']:12.0f} {found['waiting']:13.0f} "
        f"{found['exchanging']:11.0f} {found['hidden']:11.0f} {mega['counted']:10.3f} {mega['theory']:9.3f} "
        f"{mega['gloo']:9.3f} {mega['loopback']:11.3f}"
    )


def launch(processes: int, rows: int, arguments: argparse.Namespace, drawn: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command += ["benchmarks.scaling", f"--rows={rows}", f"--depth={arguments.depth}", f"--steps={arguments.steps}"]
    if arguments.picture and drawn:
        command.append(f"--picture={arguments.picture}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


# ---------------------------------------------------------------- what each process does


def work(arguments: argparse.Namespace) -> None:
    """Steps of a network on random tokens, each its own, and one line of figures from the first process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = NanoChatGPTConfig.from_depth(
        arguments.depth, vocab_size=VOCABULARY, head_dim=64, max_position_embeddings=LENGTH
    )
    model = NanoChatGPTForCausalLM(config).train()
    optimizer = MuonAdamW(build_param_groups(model, batch_tokens=2**13, weight_decay=0.0, polar_dtype="float32"))
    ids = torch.randint(VOCABULARY, (arguments.rows, LENGTH), generator=torch.Generator().manual_seed(dist.get_rank()))
    spent: dict[str, list[float]] = {"step": [], "optimizer": [], "waiting": [], "loopback": []}
    counted: Counter[str] = Counter()
    with counting(counted, spent["waiting"]):
        for _ in range(arguments.steps):
            dist.barrier()
            counted.clear()
            waited, sent = len(spent["waiting"]), bytes_on_loopback()
            start = time.perf_counter()
            model(input_ids=ids, labels=ids, shift_labels=ids).loss.backward()
            middle = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            dist.barrier()
            spent["loopback"].append(bytes_on_loopback() - sent)
            spent["step"].append(1000 * (end - start))
            spent["optimizer"].append(1000 * (end - middle))
            spent["waiting"][waited:] = [sum(spent["waiting"][waited:])]
            model.zero_grad()
    theory = Counter()
    for part in optimizer.layout(find_ranks(None)):
        theory.update(bytes_exchanged(part))
    figures = {name: statistics.median(values[1:]) for name, values in spent.items()}
    figures |= {"counted": ring(counted), "theory": ring(theory), "gloo": ring(theory, reduce_scatter=2)}
    lanes = trace(model, optimizer, ids)
    exchange = union(lanes["reducing"] + lanes["gathering"])
    figures |= {"exchanging": length(exchange), "hidden": overlap(exchange, lanes["computing"])}
    if dist.get_rank() == 0:
        print(json.dumps(figures))
        if arguments.picture:
            draw(lanes, arguments.picture)
    dist.destroy_process_group()


@contextmanager
def counting(counted: Counter[str], waiting: list[float]) -> Iterator[None]:
    """In here the collectives count the bytes of the whole tensors they get, and waiting for them is timed (ms)."""
    before = {name: getattr(dist, name) for name in COLLECTIVES}
    wait = Exchange.wait

    def counter(function: Callable[..., Any], name: str, position: int) -> Callable[..., Any]:
        def call(*tensors: Any, **settings: Any) -> Any:
            counted[name] += tensors[position].nbytes
            return function(*tensors, **settings)

        return call

    def timed_wait(exchange: Exchange) -> torch.Tensor:
        start = time.perf_counter()
        result = wait(exchange)
        waiting.append(1000 * (time.perf_counter() - start))
        return result

    for function, (name, position) in COLLECTIVES.items():
        setattr(dist, function, counter(before[function], name, position))
    Exchange.wait = timed_wait
    try:
        yield
    finally:
        Exchange.wait = wait
        for name, function in before.items():
            setattr(dist, name, function)


def ring(sizes: Counter[str], reduce_scatter: int = 1) -> int:
    """Bytes that all processes together send, in rings, each tensor so many times."""
    times = {"reduce_scatter": reduce_scatter, "all_gather": 1, "all_reduce": 2}
    return (dist.get_world_size() - 1) * sum(times[name] * size for name, size in sizes.items())


def bytes_on_loopback() -> int:
    """Bytes sent through it since the machine started; Linux only."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


Interval = tuple[float, float]  # begin and end, in ms


def trace(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> dict[str, list[Interval]]:
    """One optimizer step under the profiler: when this process computes, and when its collectives run."""
    model(input_ids=ids, labels=ids, shift_labels=ids).loss.backward()
    dist.barrier()
    with torch.profiler.profile() as profile:
        optimizer.step()
    dist.barrier()
    events = profile.events()
    main = min(event.thread for event in events if event.name.startswith("aten::"))
    lanes = {
        "computing": [e for e in events if e.name.startswith("aten::") and e.thread == main],
        "reducing": [e for e in events if e.name == "gloo:all_reduce"],  # gloo's reduce-scatter too
        "gathering": [e for e in events if e.name == "gloo:all_gather"],
    }
    begin = min(event.time_range.start for event in events)
    return {
        name: union([((e.time_range.start - begin) / 1000, (e.time_range.end - begin) / 1000) for e in lane])
        for name, lane in lanes.items()
    }


def union(intervals: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def length(intervals: list[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def overlap(first: list[Interval], second: list[Interval]) -> float:
    """ms that lie in both."""
    return length(first) + length(second) - length(union(first + second))


def draw(lanes: dict[str, list[Interval]], file: Path) -> None:
    """The lanes of a trace, one above the other."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 2), layout="constrained")
    for place, (name, lane) in enumerate(reversed(lanes.items())):
        color = "#1f5fa8" if name == "computing" else "#d1603d"
        axes.broken_barh([(begin, end - begin) for begin, end in lane], (place - 0.35, 0.7), color=color)
    axes.set_yticks(range(len(lanes)), list(reversed(lanes)))
    axes.set_xlabel("ms since the optimizer's step began, first process")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
