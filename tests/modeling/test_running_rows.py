"""Rows that join and leave a batch, against each of them alone, recomputed without a cache."""

import random

import pytest
import torch

from modeling_nanochat.running_rows import RunningRows
from tests.modeling.test_modeling_generation import recompute
from tests.toys import SHARP_VOCAB, sharp_model


def make_prompt(length: int, seed: int) -> list[int]:
    return torch.randint(1, SHARP_VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("era", ["seed", "head"])
@torch.no_grad()
def test_rows_of_a_changing_batch_decode_as_if_alone(era):
    """Fourteen rows come and go by chance: into free slots, behind the others, wider and narrower than the window."""
    model, chance = sharp_model(era), random.Random(1)
    waiting = [make_prompt(chance.choice([1, 2, 5, 8, 9, 10, 24]), seed) for seed in range(14)]
    rows, scores = RunningRows.read(model, waiting[:2], 0)
    owners: list[tuple[list[int], list[int]] | None] = [(prompt, []) for prompt in waiting[:2]]  # of each slot
    finished, shapes, waiting = [], set(), waiting[2:]
    while waiting or any(owners):
        joining = [waiting.pop() for _ in range(min(len(waiting), chance.randrange(4)))]
        if joining:
            others, other_scores = RunningRows.read(model, joining, 0)
            free = [slot for slot, owner in enumerate(owners) if owner is None][: len(joining)]
            slots = [*free, *range(len(rows), len(rows) + len(joining) - len(free))]
            rows.join(others, free)
            added = len(rows) - len(owners)
            owners += [None] * added
            scores = torch.cat([scores, scores.new_empty(added, SHARP_VOCAB)])
            scores[slots] = other_scores
            for slot, prompt in zip(slots, joining):
                owners[slot] = (prompt, [])
        tokens = scores.argmax(-1)
        for slot, owner in enumerate(owners):
            if owner is not None:
                owner[1].append(tokens[slot].item())
                if chance.random() < 0.1:
                    finished.append(owner)
                    owners[slot] = None
                    rows.free(slot)
        if chance.random() < 0.3 and None in owners and any(owners):
            kept = [slot for slot, owner in enumerate(owners) if owner is not None]
            rows.select(torch.tensor(kept))
            owners, tokens = [owners[slot] for slot in kept], tokens[kept]
        scores = rows.append(tokens)
        if any(owners):
            assert rows.tokens.shape[1] == max(rows.lengths) == rows.mask.sum(1).max()  # never wider than it must
        shapes.add(tuple(rows.tokens.shape))
    assert len(finished) == 14 and len(shapes) > 15 and sum(len(new) for _, new in finished) > 80
    for prompt, new in finished:
        assert new == recompute(model, torch.tensor([prompt]), len(new))[0].tolist()
