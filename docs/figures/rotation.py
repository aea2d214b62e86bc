"""Positions as rotations: hands of clocks at several positions, and how alike two equal vectors look at a distance."""

import matplotlib.pyplot as plt
import torch
from drawing import BLUE, GREY, RED, save

from modeling_nanochat import NanoChatGPTConfig
from modeling_nanochat.decoder_layer import NanoChatGPTRotaryEmbedding, rotate

POSITIONS = 257
PAIRS = (0, 8, 16, 24)  # of 32


def main() -> None:
    config = NanoChatGPTConfig.from_depth(3, head_dim=64, max_position_embeddings=256)
    tables = NanoChatGPTRotaryEmbedding(config)
    cos, sin = tables(torch.zeros(1), torch.arange(POSITIONS)[None])  # (1, T, 1, D/2)
    figure = plt.figure(figsize=(10, 3.1))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.05))
    dials = left.subplots(len(PAIRS), 6)
    for row, pair in zip(dials, PAIRS):
        for axes, position in zip(row, range(6)):
            x, y = cos[0, position, 0, pair].item(), -sin[0, position, 0, pair].item()
            axes.add_patch(plt.Circle((0, 0), 1, fill=False, color="#cccccc"))
            axes.plot([0, x], [0, y], color=BLUE, linewidth=2)
            axes.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal")
            axes.axis("off")
            if pair == PAIRS[0]:
                axes.set_title(f"word {position}", fontweight="normal", size=8, loc="center")
        row[0].text(-1.5, 0, f"pair {pair}", size=8, color=GREY, ha="right", va="center")
    left.suptitle("  Every pair of numbers turns at its own speed", x=0, ha="left", size=10.5, fontweight="bold")

    axes = right.subplots()
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(64, 1, 1, 64, generator=generator)
    vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    turned = rotate(vectors.expand(64, POSITIONS, 1, 64), cos, sin)  # the same vector at every position
    likeness = (turned * turned[:, :1]).sum(-1).squeeze(-1)  # (64, T): with itself at position 0
    axes.plot(likeness[0], color=RED, linewidth=1, alpha=0.8, label="one vector")
    axes.plot(likeness.mean(0), color=BLUE, linewidth=2, label="mean of 64 vectors")
    axes.set(xlabel="words between the two", ylabel="likeness with itself")
    axes.set_title("The same vector, seen from a distance")
    axes.legend()
    print("likeness at 0, 1, 4, 16, 64, 256:", [round(likeness.mean(0)[d].item(), 2) for d in (0, 1, 4, 16, 64, 256)])
    here = rotate(vectors, cos[:, 7:8], sin[:, 7:8]), rotate(vectors, cos[:, 3:4], sin[:, 3:4])
    there = rotate(vectors, cos[:, 207:208], sin[:, 207:208]), rotate(vectors, cos[:, 203:204], sin[:, 203:204])
    print("same distance, other place, largest difference:",
          ((here[0] * here[1]).sum(-1) - (there[0] * there[1]).sum(-1)).abs().max().item())  # fmt: skip
    save(figure, "rotation")


if __name__ == "__main__":
    main()
