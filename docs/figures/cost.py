"""Hours and dollars of each depth on eight H100, and where a depth's parameters lie: by formula, as `nanochat plan`."""

import matplotlib.pyplot as plt
from drawing import BLUE, GREEN, GREY, RED, YELLOW, save

from modeling_nanochat.recipes.plan import PlanArguments, plan_of, step_on
from modeling_nanochat.recipes.stages import prices

DEPTHS = (4, 8, 12, 16, 20, 24, 28, 32)
DOLLARS_PER_HOUR = 8 * prices.RENTS["H100"].dollars


def main() -> None:
    plans, hours = {}, {}
    for depth in DEPTHS:
        arguments = PlanArguments(depth=depth, gpus=8)
        config, plans[depth] = plan_of(arguments)
        step = step_on("H100", config, plans[depth], arguments)[1]
        hours[depth] = plans[depth].steps * step.seconds / 3600
    print("hours:", {depth: round(value, 2) for depth, value in hours.items()})
    print("dollars:", {depth: round(value * DOLLARS_PER_HOUR, 1) for depth, value in hours.items()})
    figure, (parameters, cost) = plt.subplots(1, 2, figsize=(10, 3.4))
    kinds = {"matrices": BLUE, "head": GREEN, "token_embedding": YELLOW, "value_embeddings": RED}
    bottom = [0.0] * len(DEPTHS)
    for kind, color in kinds.items():
        values = [getattr(plan.parameters, kind) / 1e6 for plan in plans.values()]
        label = {"matrices": "matrices of the blocks"}.get(kind, kind.replace("_", " "))
        parameters.bar([str(depth) for depth in DEPTHS], values, bottom=bottom, color=color, label=label)
        bottom = [low + value for low, value in zip(bottom, values)]
    parameters.set(xlabel="depth", ylabel="millions of parameters")
    parameters.set_title("What one dial sets")
    parameters.legend(fontsize=8)
    cost.plot(DEPTHS, list(hours.values()), "o-", color=BLUE)
    for depth in DEPTHS:
        dollars = f"{hours[depth] * DOLLARS_PER_HOUR:,.0f} $" if hours[depth] > 0.05 else "under 1 $"
        cost.annotate(dollars, (depth, hours[depth]), xytext=(0, -15), textcoords="offset points", size=8, color=GREY)
    cost.set(yscale="log", xlabel="depth", ylabel="on eight H100", ylim=(3e-4, 60), xlim=(3, 35))
    cost.set_yticks([1 / 600, 1 / 60, 1 / 6, 1, 10], ["6 s", "1 min", "10 min", "1 h", "10 h"])
    cost.set_xticks(DEPTHS)
    cost.minorticks_off()
    cost.set_title("Pretraining to 10.5 tokens a parameter")
    save(figure, "cost")


if __name__ == "__main__":
    main()
