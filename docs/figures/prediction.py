"""What the demo's network expects after a few words, and how well it foresaw each token of a text it never saw."""

import matplotlib.pyplot as plt
import torch
from drawing import BLUE, GREY, documents, load, paint_tokens, save, with_bos

PROMPTS = ("The people of the United", "The President of the", "My lord, I")
SHADES = ("#f6d9cd", "#f5e7c4", "#e3edda", "#b9dcc9", "#8cc7a9")  # from badly to well foreseen
BOUNDS = (0.01, 0.1, 0.3, 0.7)


def main() -> None:
    model, tokenizer = load("base")
    figure = plt.figure(figsize=(10, 4.6))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    for axes, prompt in zip(top.subplots(1, len(PROMPTS)), PROMPTS):
        with torch.no_grad():
            scores = model(with_bos(tokenizer, prompt), logits_to_keep=1).logits[0, -1]
        chances, tokens = scores.softmax(-1).topk(6)
        words = [repr(tokenizer.decode([token]))[1:-1] for token in tokens]
        axes.barh(range(6), chances, color=BLUE)
        axes.set_yticks(range(6), words, family="monospace", color="black")
        axes.set(xlim=(0, 1), xlabel="chance")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_title(f"{prompt} …")
        print(prompt, [(word, round(chance, 3)) for word, chance in zip(words, chances.tolist())])

    text = next(text for text in documents("validation", 300) if "United States" in text and len(text) > 600)[:430]
    ids = with_bos(tokenizer, text)
    with torch.no_grad():
        chances = model(ids[:, :-1]).logits.softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]  # (T,)
    print("mean loss:", -chances.log().mean().item(), "nats; share above 0.5:", (chances > 0.5).float().mean().item())
    axes = bottom.subplots()
    colors = [SHADES[sum(chance >= bound for bound in BOUNDS)] for chance in chances.tolist()]
    row = paint_tokens(axes, [tokenizer.decode([token]) for token in ids[0, 1:]], colors, columns=104)
    names = ("under 1%", "to 10%", "to 30%", "to 70%", "above 70%: the chance that it gave to the token that came")
    for place, (color, name) in enumerate(zip(SHADES, names)):
        axes.add_patch(plt.Rectangle((place * 14, row + 0.6), 2, 0.8, facecolor=color))
        axes.text(place * 14 + 2.6, row + 1.0, name, va="center", size=8.5, color=GREY)
    axes.set_ylim(row + 1.6, -0.1)
    save(figure, "prediction")


if __name__ == "__main__":
    main()
