"""What a model that only runs needs everywhere: rows of unequal length as one batch, and eval mode for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def pad_left(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask (0 where padded), both (B, longest row) int64."""
    longest = max(map(len, rows))
    ids = [[pad_token_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """The model is in eval mode inside, and in the mode that it was in afterwards, also after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
