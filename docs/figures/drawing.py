"""What the figures share: one look, the demo's folders, and a way to draw text as colored tokens.

Every other file here draws one picture of the essay into docs/images/, from a run of this code, and prints the numbers
that the text quotes. `make figures` draws all of them; each also runs alone:

    python docs/figures/merges.py

Text and trained networks are those of a small run of the demo's stages in out/figures, which `make figures` makes where
it is missing; a fixed number of steps and seeds, so that only float rounding differs from one machine to the next.
"""

from collections.abc import Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_nanochat import NanoChatGPTForCausalLM
from modeling_nanochat.recipes.stages.curves import STYLE
from modeling_nanochat.tokenization_nanochat_gpt import encode_text
from modeling_nanochat.training.data.documents import open_documents, stream_documents

IMAGES = Path(__file__).parents[1] / "images"
RUN = Path("out/figures")
BLUE, RED, GREEN, YELLOW, GREY = "#1f5fa8", "#d1603d", "#2f8f6b", "#d9a62e", "#666666"
PALE = ("#cfe0f3", "#f6d9cd", "#d3eadf", "#f5e7c4", "#e2d6ee", "#dddddd")  # backgrounds that text can stand on

plt.rcParams.update(STYLE)  # the report's, a little smaller
plt.rcParams.update({
    "axes.titlesize": 10.5, "axes.axisbelow": True, "figure.constrained_layout.use": True, "figure.dpi": 100
})  # fmt: skip


def save(figure: plt.Figure, name: str) -> None:
    """Write docs/images/NAME.png, small enough for a repository."""
    IMAGES.mkdir(exist_ok=True)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=120)
    plt.close(figure)
    # 64 colors are all that these need, and a third of the size.
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(IMAGES / f"{name}.png", optimize=True)
    print(f"{name}.png: {(IMAGES / f'{name}.png').stat().st_size // 1000} kB")


def documents(split: str, count: int | None = None) -> list[str]:
    """The first documents of the run's text, one epoch at most."""
    found = stream_documents(open_documents(str(RUN / "data" / "pretrain"), "text"), split)
    texts = []
    for text, position in found:
        if position.epoch or (count is not None and len(texts) == count):
            break
        texts.append(text)
    return texts


def load(stage: str) -> tuple[NanoChatGPTForCausalLM, PreTrainedTokenizerBase]:
    """A network of the run, with its tokenizer: stage "base" or "sft"."""
    folder = RUN / stage
    if not (folder / "config.json").is_file():
        raise SystemExit(f"{folder} holds no network: `make figures` trains it first")
    model = NanoChatGPTForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def with_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """(1, T) ids of a text as the network reads them."""
    return torch.tensor([[tokenizer.bos_token_id, *encode_text(tokenizer, text)]])


def batches(tokenizer: PreTrainedTokenizerBase, rows: int, length: int, count: int) -> list[torch.Tensor]:
    """The first `count` training batches, (rows, length + 1) each, packed as in pretraining."""
    from modeling_nanochat.training.data.packed_rows import PackedRows

    source = open_documents(str(RUN / "data" / "pretrain"), "text")
    packed = PackedRows(source, tokenizer, length + 1)
    taken = [torch.from_numpy(row).long() for row in islice(packed, rows * count)]
    return [torch.stack(taken[start : start + rows]) for start in range(0, len(taken), rows)]


def paint_tokens(
    axes: plt.Axes, pieces: Sequence[str], colors: Sequence[str], columns: int = 76, row: float = 0.0
) -> float:
    """Write pieces of text one after another on colored grounds, wrapped at `columns`; returns the next free row."""
    column = 0
    for piece, color in zip(pieces, colors):
        text = piece.replace("\n", "⏎").replace(" ", "\u00a0")
        if column + len(text) > columns:
            row, column = row + 1.25, 0
        axes.add_patch(plt.Rectangle((column, row), len(text), 1, facecolor=color, edgecolor="white", linewidth=1.2))
        for offset, character in enumerate(text):  # one by one: every font then keeps to the grid
            axes.text(column + offset + 0.5, row + 0.5, character, family="monospace", size=9.5, ha="center",
                      va="center")  # fmt: skip
        column += len(text)
    axes.set(xlim=(0, columns), ylim=(row + 1.1, -0.1))
    axes.axis("off")
    return row + 1.25
