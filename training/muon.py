"""Muon for any network of Transformers, in one line of any Trainer:

    Trainer(model, args, ..., optimizer_cls_and_kwargs=muon(lr=0.02, adamw_lr=3e-3))

The Trainer calls for the optimizer when its network is ready, adapters and all; then the parameters are sorted
(`optimizer/sorting.py`), the table of them is printed, and `MuonAdamW` is made. It is an ordinary optimizer to the
Trainer: its scheduler moves both rates alike, DDP or FSDP2 reduce the gradients, checkpoints hold the whole state. The
price against this project's own trainers is that under DDP every process keeps all of the state and does all of the
work: a Trainer saves the state of its first process only, which must not be a part.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import is_initialized
from torch import nn

from modeling_nanochat.training.optimizer.matrices import WHOLE, Split
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.optimizer.sorting import KINDS, MATRIX, SortedParameter, sort_parameters
from modeling_nanochat.training.ranks import check_that_ranks_met

ADAMW_EPSILON = 1e-8  # the usual one
NAMES_SHOWN = 3  # of each doubt


def muon(
    *,
    lr: float,
    adamw_lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    betas: Sequence[float] = (0.9, 0.95),
    overrides: Mapping[str, str] | None = None,
) -> tuple[Callable[[], Callable[..., MuonAdamW]], dict[str, Any]]:
    """What a Trainer takes as `optimizer_cls_and_kwargs`; its own `learning_rate`, `weight_decay` and `optim` then have
    no say, its scheduler and `max_grad_norm` have.

    Args:
        lr: Muon's rate, for the matrices inside the blocks. An update has a root mean square of lr / sqrt(inputs) for
            every entry, AdamW's one of about 0.2 * lr: 0.2 * sqrt(hidden_size) times a rate that is known to suit AdamW
            moves the matrices as far.
        adamw_lr: AdamW's, for all the rest.
        weight_decay: decoupled, of everything but vectors; of Muon's matrices where it agrees with the update.
        momentum: Muon's.
        betas: AdamW's.
        overrides: pattern of parameter names -> "muon" or "adamw", where the rule shall not decide.

    Raises:
        ValueError: a rate that is none.
    """
    if not (lr >= 0 and adamw_lr >= 0):
        raise ValueError(f"lr={lr}, adamw_lr={adamw_lr}; expected two rates of at least 0")
    settings = {"lr": lr, "adamw_lr": adamw_lr, "weight_decay": weight_decay, "momentum": momentum,
                "betas": tuple(betas), "overrides": overrides}  # fmt: skip
    return optimizer_factory, settings


def optimizer_factory() -> Callable[..., MuonAdamW]:
    """The Trainer calls what it is given for a class, and then the result with the network and the settings."""
    return muon_optimizer


def muon_optimizer(model: nn.Module, **settings: Any) -> MuonAdamW:
    """The optimizer itself, for one's own loop; `settings` as in `muon`. Prints the table of the parameters.

    Raises:
        ValueError: a wrong setting, nothing to train, no matrix in sight (FSDP1 and DeepSpeed flatten them), or
            processes that were launched together and know nothing of one another.
    """
    _, settings = muon(**settings)
    parameters = sort_parameters(model, settings["overrides"])
    if not parameters:
        raise ValueError("the network has no parameter that is trained, expected some with requires_grad")
    if not {MATRIX, "adapter"} & {each.kind for each in parameters}:
        raise ValueError(
            "Muon finds no matrix in the blocks of this network; expected one whose parameters keep their shapes "
            "(FSDP version 2, not 1; no DeepSpeed), or AdamW for it"
        )
    if is_first_process():
        print(describe(parameters, settings["lr"], settings["adamw_lr"]), flush=True)
    return MuonAdamW(param_groups(parameters, settings), shared=False)


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that train together.

    Raises:
        ValueError: torchrun launched several, but each would train by itself: so does a Trainer on a machine without
            GPUs that was not told to use the CPU.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    check_that_ranks_met(PartialState().num_processes if is_initialized() else size)  # a Trainer goes by its own count
    return rank == 0


def param_groups(parameters: Sequence[SortedParameter], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Muon's groups first, one for each way of splitting (a Trainer logs the rate of the first group), then AdamW's."""
    decay = settings["weight_decay"]
    groups: dict[Any, dict[str, Any]] = {}
    for each in sorted(parameters, key=lambda each: each.kind != MATRIX):
        if each.kind == MATRIX:
            key: Any = each.split
            new = {"use_muon": True, "lr": settings["lr"], "momentum": settings["momentum"], "weight_decay": decay}
            new |= each.split._asdict()
        else:
            key = each.kind != "vector"
            new = {"use_muon": False, "lr": settings["adamw_lr"], "betas": settings["betas"], "eps": ADAMW_EPSILON}
            new |= {"weight_decay": decay if key else 0.0}
        groups.setdefault(key, new | {"params": []})["params"].append(each.parameter)
    return list(groups.values())


def describe(parameters: Sequence[SortedParameter], lr: float, adamw_lr: float) -> str:
    """The table that is printed before training: who steps what, and what the rule was unsure of."""
    lines = [f"{'':9} {'tensors':>8} {'parameters':>13}  what"]
    for kind, what in KINDS.items():
        for split in sorted({each.split for each in parameters if each.kind == kind}, key=str):
            chosen = [each for each in parameters if (each.kind, each.split) == (kind, split)]
            count, size = len(chosen), sum(each.parameter.numel() for each in chosen)
            said = what if split == WHOLE else f"{what}, {describe_split(split)}, such as {chosen[0].name}"
            lines.append(f"{'Muon' if kind == MATRIX else 'AdamW':9} {count:>8,} {size:>13,}  {said}")
    for doubt in sorted({each.doubt for each in parameters if each.doubt}):
        names = [each.name for each in parameters if each.doubt == doubt]
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        lines.append(f"unsure: {', '.join(names[:NAMES_SHOWN])}{more}: {doubt}")
    if all(each.kind != MATRIX for each in parameters):
        lines.append("only adapters are trained, and nothing is left for Muon: both factors of a product go to AdamW")
    return "\n".join([f"Muon-AdamW: rate {lr:g} for Muon, {adamw_lr:g} for AdamW", *lines])


def describe_split(split: Split) -> str:
    parts = "" if split.parts is None else f"{len(split.parts)} in one"
    each = f", repeated {split.repeats} times" if split.repeats > 1 else ""
    return ", ".join(word for word in ("stored transposed" if split.transposed else "", parts + each) if word)
