"""The chances of the next word at four temperatures."""

import matplotlib.pyplot as plt
import torch
from drawing import BLUE, load, save, with_bos

PROMPT = "The Secretary of"
TEMPERATURES = (0.3, 0.6, 1.0, 1.5)
SHOWN = 8


def main() -> None:
    model, tokenizer = load("base")
    with torch.no_grad():
        scores = model(with_bos(tokenizer, PROMPT), logits_to_keep=1).logits[0, -1]
    words = [tokenizer.decode([token]).strip() or "(space)" for token in scores.topk(SHOWN).indices]
    figure, panels = plt.subplots(1, len(TEMPERATURES), figsize=(10, 2.9), sharey=True)
    for axes, temperature in zip(panels, TEMPERATURES):
        chances = (scores / temperature).softmax(-1)
        axes.barh(range(SHOWN), chances.topk(SHOWN).values, color=BLUE)
        axes.set_yticks(range(SHOWN), words, family="monospace", color="black")
        axes.set(xlim=(0, 1), xlabel="chance")
        axes.grid(axis="y", visible=False)
        rest = 1 - chances.topk(SHOWN).values.sum().item()
        axes.set_title(f"temperature {temperature}")
        axes.text(0.97, 0.04, f"all others: {rest:.0%}", transform=axes.transAxes, ha="right", size=8)
        print(
            temperature, [round(chance, 3) for chance in chances.topk(SHOWN).values.tolist()], "others", round(rest, 3)
        )
    panels[0].invert_yaxis()
    figure.suptitle(f"  {PROMPT} …", x=0, ha="left", size=10.5, fontweight="bold")
    save(figure, "temperature")


if __name__ == "__main__":
    main()
