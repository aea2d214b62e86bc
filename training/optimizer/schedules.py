"""Learning rate, Muon's momentum and weight decay as functions of the step, and the scheduler that applies them.

A schedule is a function `(step, total) -> number` of the step about to be taken, from 0, and the number of steps of the
whole run: for the rate and the decay what their first values are multiplied by, for the momentum its value. The presets
here are upstream's for finetuning; those for pretraining belong to an era (`eras.py`). One scheduler writes all three
into the optimizer's groups from its counter alone, so resuming needs nothing but that counter; the price is that a
schedule cannot react to the loss.
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
    step: int, total: int, *, warmup_steps: float = 0.0, warmdown_ratio: float = 0.5, final_fraction: float = 0.0
) -> float:
    """1, after a linear rise over the first steps and before a linear fall to `final_fraction` over a share of them.

    `warmup_steps` is a number of steps, or below 1 a share of them.
    """
    warmup = warmup_steps if warmup_steps >= 1 else round(warmup_steps * total)
    warmdown = round(warmdown_ratio * total)
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


def muon_momentum(
    step: int,
    total: int,
    *,
    peak: float = 0.95,
    rise_steps: int = 300,
    end: float = 0.95,
    warmdown_ratio: float = 0.0,
) -> float:
    """From 0.85 to `peak` over the first steps, and from there to `end` while the rate falls; where both apply, the
    rise wins."""
    warmdown = round(warmdown_ratio * total)
    if step < rise_steps or step < total - warmdown:
        return BASE_MOMENTUM + (peak - BASE_MOMENTUM) * min(step / rise_steps, 1.0)
    return peak + (end - peak) * min((step - (total - warmdown)) / max(warmdown, 1), 1.0)


# ---------------------------------------------------------------- presets


def sft_schedules(warmdown_ratio: float = 0.2) -> dict[str, Schedule]:
    """Finetuning: the full rate for 80% of the run, then linear to 0; no decay."""
    return {
        "lr_schedule": partial(warmup_stable_decay, warmdown_ratio=warmdown_ratio),
        "momentum_schedule": muon_momentum,
        "weight_decay_schedule": partial(constant, value=0.0),
    }


def rl_schedules(lr_schedule: Schedule = linear_to_zero) -> dict[str, Schedule]:
    """Reinforcement learning: the rate falls to 0 over the run; momentum 0.95; no decay."""
    return {
        "lr_schedule": lr_schedule,
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the counters. What the run is going to be (its length, first rates and decays) stays as it is
        now, so that a run may be resumed with other settings."""
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "num_training_steps"})
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr):
            group["lr"] = lr
