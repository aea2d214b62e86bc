"""The small run's pretraining as its record tells it, beside what counting and compressing get from the same text."""

import gzip
import json
import lzma
import math

import matplotlib.pyplot as plt
import numpy as np
from drawing import BLUE, GREEN, GREY, RUN, documents, save
from transformers import AutoTokenizer

from modeling_nanochat.training.tokenizer import BulkEncoder

GUESSING = math.log(4096)  # nats
SHARE_OF_PAIRS = 0.9  # of the mixture of pairs and single tokens; the best of a few tried


def counted(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> tuple[float, float]:
    """Nats per held-out token of a table of frequencies, and of a table of pairs mixed with it."""
    single = np.bincount(train, minlength=vocabulary) + 0.5
    chances = single / single.sum()
    keys, counts = np.unique(train[:-1].astype(np.int64) * vocabulary + train[1:], return_counts=True)
    asked = held_out[:-1].astype(np.int64) * vocabulary + held_out[1:]
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    seen = np.where(keys[place] == asked, counts[place], 0)
    pairs = seen / np.maximum(np.bincount(train[:-1], minlength=vocabulary)[held_out[:-1]], 1)
    mixed = SHARE_OF_PAIRS * pairs + (1 - SHARE_OF_PAIRS) * chances[held_out[1:]]
    return -np.log(chances[held_out]).mean(), -np.log(mixed).mean()


def main() -> None:
    record = json.loads((RUN / "base/stage.json").read_text(encoding="utf-8"))
    log = record["log_history"]
    losses = [(line["step"], line["loss"]) for line in log if "loss" in line]
    bits = [(line["step"], line["validation_bits_per_byte"]) for line in log if "validation_bits_per_byte" in line]
    print("losses:", losses[0], losses[9], losses[-1], "bits per byte:", bits)

    tokenizer = AutoTokenizer.from_pretrained(RUN / "tokenizer")
    encode, train, held_out = BulkEncoder(tokenizer), documents("train"), documents("validation")
    tokens, asked = (np.concatenate([encode(text) for text in texts]) for texts in (train, held_out))
    size = sum(len(text.encode()) for text in held_out)
    to_bits = len(asked) / size / math.log(2)  # nats a token -> bits a byte
    single, pairs = counted(tokens, asked, len(tokenizer))
    raw = "\n".join(held_out).encode()
    levels = {
        "gzip": 8 * len(gzip.compress(raw, 9)) / len(raw),
        "how often each token occurs": single * to_bits,
        "xz": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
        "which token follows which": pairs * to_bits,
    }
    print(f"counted on {len(tokens):,} tokens: single {single:.2f}, pairs {pairs:.2f} nats; in bits per byte", levels)

    figure, (loss, measured) = plt.subplots(1, 2, figsize=(10, 3.4))
    loss.axhline(GUESSING, color=GREY, linewidth=1, linestyle=":", label="guessing among 4,096 tokens")
    loss.plot(*zip(*losses), color=BLUE, label="training loss")
    loss.set(xlabel="step of 4,096 tokens", ylabel="nats per token", ylim=(4, 8.6))
    loss.set_title("Surprise at each step of the training")
    loss.legend(fontsize=8)
    measured.plot(*zip(*bits), "o-", color=GREEN)
    for name, level in levels.items():
        measured.axhline(level, color=GREY, linewidth=1, linestyle=":")
        at, side = (bits[0][0], "left") if level < 2 else (bits[-1][0], "right")  # where the curve is not
        measured.text(at, level + 0.015, name, ha=side, size=8, color=GREY)
    measured.set(xlabel="step", ylabel="bits per byte")
    measured.set_title("On text that it never saw")
    save(figure, "loss_curve")


if __name__ == "__main__":
    main()
