"""How likely a model finds parts of token sequences: the mean loss of a span, and of how many tokens it was sure.

    groups of sequences with spans => batches of similar length
      a group's common beginning is read once, its cache is copied to the group's sequences
      the rest of every sequence is read, padded on the right, and logits are made at the scored places alone

Nothing is padded on the left and there is no attention mask: what a causal model makes of a token does not depend on
what follows it, so this holds for every causal model. The groups of a batch begin at the same place: the shortest
common beginning among them; the few tokens that the others share beyond it are read again with each sequence.

Whether a model's cache can be gone on from by several tokens (Mamba's cannot), and whether its head can be given
chosen states, is tried on a short example against the plain forward pass when a `SpanScorer` is made; what does not
give the same is done without. The price: the cache of a batch has to fit into memory, which `batch_tokens` bounds.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from modeling_nanochat.eval.models import logits_at
from modeling_nanochat.inference import eval_mode

LOGITS_AT_ONCE = 1 << 27  # numbers: 512 MiB in float32
READ_AGAIN = 0.1  # share of the common beginnings that a batch may read again with each sequence
LARGEST_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3}  # in nats, between a fast way and the plain one
LARGEST_ERROR_OF_HALVES = 0.05  # in bfloat16 and float16


@dataclass(frozen=True)
class Group:
    """Sequences that are compared with each other, of which tokens [start, end) are scored.

    Attributes:
        sequences: token ids, none empty.
        spans: start >= 1 and end for each sequence.
    """

    sequences: list[list[int]]
    spans: list[tuple[int, int]]

    @property
    def shared(self) -> int:
        """How many tokens all sequences begin with, before any that predicts a scored one."""
        if len(self.sequences) == 1:
            return 0
        return max(0, min(common_length(self.sequences), *(start for start, _ in self.spans)) - 1)

    @property
    def longest(self) -> int:
        return max(map(len, self.sequences))


@dataclass(frozen=True)
class SpanScore:
    """Mean loss of a span in nats, and how many of its tokens were the likeliest."""

    loss: float
    certain: int


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    for position, tokens in enumerate(zip(*sequences)):
        if len(set(tokens)) > 1:
            return position
    return min(map(len, sequences))


@dataclass(frozen=True)
class Batch:
    """Groups by their indices, and how many tokens at the beginning of each are read once (0: none)."""

    groups: list[int]
    shared: int


def make_batches(groups: Sequence[Group], batch_tokens: int, vocabulary: int, share: bool = True) -> list[Batch]:
    """Groups of similar length together, the longest first, so that their padded rows stay within the budget.

    A group beyond the budget is a batch of its own. What shares a beginning never meets what does not.
    """
    facts = [(group.shared if share else 0, group.longest, group) for group in groups]
    order = sorted(range(len(groups)), key=lambda index: (facts[index][0] == 0, -facts[index][0], -facts[index][1]))
    batches: list[Batch] = []
    rows = width = scored = again = total = 0
    for index in order:
        shared, longest, group = facts[index]
        more, spans = len(group.sequences), sum(end - start for start, end in group.spans)
        if batches:
            last = batches[-1]
            lost = again + (last.shared - shared) * rows  # as `shared` becomes the batch's beginning
            if (
                (last.shared > 0) == (shared > 0)
                and (rows + more) * max(width, longest) <= batch_tokens
                and (scored + spans) * vocabulary <= LOGITS_AT_ONCE
                and lost <= READ_AGAIN * (total + shared)
            ):
                batches[-1] = Batch([*last.groups, index], shared)
                rows, width, scored, again, total = (
                    rows + more, max(width, longest), scored + spans, lost, total + shared,
                )  # fmt: skip
                continue
        batches.append(Batch([index], shared))
        rows, width, scored, again, total = more, longest, spans, 0, shared
    return batches


class SpanScorer:
    """Scores spans with one model, by the fastest way that gives what the model's plain forward pass gives.

    Args:
        model: any causal language model.
        batch_tokens: rows x longest row that are in memory at once; halved for good when the device runs out of it.

    `shares_beginnings` and `chooses_states` say which of the two savings the model allows.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int = 16384):
        self.model, self.batch_tokens = model, batch_tokens
        self.vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self.shares_beginnings = self.chooses_states = False
        beginning = [(7 * i + 3) % min(self.vocabulary, 97) for i in range(12)]
        rows = [[*beginning, *rest] for rest in ([1, 2, 5], [4, 6, 2, 8, 3], [9])]
        trial = Group(rows, [(12, 15), (13, 17), (12, 13)])
        with eval_mode(model):
            plain = [self._score(Group([row], [span]), 0)[0] for row, span in zip(trial.sequences, trial.spans)]
            self.chooses_states = self._gives(plain, trial, 0, chooses_states=True)
            self.shares_beginnings = self._gives(plain, trial, trial.shared, chooses_states=self.chooses_states)

    def _score(self, group: Group, shared: int) -> list[SpanScore]:
        return self._score_batch([group], shared)

    def _gives(self, plain: Sequence[SpanScore], trial: Group, shared: int, chooses_states: bool) -> bool:
        """Whether a fast way gives the plain scores."""
        before, self.chooses_states = self.chooses_states, chooses_states
        try:
            found = self._score(trial, shared)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, IndexError):
            return False
        finally:
            self.chooses_states = before
        tolerance = LARGEST_ERROR.get(self.model.dtype, LARGEST_ERROR_OF_HALVES)
        return all(abs(one.loss - other.loss) <= tolerance for one, other in zip(plain, found))

    def __call__(self, groups: Sequence[Group], label: str | None = None) -> list[list[SpanScore]]:
        """The scores of every group's spans, in the order of the groups. `label` names the progress bar."""
        scores: list[list[SpanScore]] = [[] for _ in groups]
        waiting = range(len(groups))
        with (
            eval_mode(self.model),
            tqdm(total=len(groups), desc=label, leave=False, disable=label is None or None) as bar,
        ):
            while waiting:
                asked = [groups[index] for index in waiting]
                for batch in make_batches(asked, self.batch_tokens, self.vocabulary, self.shares_beginnings):
                    chosen = [asked[place] for place in batch.groups]
                    try:
                        found = iter(self._score_batch(chosen, batch.shared))
                    except torch.OutOfMemoryError as error:
                        self._take_less(chosen, error)
                        break
                    for place, group in zip(batch.groups, chosen):
                        scores[waiting[place]] = [next(found) for _ in group.sequences]
                    bar.update(len(chosen))
                waiting = [index for index in waiting if not scores[index]]
        return scores

    def _take_less(self, groups: Sequence[Group], error: torch.OutOfMemoryError) -> None:
        """Halves the budget after groups that the device's memory did not hold."""
        longest = max(group.longest for group in groups)
        tokens = min(self.batch_tokens, longest * sum(len(group.sequences) for group in groups))
        if tokens <= longest:  # one row at a time already
            raise error
        self.batch_tokens = tokens // 2
        tqdm.write(f"out of memory with {tokens:,} tokens at once: going on with {self.batch_tokens:,}")

    @torch.no_grad()
    def _score_batch(self, groups: Sequence[Group], shared: int) -> list[SpanScore]:
        """Scores of all sequences of the groups, whose first `shared` tokens are read once for each group."""
        cache = None
        if shared:
            beginnings = torch.tensor([group.sequences[0][:shared] for group in groups], device=self.model.device)
            cache = self._read(beginnings)
        origin = [place for place, group in enumerate(groups) for _ in group.sequences]
        rests = [sequence[shared:] for group in groups for sequence in group.sequences]
        spans = [(start - shared, end - shared) for group in groups for start, end in group.spans]
        scores: list[SpanScore] = []
        pieces = list(self._pieces(rests, spans, shared))
        for piece in pieces:
            own = None
            if cache is not None:
                own = cache if len(pieces) == 1 else copy.deepcopy(cache)
                own.reorder_cache(torch.tensor(origin[piece], device=self.model.device))
            scores += self._score_rows(rests[piece], spans[piece], own)
        return scores

    def _pieces(self, rests: list[list[int]], spans: list[tuple[int, int]], shared: int) -> Iterator[slice]:
        """Slices of the rows that are within the budget; nearly always a single one, as batches are."""
        start = scored = 0
        for row in range(len(rests)):
            width = shared + max(map(len, rests[start : row + 1]))
            scored += spans[row][1] - spans[row][0]
            beyond = (row + 1 - start) * width > self.batch_tokens or scored * self.vocabulary > LOGITS_AT_ONCE
            if beyond and row > start:
                yield slice(start, row)
                start, scored = row, spans[row][1] - spans[row][0]
        yield slice(start, len(rests))

    def _read(self, ids: torch.Tensor) -> Cache:
        """The cache of (B, T) tokens; the head gets one state, as nobody wants its logits."""
        cache = DynamicCache(config=self.model.config)
        self._forward(ids, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), cache)
        return cache

    def _score_rows(
        self, rows: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]], cache: Cache | None
    ) -> list[SpanScore]:
        """Scores of rows, padded on the right here, that go on from the cache if there is one."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.model.device)  # (R, T)
        index = [row for row, (start, end) in enumerate(spans) for _ in range(start, end)]
        place = [place for start, end in spans for place in range(start, end)]
        index, place = torch.tensor(index, device=ids.device), torch.tensor(place, device=ids.device)  # (N,)
        logits = self._forward(ids, index, place - 1, cache)  # (N, V)
        targets = ids[index, place]
        losses = F.cross_entropy(logits, targets, reduction="none").cpu().double()
        certain = (logits.argmax(dim=-1) == targets).cpu()
        lengths = [end - start for start, end in spans]
        return [
            SpanScore(float(loss.mean()), int(sure.sum()))
            for loss, sure in zip(losses.split(lengths), certain.split(lengths))
        ]

    def _forward(
        self, ids: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        """Logits at the places of (R, T) tokens, (N, V) float32."""
        rows, places = rows.to(ids.device), places.to(ids.device)
        arguments: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            arguments["past_key_values"] = cache
        if not self.chooses_states:
            return self.model(input_ids=ids, **arguments).logits[rows, places].float()
        return logits_at(self.model, ids, rows, places, **arguments).float()
