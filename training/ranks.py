"""Work that the ranks of a run share: rows are dealt, results come back to every rank in the order of the rows.

What measures a model knows nothing of ranks: it gets rows and returns one result for each. The price of dealing: the
ranks run different batches, which sharded weights (FSDP) do not allow, as every forward pass of one rank waits for all
others. There every rank does all of the work.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor

Row, Result = TypeVar("Row"), TypeVar("Result")


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


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds only a part of some weight."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
