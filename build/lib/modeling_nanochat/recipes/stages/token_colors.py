"""Packed rows on a terminal: what is trained in green, the rest pale; brackets where there are no colors.

Tokens are decoded in runs, not one by one, as a character may come in several. The price: a run's inner borders are not
shown.
"""

from collections.abc import Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

GREEN, PALE, PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[0m"


def colored_row(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained: Sequence[bool], colors: bool = True
) -> str:
    """The text of a row with all its marks. Padding at the end is counted instead of shown."""
    used = len(ids)
    while used and ids[used - 1] == tokenizer.pad_token_id and not trained[used - 1]:
        used -= 1
    text, start = "", 0
    for is_trained, run in groupby(trained[:used]):
        end = start + len(list(run))
        piece = tokenizer.decode(ids[start:end])
        if colors:
            text += f"{GREEN if is_trained else PALE}{piece}{PLAIN}"
        else:
            text += f"[[{piece}]]" if is_trained else piece
        start = end
    return text + (f" (and {len(ids) - used} of padding)" if used < len(ids) else "")
