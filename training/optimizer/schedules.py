"""Learning rate, Muon's momentum and weight decay as functions of the step, and the scheduler that applies them.

A schedule is a function `(step, total) -> number` of the step about to be taken, from 0, and the number of steps of the
whole run: for the rate and the decay what their first values are multiplied by, for the momentum its value. The presets
are upstream's stages. One scheduler writes all three into the optimizer's groups from its counter alone, so resuming
needs nothing but that counter; the price is that a schedule cannot react to the loss.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Schedule = Callable[[int, int], float]

BASE_MOMENTUM = 0.85  # upstream starts low, where gradients turn fastest


# ---------------------------------------------------------------- schedules


def warmup_stable_decay(
    step: int, total: int, *, warmup_ratio: float = 0.0, warmdown_ratio: float = 0.5, final_fraction: float = 0.0
) -> float:
    """1, after a linear rise over the first share of the steps and before a linear fall to `final_fraction`."""
    warmup, warmdown = round(warmup_ratio * total), round(warmdown_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    if step <= total - warmdown:
        return 1.0
    remaining = max(total - step, 0) / warmdown
    return remaining + (1 - remaining) * final_fraction


def linear_to_zero(step: int, total: int) -> float:
    """Falls from 1 to 0 over the run."""
    return max(1 - step / total, 0.0)


def cosine_to_zero(step: int, total: int) -> float:
    """Falls from 1 to 0 over the run, half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))


def constant(step: int, total: int, *, value: float) -> float:
    """Always `value`."""
    return value


def rising_momentum(step: int, total: int, *, peak: float = 0.95, rise: int = 300) -> float:
    """From 0.85 to `peak` over the first `rise` steps, then stays."""
    return BASE_MOMENTUM + (peak - BASE_MOMENTUM) * min(step / rise, 1.0)


def rising_and_falling_momentum(
    step: int, total: int, *, peak: float = 0.97, rise: int = 400, end: float = 0.90, warmdown_ratio: float = 0.5
) -> float:
    """From 0.85 to `peak` over `rise` steps, and from there to `end` while the rate falls too."""
    warmdown = round(warmdown_ratio * total)
    if step < rise or step < total - warmdown:
        return rising_momentum(step, total, peak=peak, rise=rise)
    return peak + (end - peak) * min((step - (total - warmdown)) / max(warmdown, 1), 1.0)


# ---------------------------------------------------------------- presets


def pretraining_schedules(
    era: str = "seed", *, warmup_ratio: float = 0.0, warmdown_ratio: float = 0.5, final_lr_frac: float = 0.0
) -> dict[str, Schedule]:
    """What `GroupScheduler` takes for pretraining in upstream's "seed" or "head" era.

    Raises:
        ValueError: for another era, or ratios that are no shares of the run.
    """
    if min(warmup_ratio, warmdown_ratio) < 0 or warmup_ratio + warmdown_ratio > 1:
        raise ValueError(
            f"warmup_ratio {warmup_ratio} and warmdown_ratio {warmdown_ratio} are not shares of a run: expected two "
            "numbers from 0 that add up to at most 1"
        )
    lr = partial(
        warmup_stable_decay, warmup_ratio=warmup_ratio, warmdown_ratio=warmdown_ratio, final_fraction=final_lr_frac
    )
    if era == "seed":
        return {"lr_schedule": lr, "momentum_schedule": rising_momentum, "weight_decay_schedule": linear_to_zero}
    if era == "head":
        momentum = partial(rising_and_falling_momentum, warmdown_ratio=warmdown_ratio)
        return {"lr_schedule": lr, "momentum_schedule": momentum, "weight_decay_schedule": cosine_to_zero}
    raise ValueError(f"the schedules' era is {era!r}, expected seed or head")


def sft_schedules(warmdown_ratio: float = 0.2) -> dict[str, Schedule]:
    """Finetuning: the full rate for 80% of the run, then linear to 0; no decay."""
    return {
        "lr_schedule": partial(warmup_stable_decay, warmdown_ratio=warmdown_ratio),
        "momentum_schedule": rising_momentum,
        "weight_decay_schedule": partial(constant, value=0.0),
    }


def rl_schedules() -> dict[str, Schedule]:
    """Reinforcement learning: the rate falls to 0 over the run; momentum 0.95; no decay."""
    return {
        "lr_schedule": linear_to_zero,
        "momentum_schedule": partial(constant, value=0.95),
        "weight_decay_schedule": partial(constant, value=0.0),
    }


# ---------------------------------------------------------------- scheduler


class GroupScheduler(LRScheduler):
    """Writes the rate of every group, and Muon's momentum and weight decay, before each optimizer step.

    AdamW's weight decay stays. The first values of rate and decay are kept in the groups themselves (`initial_lr`,
    `initial_weight_decay`), where a wrapper that replaces the groups, or a checkpoint, carries them along.

    Args:
        optimizer: a `MuonAdamW`, or what wraps one.
        num_training_steps: of the whole run.
        lr_schedule, weight_decay_schedule: multipliers of the first values; momentum_schedule: values.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_training_steps: int,
        lr_schedule: Schedule,
        momentum_schedule: Schedule,
        weight_decay_schedule: Schedule,
    ):
        if num_training_steps < 1:
            raise ValueError(f"num_training_steps is {num_training_steps}, expected at least 1")
        self.num_training_steps = num_training_steps
        self.schedules = (lr_schedule, momentum_schedule, weight_decay_schedule)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """The rate of every group at step `last_epoch`; Muon's groups get momentum and decay on the way."""
        factor, momentum, decay = (schedule(self.last_epoch, self.num_training_steps) for schedule in self.schedules)
        for group in self.optimizer.param_groups:
            if group["use_muon"]:
                group.setdefault("initial_weight_decay", group["weight_decay"])
                group["momentum"], group["weight_decay"] = momentum, group["initial_weight_decay"] * decay
        return [group["initial_lr"] * factor for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The counters, without the functions: those come from the constructor."""
        return {name: value for name, value in super().state_dict().items() if name != "schedules"}
