"""What momentum remembers: a narrow valley with and without it, and real gradients against the average of many.

The gradients are those of the toy of step_sizes.py after thirty steps, with its weights held still from then on.
"""

import matplotlib.pyplot as plt
import torch
from drawing import BLUE, GREY, RED, batches, documents, save
from step_sizes import LENGTH, ROWS, VOCABULARY, muon_adamw, network

from modeling_nanochat.training.tokenizer import train_tokenizer

STEPS, BATCHES = 30, 96
CURVATURE = torch.tensor([1.0, 25.0])  # the valley is 25 times as steep across as along


def walk(momentum: float, rate: float, steps: int = 24) -> torch.Tensor:
    """(steps + 1, 2): places on the way down, by the rule of Muon's buffer, without Nesterov's look ahead."""
    place, buffer, places = torch.tensor([-4.0, 0.8]), torch.zeros(2), []
    for _ in range(steps + 1):
        places.append(place)
        buffer = torch.lerp(buffer, CURVATURE * place, 1 - momentum)
        place = place - rate * buffer
    return torch.stack(places)


def main() -> None:
    tokenizer = train_tokenizer(iter(documents("train", 4000)), VOCABULARY)
    rows = batches(tokenizer, ROWS, LENGTH, STEPS + BATCHES)
    model = network()
    optimizer = muon_adamw(8.0)(model)
    for batch in rows[:STEPS]:
        optimizer.zero_grad()
        model(input_ids=batch[:, :-1], shift_labels=batch[:, 1:]).loss.backward()
        optimizer.step()
    weight = model.model.layers[1].mlp.up_proj.weight
    gradients = []
    for batch in rows[STEPS:]:
        loss = model(input_ids=batch[:, :-1], shift_labels=batch[:, 1:]).loss
        gradients.append(torch.autograd.grad(loss, weight)[0].flatten())
    gradients = torch.stack(gradients)  # (BATCHES, elements)

    def likeness(x: torch.Tensor, held_out: torch.Tensor) -> float:
        return torch.nn.functional.cosine_similarity(x, held_out, dim=0).item()

    half = BATCHES // 2
    held_out = gradients[half:].mean(0)
    single = [likeness(gradient, held_out) for gradient in gradients[:half]]
    remembered = {}
    for momentum in (0.85, 0.95):
        buffer, remembered[momentum] = torch.zeros_like(held_out), []
        for gradient in gradients[:half]:
            buffer.lerp_(gradient, 1 - momentum)
            remembered[momentum].append(likeness(buffer, held_out))
    print("single batch:", sum(single) / half, "averages at the end:", {m: v[-1] for m, v in remembered.items()})

    figure, (valley, measured) = plt.subplots(1, 2, figsize=(10, 3.3))
    x, y = torch.meshgrid(torch.linspace(-4.6, 1.4, 80), torch.linspace(-1.3, 1.3, 60), indexing="xy")
    heights = CURVATURE[0] * x**2 + CURVATURE[1] * y**2
    valley.contour(x, y, heights, levels=[0.3, 1.5, 4, 9, 16, 26, 40], colors="#cccccc", linewidths=0.8)
    for momentum, rate, color, name in ((0.0, 0.075, RED, "no memory"), (0.8, 0.16, BLUE, "momentum 0.8")):
        places = walk(momentum, rate)
        valley.plot(places[:, 0], places[:, 1], "o-", color=color, markersize=3, linewidth=1, label=name)
        print(name, "distance after 24 steps:", places[-1].norm().item())
    valley.plot(0, 0, "*", color="black", markersize=9)
    valley.set_title("24 steps down a narrow valley")
    valley.grid(False)
    valley.set(xticks=[], yticks=[])
    valley.legend(loc="upper right", fontsize=8)
    steps = range(1, half + 1)
    measured.plot(steps, single, "o", color=GREY, markersize=4, label="a single batch")
    for (momentum, values), color in zip(remembered.items(), (RED, BLUE)):
        measured.plot(steps, values, color=color, linewidth=2, label=f"average, momentum {momentum}")
    measured.set(xlabel="batches seen", ylabel=f"likeness to the mean of {half} others", ylim=(0, 1))
    measured.set_title("Gradients of one matrix of a toy")
    measured.legend(fontsize=8)
    save(figure, "momentum")


if __name__ == "__main__":
    main()
