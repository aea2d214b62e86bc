"""Learning rate, momentum and weight decay over the course of each stage."""

import matplotlib.pyplot as plt
from drawing import BLUE, GREEN, RED, save

from modeling_nanochat.training.optimizer import schedules
from modeling_nanochat.training.optimizer.eras import pretraining_schedules

STEPS = 1000
# Where lines coincide, the later and thinner one lies on top of the earlier.
STAGES = {
    "pretraining": (pretraining_schedules(), {"color": BLUE, "linewidth": 4}),
    "fine-tuning": (schedules.sft_schedules(), {"color": RED, "linewidth": 2}),
    "reinforcement": (schedules.rl_schedules(), {"color": GREEN, "linewidth": 2, "linestyle": (0, (3, 3))}),
}


def main() -> None:
    figure, panels = plt.subplots(1, 3, figsize=(10, 2.8))
    titles = ("Learning rate, of its start", "Muon's momentum", "Weight decay, of its start")
    for axes, title, key in zip(panels, titles, ("lr_schedule", "momentum_schedule", "weight_decay_schedule")):
        for name, (stage, line) in STAGES.items():
            axes.plot([stage[key](step, STEPS) for step in range(STEPS)], label=name, **line)
        axes.set_title(title)
        axes.set_xlabel(f"step of {STEPS:,}")
    panels[0].legend(loc="lower left")
    panels[1].set_ylim(0.8, 1)
    save(figure, "schedules")


if __name__ == "__main__":
    main()
