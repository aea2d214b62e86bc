"""Continuous batched decoding: one thread, one running batch, requests that come and go while it runs.

    while there are requests:
        rows of cancelled requests leave
        waiting requests that fit are read together, and their rows join
        a token is drawn for every row and delivered; rows that end leave
        the others go through the network

So a request waits for a free row and for one step, never for another's answer, and an answer that nobody wants costs
one token more. What a row says depends on its prompt, seed and settings, not on its company: the n-th token of an
answer is drawn with the n-th number of the answer's own random sequence. (Batches of different shapes round
differently in the last bit; that can tip a draw or a tie once in millions of tokens.)

A long prompt holds the running answers up while it is read; prompts read at once are bounded for that reason.
"""

import copy
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_nanochat.recipes.serving.answer import Answer, Shown, Vocabulary
from modeling_nanochat.recipes.serving.sampling import Sampling, choose
from modeling_nanochat.running_rows import RunningRows
from modeling_nanochat.tokenization_nanochat_gpt import generation_token_ids
from modeling_nanochat.tool_use import CalculatorLogitsProcessor

TOKENS_READ_AT_ONCE = 8192  # of prompts, padding included, in one pass; a longer prompt is read alone
FREE_SHARE = 1 / 8  # of the batch: from there on moving the cache together costs less than decoding for nobody


class Busy(Exception):
    """As many requests wait as may."""


@dataclass
class Piece:
    """What one more token adds to an answer.

    Attributes:
        index: which of the request's answers.
        shown: what appears; often nothing.
        token: its id; None if the answer ends for another reason than a token.
        top: (id, log-probability) of the token itself and of the likeliest ones, if the request asks for them.
        end: why the answer ends here: "stop", "length" or "error"; None if it goes on.
    """

    index: int
    shown: list[Shown]
    token: int | None = None
    top: list[tuple[int, float]] | None = None
    end: str | None = None


@dataclass(eq=False)
class Request:
    """Answers wanted to one prompt.

    Attributes:
        prompt: token ids.
        deliver: gets the new pieces after each token, in the decoding thread: it must be quick and must not fail.
        count: answers wanted, each with a row of its own.
        max_new_tokens: length at which an answer is cut off, forced tokens and the mark of its end included.
        seed: the same for the same answers; None for new ones each time.
        stop: strings that end an answer and are not shown.
        top_logprobs: log-probabilities of so many likeliest tokens beside the drawn one's; None for none at all.
    """

    prompt: list[int]
    deliver: Callable[[list[Piece]], None]
    count: int = 1
    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)


class Row:
    """One answer that is being decoded."""

    def __init__(self, request: Request, index: int, vocabulary: Vocabulary):
        self.request, self.index = request, index
        self.answer = Answer(vocabulary, request.stop)
        self.random = random.Random(None if request.seed is None else f"{request.seed} {index}")
        self.length = 0


@dataclass
class Counts:
    """What has happened since the start, for `/metrics`; written by the decoding thread only."""

    requests: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    waiting_seconds: float = 0.0  # of all requests, from their arrival until they were read


