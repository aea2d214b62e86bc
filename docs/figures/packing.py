"""Packed rows colored by document, and how much text each way of filling rows throws away."""

from itertools import islice

import matplotlib.pyplot as plt
import numpy as np
from drawing import BLUE, GREY, RED, RUN, documents, save
from matplotlib.colors import ListedColormap
from transformers import AutoTokenizer

from modeling_nanochat.training.data.packing import BestFitPacker
from modeling_nanochat.training.tokenizer import BulkEncoder

SHOWN, LENGTH = 24, 1024


def cropped_share(encoded: list[np.ndarray], length: int, buffer_size: int) -> float:
    packer = BestFitPacker(length + 1, buffer_size)
    for _ in packer.pack(encoded):
        pass
    stats = packer.stats
    return 1 - stats.tokens / (stats.tokens + stats.cropped_tokens)


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(RUN / "tokenizer")
    encode = BulkEncoder(tokenizer)
    encoded = [encode(text) for text in documents("train", 8000)]
    lengths = np.array([len(ids) for ids in encoded])
    print("documents:", len(lengths), "median length", np.median(lengths), "longest", lengths.max())
    packer = BestFitPacker(LENGTH + 1)
    rows = np.stack(list(islice(packer.pack(encoded), 400, 400 + SHOWN)))
    begins = rows == tokenizer.bos_token_id
    print("documents in the rows shown:", begins.sum(axis=1).tolist())

    figure, (picture, shares) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1.5, 1))
    colors = begins.cumsum(axis=1) + np.arange(SHOWN)[:, None] * 3
    palette = ListedColormap(["#cfe0f3", "#f6d9cd", "#d3eadf", "#f5e7c4", "#e2d6ee", "#9fb8d6", "#e0ac95"])
    picture.imshow(colors % 7, aspect="auto", cmap=palette, interpolation="nearest")
    for row, column in zip(*np.nonzero(begins)):
        picture.plot([column, column], [row - 0.5, row + 0.5], color="#333333", linewidth=0.8)
    picture.set(xlabel=f"{LENGTH + 1:,} tokens of a row", ylabel="rows", yticks=[])
    picture.grid(False)
    picture.set_title("Best-fit rows: a color for each document")
    sizes = (128, 256, 512, 1024, 2048)
    for buffer_size, color, name in ((1, GREY, "in order, cut at the end"), (10, RED, "best fit of 10"),
                                     (1000, BLUE, "best fit of 1,000")):  # fmt: skip
        values = [cropped_share(encoded, size, buffer_size) for size in sizes]
        print(name, dict(zip(sizes, (round(value, 3) for value in values))))
        shares.plot(sizes, [100 * value for value in values], "o-", color=color, label=name)
    shares.set(xscale="log", xlabel="tokens in a row", ylabel="percent of the text thrown away", ylim=(0, None))
    shares.set_xticks(sizes, sizes)
    shares.minorticks_off()
    shares.set_title("What is cropped")
    shares.legend(fontsize=8)
    save(figure, "packing")


if __name__ == "__main__":
    main()
