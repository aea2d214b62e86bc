"""A token for each row of a batch in which every row has its own temperature, top_k, top_p and random number."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling_nanochat.inference import TEMPERATURE, TOP_K
from modeling_nanochat.running_rows import draw

LOWEST_TEMPERATURE = 1e-4  # below this every draw is the likeliest token, and scores would leave float32


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen: temperature 0 takes the likeliest; top_k 0 and top_p 1 leave all in."""

    temperature: float = TEMPERATURE
    top_k: int = TOP_K
    top_p: float = 1.0


def choose(scores: Tensor, settings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """The tokens (B,) for float32 scores (B, V), a setting and a number in [0, 1) for each row.

    Raises:
        FloatingPointError: the scores are not numbers.
    """
    if scores.isnan().any():
        raise FloatingPointError("the network's scores are not numbers (NaN): are its weights whole?")
    tokens = scores.argmax(-1)
    rows = [row for row, setting in enumerate(settings) if setting.temperature >= LOWEST_TEMPERATURE]
    if not rows:
        return tokens
    index = torch.tensor(rows, device=scores.device)
    chosen = [settings[row] for row in rows]
    temperature = torch.tensor([[setting.temperature] for setting in chosen], device=scores.device)
    scaled = scores[index] / temperature  # (N, V)
    if any(setting.top_k or setting.top_p < 1 for setting in chosen):
        scaled = truncated(scaled, chosen)
    tokens[index] = draw(scaled, torch.tensor([uniforms[row] for row in rows], device=scores.device))
    return tokens


def truncated(scores: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """The scores (N, V) with -inf outside the top_k best of a row and outside the fewest best that reach top_p.

    Ties are broken by the order of the sort; the best token always stays.
    """
    size, device = scores.shape[1], scores.device
    top_k = torch.tensor([[setting.top_k or size] for setting in settings], device=device)
    top_p = torch.tensor([[setting.top_p] for setting in settings], device=device)
    # Without top_p only the largest top_k matter, and finding a few is cheaper than sorting the vocabulary.
    needed = size if any(setting.top_p < 1 for setting in settings) else min(size, int(top_k.max()))
    best, order = scores.topk(needed, dim=-1)  # (N, needed), falling
    best = best.masked_fill(torch.arange(needed, device=device) >= top_k, -float("inf"))
    probabilities = best.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    best = best.masked_fill((before >= top_p) & (top_p < 1), -float("inf"))
    return torch.full_like(scores, -float("inf")).scatter(1, order, best)