class Engine:
    """Decodes for many at once; `submit` and `cancel` may be called from any thread.

    Args:
        model: a causal language model with a cache, in eval mode.
        tokenizer: byte-level, with the nine special tokens; the calculator speaks through it.
        max_rows: answers decoded at the same time; the cache grows to so many rows of the context's length.
        max_waiting: requests that may wait for a row.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_rows: int = 64, max_waiting: int = 256
    ):
        if max_rows < 1 or max_waiting < 1:
            raise ValueError(f"max_rows is {max_rows} and max_waiting {max_waiting}, expected 1 or more")
        self.model, self.max_rows, self.max_waiting = model, max_rows, max_waiting
        self.context: int = model.config.max_position_embeddings
        # A tokenizer serves one thread at a time: this one has its own.
        self.vocabulary, self.calculator = Vocabulary(tokenizer), CalculatorLogitsProcessor(copy.deepcopy(tokenizer))
        ids = generation_token_ids(tokenizer)
        self.end_tokens, self.pad_token = set(ids["eos_token_id"]), ids["pad_token_id"]
        self.counts = Counts()
        self._changed = threading.Condition()  # guards the next two
        self._waiting: deque[Request] = deque()
        self._closed = False
        self._slots: list[Row | None] = []  # whose answer each row of the batch is; touched by the thread only
        self._rows: RunningRows | None = None
        self._scores = torch.empty(0)  # (slots, V) of the next tokens
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return sum(row is not None for row in self._slots)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Takes a request; its pieces come until each of its answers has ended.

        Raises:
            Busy: too many wait already.
            ValueError: it can never be served: no prompt, no room for an answer, more answers than rows.
        """
        if not request.prompt or len(request.prompt) >= self.context or not 1 <= request.count <= self.max_rows:
            raise ValueError(
                f"{request.count} answers to {len(request.prompt)} tokens are wanted; expected 1 to {self.max_rows} "
                f"answers to 1 to {self.context - 1} tokens"
            )
        request.max_new_tokens = min(request.max_new_tokens, self.context - len(request.prompt))
        with self._changed:
            if self._closed:
                raise Busy("the server is being shut down")
            if len(self._waiting) >= self.max_waiting:
                raise Busy(f"{len(self._waiting)} requests are waiting, which is as many as may")
            self._waiting.append(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Nothing more is wanted; a request that has ended may be cancelled too."""
        request.cancelled = True
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
                self.counts.cancelled += 1

    def close(self) -> None:
        """Ends the thread; answers that are not finished end with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed or self.running)
                if self._closed:
                    break
                cancelled = [row for row in self._slots if row is not None and row.request.cancelled]
                joining = self._take(self.max_rows - self.running + len(cancelled))
            try:
                self._leave(cancelled)
                self.counts.cancelled += len({row.request for row in cancelled})
                self._join(joining)
                self._compact()
                self._step()
            except Exception as error:  # such as no memory left: those who are being served hear of it, others go on
                print(f"decoding failed: {type(error).__name__}: {error}", flush=True)
                self._fail(joining)
        self._fail(list(self._waiting))

    def _take(self, free: int) -> list[Request]:
        """The requests that are read next, in the order of their arrival; a wide one is not overtaken."""
        taken: list[Request] = []
        longest = 0
        while self._waiting and self._waiting[0].count <= free:
            longest = max(longest, len(self._waiting[0].prompt))
            if taken and longest * (len(taken) + 1) > TOKENS_READ_AT_ONCE:
                break
            taken.append(self._waiting.popleft())
            free -= taken[-1].count
        return taken

    def _leave(self, rows: list[Row]) -> None:
        for row in rows:
            slot = self._slots.index(row)
            self._slots[slot] = None
            self._rows.free(slot)
        if not self.running:
            self._rows, self._slots = None, []

    def _join(self, requests: list[Request]) -> None:
        """Reads the prompts, equal ones once, and gives every answer wanted a row."""
        if not requests:
            return
        now = time.monotonic()
        position = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(request.prompt) for request in requests))}
        others, scores = RunningRows.read(self.model, list(position), self.pad_token)
        origin = [position[tuple(request.prompt)] for request in requests for _ in range(request.count)]
        index = torch.tensor(origin, device=scores.device)
        others.select(index)
        rows = [Row(request, i, self.vocabulary) for request in requests for i in range(request.count)]
        if self._rows is None:
            self._rows, self._scores, self._slots = others, scores[index], rows
        else:
            free = [slot for slot, row in enumerate(self._slots) if row is None][: len(rows)]
            self._rows.join(others, free)
            more = len(self._rows) - len(self._slots)
            slots = [*free, *range(len(self._slots), len(self._rows))]
            self._slots += [None] * more
            self._scores = torch.cat([self._scores, self._scores.new_empty(more, self._scores.shape[1])])
            self._scores[slots] = scores[index]
            for slot, row in zip(slots, rows):
                self._slots[slot] = row
        self.counts.requests += len(requests)
        self.counts.prompt_tokens += sum(len(request.prompt) for request in requests)
        self.counts.waiting_seconds += sum(now - request.arrived for request in requests)

    def _compact(self) -> None:
        """Closes the gaps in the batch when they have become many."""
        kept = [slot for slot, row in enumerate(self._slots) if row is not None]
        if kept and len(self._slots) - len(kept) >= FREE_SHARE * len(self._slots):
            index = torch.tensor(kept, device=self._scores.device)
            self._rows.select(index)
            self._scores, self._slots = self._scores[index], [self._slots[slot] for slot in kept]

    def _step(self) -> None:
        """One token for every row."""
        if self._rows is None:
            return
        scores = self.calculator(self._rows.tokens, self._scores)
        greedy = Sampling(temperature=0)
        settings = [greedy if row is None else row.request.sampling for row in self._slots]
        uniforms = [0.0 if row is None else row.random.random() for row in self._slots]
        tokens = choose(scores, settings, uniforms)
        pieces: dict[Request, list[Piece]] = {}
        ended = []
        for slot, (row, token) in enumerate(zip(self._slots, tokens.tolist())):
            if row is not None:
                piece = self._piece(row, token, scores[slot])
                pieces.setdefault(row.request, []).append(piece)
                ended += [row] if piece.end else []
        self.counts.generated_tokens += sum(map(len, pieces.values()))
        self.counts.steps += 1
        for request, new in pieces.items():
            request.deliver(new)
        self._leave(ended)
        if self._rows is not None:
            self._scores = self._rows.append(tokens)

    def _piece(self, row: Row, token: int, scores: torch.Tensor) -> Piece:
        request = row.request
        row.length += 1
        top = None if request.top_logprobs is None else log_probabilities(scores, token, request.top_logprobs)
        if token in self.end_tokens:
            return Piece(row.index, row.answer.finish(), token, top, "stop")
        shown = row.answer.add(token)
        if row.answer.stopped:
            return Piece(row.index, shown, token, top, "stop")
        if row.length == request.max_new_tokens:
            return Piece(row.index, [*shown, *row.answer.finish()], token, top, "length")
        return Piece(row.index, shown, token, top)

    def _fail(self, requests: list[Request]) -> None:
        """Ends what is running, and these requests, with an error."""
        running = [row for row in self._slots if row is not None]
        self._slots, self._rows = [], None
        failed = dict.fromkeys([*(row.request for row in running), *requests])
        self.counts.failed += len(failed)
        for request in failed:
            request.deliver([Piece(index, [], end="error") for index in range(request.count)])


def log_probabilities(scores: torch.Tensor, token: int, count: int) -> list[tuple[int, float]]:
    """(id, log-probability) of a token and after it of the `count` likeliest, by scores (V,) before temperature."""
    logprobs = scores.log_softmax(-1)
    values, ids = logprobs.topk(count)
    return [(token, logprobs[token].item()), *zip(ids.tolist(), values.tolist())]
