"""A wall-clock budget for a run: its number of steps follows from how fast the steps really are.

The first estimate comes from a trial; what else runs on the machine, validation and checkpoints only show on the way.
So the end of the run is moved, now and then, to where the time that is left leads at the pace so far, with what the
last evaluation and save took set aside, and never beyond the horizon that the run has without a budget. Schedules count
from the number of steps, so the rate still falls to its end whenever that comes; the price is that they shift a little
with it, and that two such runs are not alike.
"""

import time

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from modeling_nanochat.training.trainers.pretrain import PretrainTrainer

CORRECTIONS = 20  # times that the end may be moved in a run


class TimeBudget(TrainerCallback):
    """Ends a run in time.

    Args:
        trainer: the run; this is one of its callbacks.
        deadline: when everything is to be over, as `time.time()`.
        most_steps: the run's horizon without a budget.
    """

    def __init__(self, trainer: PretrainTrainer, deadline: float, most_steps: int):
        self.trainer, self.deadline, self.most_steps = trainer, deadline, most_steps
        self.started: float | None = None  # with the second step: the first one pays for compilation

    def on_step_begin(self, args, state, control, **kwargs):
        if self.started is None and state.global_step == 1:
            self.started = time.time()

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if step < 2 or step == state.max_steps or step % max(1, state.max_steps // CORRECTIONS):
            return
        now = time.time()
        pace = (now - self.started) / (step - 1)  # evaluations and saves included
        left = self.deadline - now - self.trainer.seconds_of_the_end
        steps = min(step + max(1, int(left / pace)), self.most_steps)
        steps = broadcast_object_list([steps])[0]  # rank 0's, for all
        state.max_steps = args.max_steps = steps
        self.trainer.lr_scheduler.num_training_steps = steps
