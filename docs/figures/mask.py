"""A conversation as the network reads it, with the tokens that it is trained on."""

import matplotlib.pyplot as plt
from drawing import GREY, PALE, RUN, paint_tokens, save
from transformers import AutoTokenizer

from modeling_nanochat.tokenization_nanochat_gpt import render_conversation, special_token_ids

MESSAGES = [
    {"role": "user", "content": "Mia has 4 boxes with 18 cards each and 7 more. How many cards does Mia have?"},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "Step by step: "},
            {"type": "python", "text": "4 * 18 + 7"},
            {"type": "python_output", "text": "79"},
            {"type": "text", "text": "\n#### 79"},
        ],
    },
]


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(RUN / "tokenizer")
    ids, mask = render_conversation(tokenizer, MESSAGES)
    print(f"{len(ids)} tokens, {sum(mask)} of them trained on")
    figure, axes = plt.subplots(figsize=(10, 1.9))
    # Decoded alone, one of the marks is shown as " = ".
    marks = {token: mark for mark, token in special_token_ids(tokenizer).items()}
    pieces = [marks.get(token) or tokenizer.decode([token]) for token in ids]
    row = paint_tokens(axes, pieces, [PALE[2] if trained else PALE[5] for trained in mask], columns=98)
    for start, color, text in ((0, PALE[2], "trained on"), (20, PALE[5], "read, never a target")):
        axes.add_patch(plt.Rectangle((start, row + 0.6), 2, 0.8, facecolor=color))
        axes.text(start + 2.6, row + 1.0, text, va="center", size=9, color=GREY)
    axes.set_ylim(row + 1.6, -0.1)
    save(figure, "mask")


if __name__ == "__main__":
    main()
