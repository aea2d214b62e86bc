"""What a gradient promises of single weights and what nudging them does; and how far the promise holds."""

import matplotlib.pyplot as plt
import torch
from drawing import BLUE, GREY, RED, batches, load, save

NUDGED = 60


def main() -> None:
    model, tokenizer = load("base")
    batch = batches(tokenizer, 4, 256, 1)[0]
    inputs, targets = batch[:, :-1], batch[:, 1:]

    @torch.no_grad()
    def loss_now() -> float:
        return model.token_losses(inputs, targets).double().mean().item()

    model.train()
    before = model(input_ids=inputs, shift_labels=targets).loss
    before.backward()
    model.eval()
    start = loss_now()
    matrices = {
        name: weight for name, weight in model.named_parameters() if "layers" in name and weight.numel() > 10_000
    }  # all but the gates
    generator = torch.Generator().manual_seed(0)
    promised, happened = [], []
    for number in range(NUDGED):
        weight = list(matrices.values())[number % len(matrices)]
        flat, slopes = weight.data.view(-1), weight.grad.view(-1)
        place = slopes.abs().topk(200).indices[torch.randint(200, (1,), generator=generator)].item()
        nudge = 0.02 if number % 2 else -0.02
        flat[place] += nudge
        promised.append(1000 * nudge * slopes[place].item())
        happened.append(1000 * (loss_now() - start))
        flat[place] -= nudge
    print("mean error of the promise:",
          sum(abs(p - h) for p, h in zip(promised, happened)) / sum(abs(h) for h in happened))  # fmt: skip

    square = sum(weight.grad.square().sum() for weight in matrices.values()).item()
    steps = [0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.4, 1.8, 2.2, 2.6, 3.0]
    saved = {name: weight.detach().clone() for name, weight in matrices.items()}
    losses = []
    for step in steps:
        for name, weight in matrices.items():
            weight.data.copy_(saved[name] - step * weight.grad)
        losses.append(loss_now())
    print("loss along the gradient:", [(step, round(loss, 4)) for step, loss in zip(steps, losses)], "slope", square)

    figure, (points, line) = plt.subplots(1, 2, figsize=(10, 3.4))
    limit = 1.1 * max(map(abs, promised))
    points.plot([-limit, limit], [-limit, limit], color=GREY, linewidth=1)
    points.plot(promised, happened, "o", color=BLUE, alpha=0.6, markersize=5)
    points.set(xlabel="change that the gradient promises, thousandths", ylabel="change that happens")
    points.set_title(f"{NUDGED} single weights, nudged one at a time")
    line.plot(steps, losses, "o-", color=BLUE, markersize=4, label="loss")
    line.plot([0, 1.0], [start, start - square], color=RED, linestyle="--", label="what the slope promises")
    line.set(xlabel="how far all matrices move against their gradient", ylabel="loss, nats per token",
             ylim=(min(losses) - 0.3, min(max(losses), start + 1) + 0.1))  # fmt: skip
    line.set_title("The promise holds near by, not far away")
    line.legend()
    save(figure, "credit")


if __name__ == "__main__":
    main()
