"""Bytes per token against the size of the vocabulary, and one sentence cut by three of those vocabularies."""

import matplotlib.pyplot as plt
from drawing import BLUE, GREY, PALE, documents, paint_tokens, save

from modeling_nanochat.recipes.train_tokenizer import bytes_per_token
from modeling_nanochat.tokenization_nanochat_gpt import encode_text
from modeling_nanochat.training.tokenizer import train_tokenizer

SIZES = (320, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SENTENCE = "Fellow citizens, the strawberry harvest of 1862 was larger than anybody had expected."


def main() -> None:
    train, validation = documents("train"), documents("validation", 300)
    tokenizers = {size: train_tokenizer(iter(train), size) for size in SIZES}
    coverage = {size: bytes_per_token(tokenizer, validation) for size, tokenizer in tokenizers.items()}
    words = tokenizers[4096].convert_ids_to_tokens(range(4087))
    print("first merges:", [word.replace("Ġ", "_") for word in words[256:276]])
    print("longest tokens:", sorted((word.replace("Ġ", "_") for word in words), key=len)[-8:])
    print("bytes per token:", {size: round(value, 2) for size, value in coverage.items()})

    figure, (curve, cut) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1, 1.35))
    curve.plot(SIZES, list(coverage.values()), "o-", color=BLUE)
    for size, value in coverage.items():
        curve.annotate(f"{value:.2f}", (size, value), xytext=(0, -14), textcoords="offset points", ha="center",
                       size=8, color=GREY)  # fmt: skip
    curve.set(xscale="log", xlabel="tokens in the vocabulary", ylabel="bytes that one token covers", ylim=(0.8, 5))
    curve.set_xticks(SIZES[::2], [f"{size:,}" for size in SIZES[::2]])
    curve.minorticks_off()
    curve.set_title("Each doubling buys a little less")
    row = 0.0
    for size in (320, 1024, 8192):
        ids = encode_text(tokenizers[size], SENTENCE)
        pieces = [tokenizers[size].decode([token]) for token in ids]
        cut.text(0, row + 0.6, f"{size:,} tokens in the vocabulary: {len(pieces)} pieces", size=9, color=GREY)
        print(size, pieces)
        row = paint_tokens(cut, pieces, [PALE[i % 5] for i in range(len(pieces))], columns=48, row=row + 1) + 0.6
    cut.set_title("One sentence, three vocabularies")
    save(figure, "merges")


if __name__ == "__main__":
    main()
