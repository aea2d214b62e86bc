"""How a run ends early: by a signal, with a checkpoint; or by a number that is not finite, before one is spoilt.

SIGTERM and Ctrl-C let the step in progress end, save a checkpoint on all ranks, and raise `Stopped`, also in the last
step and in what is measured after it; another signal, some seconds later, acts at once. Several ranks agree now and
then (`STEPS_BETWEEN_AGREEMENTS`), as a signal may reach them in different steps: that costs one number a few steps, and
is the bound within which they stop.

A loss that is no number, or a weight that is none when a checkpoint is due, raises an error that names step and tensor.
Losses are looked at when they are logged and weights when they are saved: no step waits for a check. So the checkpoints
there are stay good, and none is rotated away for a spoilt one.
"""

import math
import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback

from modeling_nanochat.training.trainers.checkpoints import latest_checkpoint

STEPS_BETWEEN_AGREEMENTS = 8
SECONDS_OF_ONE_SIGNAL = 3.0  # launchers pass on what a terminal has sent to all processes already
CAUGHT = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run was stopped by a signal, after saving a checkpoint; or before its first step."""

    def __init__(self, number: int, step: int, steps: int):
        when = f"after step {step} of {steps}, which is saved" if step else "before the first step"
        super().__init__(f"stopped by {signal.Signals(number).name} {when}")
        self.number = number


class StopOnSignal(TrainerCallback):
    """Catches the signals between `install` and `restore`; `number` is the one the run has stopped for, else None."""

    def __init__(self):
        self.received, self.since = 0, 0.0
        self.number: int | None = None
        self.before: dict[int, Any] = {}

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.receive) for number in CAUGHT}

    def receive(self, number: int, frame: Any) -> None:
        if not self.received:
            self.received, self.since = number, time.monotonic()
        elif time.monotonic() > self.since + SECONDS_OF_ONE_SIGNAL:  # somebody will not wait
            signal.signal(number, self.before[number] or signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self.before = {}

    def on_step_end(self, args, state, control, **kwargs):
        due = args.world_size == 1 or state.global_step % STEPS_BETWEEN_AGREEMENTS == 0
        if state.global_step < state.max_steps and due and self.agreed(args):
            self.number = self.received
            control.should_save = control.should_training_stop = True

    def agreed(self, args) -> bool:
        """Whether any rank was asked to stop. All ranks call this together."""
        if args.world_size > 1:
            received = torch.tensor(self.received, device=args.device)
            dist.all_reduce(received, dist.ReduceOp.MAX)
            self.received = int(received)
        return self.received > 0


def refuse_loss_that_is_no_number(trainer: Trainer, logs: dict[str, Any]) -> None:
    """`ValueError` if a loss among the figures to be logged is not finite."""
    for name, value in logs.items():
        if isinstance(value, float) and name.endswith(("loss", "bits_per_byte")) and not math.isfinite(value):
            raise ValueError(f"{name} is {value} at step {where_no_numbers_are(trainer)}")


def where_no_numbers_are(trainer: Trainer) -> str:
    """The step, the first weight that is not finite, and the checkpoint to go back to."""
    tensor = first_not_finite(trainer.model)
    cause = f"{tensor} holds numbers that are not finite" if tensor else "all weights are finite"
    return f"{trainer.state.global_step}; {cause}. {last_good(trainer)}"


def refuse_weights_that_are_no_numbers(trainer: Trainer) -> None:
    """`ValueError` if a weight is not finite: on every rank, whichever holds the tensor."""
    tensor = first_not_finite(trainer.model)
    spoilt = torch.tensor(tensor is not None, dtype=torch.int32, device=trainer.args.device)
    if trainer.args.world_size > 1:
        dist.all_reduce(spoilt, dist.ReduceOp.MAX)
    if spoilt:
        raise ValueError(
            f"{tensor or 'a weight on another rank'} is not finite at step {trainer.state.global_step}, so it is not "
            f"saved. {last_good(trainer)}"
        )


def first_not_finite(model: nn.Module) -> str | None:
    """Name of the first parameter with a number that is not finite, in this rank's share of it."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if not torch.isfinite(local.detach()).all():
            return name
    return None


def last_good(trainer: Trainer) -> str:
    checkpoint = latest_checkpoint(trainer.args.output_dir)
    kept = f"The last good checkpoint is {checkpoint}" if checkpoint else "There is no checkpoint yet"
    return f"{kept}; expected lower learning rates"
