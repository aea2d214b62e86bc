"""Work that the ranks of a run share: rows are dealt, results come back to every rank in the order of the rows.

What measures a model knows nothing of ranks: it gets rows and returns one result for each. The price of dealing: the
ranks run different batches, which sharded weights (FSDP) do not allow, as every forward pass of one rank waits for all
others. There every rank does all of the work.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.distributed.tensor import DTensor

Row, Result = TypeVar("Row"), TypeVar("Result")


def launched() -> int:
    """How many processes a launcher says that it has started; they may not know one another yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def meet() -> None:
    """Let the processes that torchrun started on a machine without GPUs know one another. Untold, Accelerate takes each
    for the only one, and all would do the same work into the same folder."""
    if launched() > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # for the Accelerators and training arguments to come
        PartialState(cpu=True)


def check_that_ranks_met(processes: int) -> None:
    """
    Args:
        processes: those that work together, as the caller knows it.

    Raises:
        ValueError: more than these were launched, so that each would train by itself.
    """
    if launched() > processes:
        raise ValueError(
            f"{launched()} processes were launched, but this one trains by itself; expected torch.distributed to be "
            "set up: on a machine without GPUs by TrainingArguments(use_cpu=True)"
        )


def over_ranks(
    work: Callable[[Sequence[Row]], Sequence[Result]], rows: Sequence[Row], model: nn.Module
) -> list[Result]:
    """`work(rows)`, done by all ranks together unless the model is sharded.

    Args:
        work: gives one result for each row that it gets.
        rows: the same on every rank.
        model: the one that `work` runs.
    """
    state = PartialState()
    ranks = state.num_processes
    if ranks == 1 or is_sharded(model):
        return list(work(rows))
    results: list[Any] = [None] * len(rows)
    for rank, part in enumerate(gather(list(work(rows[state.process_index :: ranks])))):
        results[rank::ranks] = part
    return results


def gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks, on every rank."""
    return gather_object([value]) if PartialState().num_processes > 1 else [value]


def on_main_process(work: Callable[[], Result]) -> Result:
    """What `work()` gives or raises on the main process, on every rank: for what need not be done by all of them, such
    as reading files to know them. All ranks call this together."""
    if launched() == 1:  # also where nothing is going to be trained
        return work()
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:  # the others would wait for ever
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds only a part of some weight."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
