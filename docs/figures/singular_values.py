"""What orthogonalization does: Polar Express as a curve, and the strengths of a real gradient's directions."""

import matplotlib.pyplot as plt
import torch
from drawing import GREY, RED, batches, load, save

from modeling_nanochat.training.optimizer.updates import NORM_SAFETY, POLAR_EXPRESS_COEFFICIENTS, polar_express


def count_of(steps: int) -> str:
    return f"{steps} step" + "s" * (steps > 1)


def main() -> None:
    model, tokenizer = load("base")
    model.train()
    for batch in batches(tokenizer, 8, 256, 4):
        model(input_ids=batch[:, :-1], shift_labels=batch[:, 1:]).loss.backward()
    gradient = model.model.layers[1].mlp.up_proj.weight.grad  # (m, n)
    stages = [gradient[None] / (gradient.norm() * NORM_SAFETY)]  # where Polar Express begins
    stages += [polar_express(gradient[None], steps) for steps in range(1, 6)]
    strengths = [torch.linalg.svdvals(stage[0].double()) for stage in stages]
    for steps, values in enumerate(strengths):
        print(f"after {steps} steps: largest {values[0]:.4f}, median {values.median():.4f}, smallest {values[-1]:.5f}")
    print(
        "shape", tuple(gradient.shape), "ratio of largest to median", (strengths[0][0] / strengths[0].median()).item()
    )
    shares = strengths[0].square() / strengths[0].square().sum()
    print("share of the ten strongest of", len(shares), ":", shares[:10].sum().item())
    whole = torch.linalg.svd(gradient, full_matrices=False)
    exact = whole.U @ whole.Vh
    print("likeness to the exact factor:",
          ((stages[5][0] * exact).sum() / (stages[5][0].norm() * exact.norm())).item())  # fmt: skip

    figure, (curves, bars) = plt.subplots(1, 2, figsize=(10, 3.6))
    x = torch.logspace(-3, 0, 1500, dtype=torch.float64) / NORM_SAFETY
    shades = plt.colormaps["Blues"](torch.linspace(0.3, 1, 6).tolist())
    y = x
    curves.plot(x, y, color=GREY, linestyle=":", linewidth=1, label="before")
    for (a, b, c), color, steps in zip(POLAR_EXPRESS_COEFFICIENTS, shades[1:], range(1, 6)):
        y = a * y + b * y**3 + c * y**5
        if steps in (1, 3, 5):
            curves.plot(x, y, color=color, linewidth=2 if steps == 5 else 1.2, label=count_of(steps))
    curves.set(
        xscale="log", xlim=(1e-3, 1), ylim=(0, 2.4), xlabel="strength of a direction before", ylabel="strength after"
    )
    curves.set_title("Five steps send (nearly) every strength to 1")
    curves.legend(ncols=2, fontsize=8)
    for steps in (0, 1, 3, 5):
        bars.plot(range(1, len(strengths[0]) + 1), strengths[steps], color=RED if steps == 0 else shades[steps],
                  linewidth=2, label="the gradient" if steps == 0 else f"after {count_of(steps)}")  # fmt: skip
    bars.set(xlabel="directions of the matrix, the strongest first", ylabel="strength", yscale="log", ylim=(1e-3, 2))
    bars.set_title("A gradient of the demo, before and after")
    bars.legend(fontsize=8)
    save(figure, "singular_values")


if __name__ == "__main__":
    main()
