"""Real processes that work together over gloo, for tests of whatever runs on several ranks."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch

# Children of a server that has imported everything once: a fresh process each, without the seconds of importing.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "modeling_nanochat.training.trainers.sft",
        "modeling_nanochat.training.trainers.reinforce",
        "modeling_nanochat.training.trainers.pretrain",
    ]
)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def join_ranks(rank: int, ranks: int, port: int) -> None:
    """Make this process one of several, as torchrun would."""
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def run_two_ranks(work: Callable[[Path], None], folder: Path) -> None:
    """Let two processes do `work(folder)`; both must succeed, and must have met."""
    port = free_port()
    processes = [PROCESSES.Process(target=one_of_two, args=(work, folder, rank, port), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


def one_of_two(work: Callable[[Path], None], folder: Path, rank: int, port: int) -> None:
    join_ranks(rank, 2, port)
    work(folder)
    assert torch.distributed.get_world_size() == 2
    torch.distributed.destroy_process_group()
