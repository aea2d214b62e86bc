"""The engine: answers in company equal answers alone, rows are freed, bounds hold, and an error ends nobody else."""

import threading
import time
from collections import defaultdict

import pytest
import torch
from transformers import GenerationConfig

from modeling_nanochat import render_prompt
from modeling_nanochat.recipes.serving import engine as engine_module
from modeling_nanochat.recipes.serving.engine import Busy, Engine, Piece, Request
from modeling_nanochat.recipes.serving.sampling import Sampling, choose
from modeling_nanochat.tokenization_nanochat_gpt import generation_token_ids
from modeling_nanochat.tool_use import CalculatorLogitsProcessor
from tests.toys import digit_tokenizer, sharp_model

GREEDY, WARM = Sampling(temperature=0), Sampling(temperature=1.0, top_k=0)


@pytest.fixture(scope="module")
def tokenizer():
    return digit_tokenizer()


@pytest.fixture(params=["seed", "head"])
def engine(request, tokenizer):
    engine = Engine(sharp_model(request.param), tokenizer, max_rows=5, max_waiting=40)
    yield engine
    engine.close()
    assert engine.running == 0 and not any(thread is engine._thread for thread in threading.enumerate())


class Client:
    """Collects what the engine delivers."""

    def __init__(self, engine: Engine, prompt: list[int], **settings):
        self.pieces: dict[int, list[Piece]] = defaultdict(list)
        self.ended = threading.Event()
        self.request = Request(prompt, self.deliver, **settings)
        engine.submit(self.request)

    def deliver(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self.pieces[piece.index].append(piece)
        ends = [pieces[-1].end for pieces in self.pieces.values()]
        if len(ends) == self.request.count and all(ends):
            self.ended.set()

    def answers(self) -> list[list[int]]:
        assert self.ended.wait(60)
        return [[piece.token for piece in self.pieces[index]] for index in sorted(self.pieces)]


def prompts(tokenizer, count: int) -> list[list[int]]:
    """Of 5 to 32 tokens, within and beyond the network's window."""
    return [render_prompt(tokenizer, [{"role": "user", "content": "x" * (5 * i % 28) + str(i)}]) for i in range(count)]


def test_greedy_answers_in_changing_company_equal_generate_alone(engine, tokenizer):
    clients = []
    for i, prompt in enumerate(prompts(tokenizer, 18)):
        clients.append(Client(engine, prompt, sampling=GREEDY, max_new_tokens=4 + i % 7))
        time.sleep(0.002 * (i % 3))  # some join a batch that runs
    config = GenerationConfig(**generation_token_ids(tokenizer), do_sample=False)
    for client in clients:
        prompt, (answer,) = client.request.prompt, client.answers()
        expected = engine.model.generate(
            torch.tensor([prompt]),
            generation_config=config,
            max_new_tokens=client.request.max_new_tokens,
            logits_processor=[CalculatorLogitsProcessor(tokenizer)],
        )[0, len(prompt) :].tolist()
        assert answer == expected
    assert engine.counts.generated_tokens > 1.5 * engine.counts.steps  # they did share steps


def test_samples_depend_on_their_seed_and_not_on_their_company(engine, tokenizer):
    prompt, *others = prompts(tokenizer, 9)
    settings = {"sampling": WARM, "max_new_tokens": 12}
    alone = Client(engine, prompt, seed=7, count=3, **settings).answers()
    company = [Client(engine, other, **settings) for other in others]
    again, other_seed = (Client(engine, prompt, seed=seed, count=3, **settings) for seed in (7, 8))
    fewer = Client(engine, prompt, seed=7, count=1, **settings)
    assert again.answers() == alone != other_seed.answers()
    assert fewer.answers() == alone[:1]
    assert len(set(map(tuple, alone))) == 3
    unseeded = [Client(engine, prompt, **settings).answers() for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    assert all(client.answers() for client in company)


def test_a_cancelled_answer_frees_its_row_within_a_token(engine, tokenizer):
    """Five answers fill the batch and a sixth waits; after three steps one of the five is given up."""
    prompt = prompts(tokenizer, 1)[0]
    steps = defaultdict(list)

    class Counting(Client):
        def deliver(self, pieces):
            super().deliver(pieces)
            steps[self].append(engine.counts.steps)
            if self is clients[0] and len(steps[self]) == 3:
                engine.cancel(clients[3].request)

    clients: list[Client] = []
    with engine._changed:  # all come at once
        for length in (20, 20, 20, 20, 20, 2):
            clients.append(Counting.__new__(Counting))
            clients[-1].__init__(engine, prompt, sampling=WARM, seed=3, max_new_tokens=length)
    for client in (*clients[:3], *clients[4:]):
        client.answers()
    assert steps[clients[3]] == [1, 2, 3] and not clients[3].ended.is_set()
    assert steps[clients[5]] == [4, 5]  # its row was taken at once
    assert engine.counts.cancelled == 1
    with engine._changed:
        waiting = Client(engine, prompt)
        engine.cancel(waiting.request)
        assert engine.waiting == 0
    assert len(Client(engine, prompt, sampling=GREEDY, max_new_tokens=3).answers()[0]) == 3
    assert not waiting.pieces


def test_what_can_never_be_served_and_what_is_too_much_is_refused(engine, tokenizer):
    prompt = prompts(tokenizer, 1)[0]
    for ids, count in (([], 1), ([1] * 64, 1), (prompt, 6), (prompt, 0)):
        with pytest.raises(ValueError, match="expected 1 to 5 answers to 1 to 63 tokens"):
            Client(engine, ids, count=count)
    longest = Client(engine, [1] * 63, sampling=GREEDY, max_new_tokens=99)
    assert len(longest.answers()[0]) == 1 and longest.pieces[0][0].end in ("length", "stop")
    with engine._changed:  # nothing leaves the queue meanwhile
        clients = [Client(engine, prompt, max_new_tokens=1) for _ in range(40)]
        with pytest.raises(Busy, match="40 requests are waiting"):
            Client(engine, prompt)
    assert all(client.answers() for client in clients)


def test_an_error_ends_what_runs_and_nothing_else(engine, tokenizer, monkeypatch, capsys):
    prompt = prompts(tokenizer, 1)[0]

    def broken(scores, settings, uniforms):
        raise FloatingPointError("the network's scores are not numbers")

    with monkeypatch.context() as patched:
        patched.setattr(engine_module, "choose", broken)
        client = Client(engine, prompt, count=2)
        client.answers()
    assert [pieces[-1].end for pieces in client.pieces.values()] == ["error", "error"]
    assert "decoding failed: FloatingPointError" in capsys.readouterr().out
    assert len(Client(engine, prompt, sampling=GREEDY, max_new_tokens=3).answers()[0]) == 3


# ---------------------------------------------------------------- choosing tokens


def test_each_row_is_sampled_by_its_own_settings():
    """Against the library's warpers, over the whole of the unit interval."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 3
    settings = [Sampling(0.0, 0, 1.0), Sampling(1.0, 0, 1.0), Sampling(0.5, 0, 1.0), Sampling(1.3, 4, 1.0),
                Sampling(1.0, 0, 0.7), Sampling(0.8, 5, 0.6), Sampling(2.0, 99, 0.01)]  # fmt: skip
    grid = [(i + 0.5) / 4000 for i in range(4000)]
    drawn = torch.stack([choose(scores.repeat(len(settings), 1), settings, [u] * len(settings)) for u in grid])
    for row, setting in enumerate(settings):
        shares = torch.bincount(drawn[:, row], minlength=50) / len(grid)
        warped = scores.clone()
        if setting.temperature == 0:
            expected = torch.nn.functional.one_hot(scores.argmax(-1), 50).float()
        else:
            warped = TemperatureLogitsWarper(setting.temperature)(None, warped)
            warped = TopKLogitsWarper(setting.top_k)(None, warped) if setting.top_k else warped
            warped = TopPLogitsWarper(setting.top_p)(None, warped) if setting.top_p < 1 else warped
            expected = warped.softmax(-1)
        torch.testing.assert_close(shares[None], expected, atol=1e-3, rtol=0)


def test_scores_that_are_no_numbers_are_an_error():
    with pytest.raises(FloatingPointError, match="NaN"):
        choose(torch.tensor([[0.0, float("nan")]]), [GREEDY], [0.0])
