"""The progress bar of all trainers here: the last figures behind the bar, evaluations on lines of their own.

Transformers' bar prints every log as a dictionary, which pushes what matters off the screen. Nothing is lost by this
one: the whole log goes to the trackers, and into the stage's record for the report.
"""

from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

# Figures of a training log that are shown, and how.
SHOWN = {
    "loss": "loss {:.3f}",
    "reward": "reward {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.0%}",
}


class ProgressLine(ProgressCallback):
    """See the module's description."""

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
