"""The progress bar of all trainers here: the last figures behind the bar, evaluations on lines of their own.

Transformers' bar prints every log as a dictionary, which pushes what matters off the screen. Nothing is lost by this
one: the whole log goes to the trackers, and into the stage's record for the report. Where nobody watches, in a log
file, the bar would be hundreds of copies of itself: there it is a line at times.
"""

import sys
import time

from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

# Figures of a training log that are shown, and how.
SHOWN = {
    "loss": "loss {:.3f}",
    "reward": "reward {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.0%}",
}
SECONDS_BETWEEN_LINES = 15.0  # in a file


class ProgressLine(ProgressCallback):
    """See the module's description."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step, self.last_line = 0, -SECONDS_BETWEEN_LINES
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=None)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            self.training_bar.total = state.max_steps  # a budget of minutes moves the end
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in logs:
            shown = [form.format(logs[name]) for name, form in SHOWN.items() if name in logs]
            self.training_bar.set_postfix_str(", ".join(shown), refresh=False)
            if self.training_bar.disable and time.monotonic() >= self.last_line + SECONDS_BETWEEN_LINES:
                self.last_line = time.monotonic()
                self.training_bar.write(f"step {state.global_step} of {state.max_steps}: {', '.join(shown)}")
        elif "train_runtime" not in logs:
            figures = {name: value for name, value in logs.items() if isinstance(value, float) and name != "epoch"}
            measured = ", ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in figures.items())
            self.training_bar.write(f"step {state.global_step}: {measured}")


def show_progress_line(trainer: Trainer) -> None:
    """Put `ProgressLine` in the place of the Trainer's own bar; no bar at all with `disable_tqdm`."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressLine())
