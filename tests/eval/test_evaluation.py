"""Evaluation: bits per byte, pass@k and its interval, generation with the calculator, letters, ChatCORE."""

import itertools
import math
import random

import pytest
import torch
from torch.nn import functional as F

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.eval.batches import batches_by_length
from modeling_nanochat.eval.bits_per_byte import documents_loss, packed_loss, token_losses
from modeling_nanochat.eval.intervals import Accuracy, mean_with_interval, pass_at_k, summarize_passes
from modeling_nanochat.eval.multiple_choice import chat_core, guessing_accuracy, letter_tokens, predict_letters
from modeling_nanochat.eval.sampling import generate_batch, sample_and_judge, until_stop
from modeling_nanochat.eval.tasks import arithmetic, gsm8k, multiple_choice
from modeling_nanochat.tokenization_nanochat_gpt import (
    encode_text,
    message_text,
    render_conversation,
    render_prompt,
    special_token_ids,
    token_bytes,
)
from modeling_nanochat.training.tokenizer import train_tokenizer
from tests.toys import drawn_model, zero_matrices


@pytest.fixture(scope="module")
def tokenizer():
    rows = itertools.islice(arithmetic.generate(0), 1500)
    return train_tokenizer(
        (" ".join(message_text(message["content"]) for message in row["messages"]) for row in rows), 512
    )


@pytest.fixture(scope="module")
def model(tokenizer):
    """A small network with weights that are not zero anywhere."""
    special = special_token_ids(tokenizer)
    return drawn_model(
        2, 0.05, zero_matrices, vocab_size=512, max_position_embeddings=256, bos_token_id=special["<|bos|>"],
        eos_token_id=[special["<|assistant_end|>"], special["<|bos|>"]], pad_token_id=special["<|bos|>"],
    ).eval()  # fmt: skip


def test_bits_per_byte_equals_a_slow_count(model, tokenizer):
    lengths = token_bytes(tokenizer)
    torch.manual_seed(1)
    batches = []
    for _ in range(3):
        rows = torch.randint(0, 512, (2, 17))
        targets = rows[:, 1:].clone()
        targets[0, :5] = -100
        batches.append({"input_ids": rows[:, :-1], "shift_labels": targets})
    nats, size = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            log_probabilities = model(batch["input_ids"]).logits.log_softmax(-1)
        for row, position in itertools.product(range(2), range(16)):
            target = int(batch["shift_labels"][row, position])
            if target >= 0 and lengths[target]:
                nats -= float(log_probabilities[row, position, target])
                size += lengths[target]
    model.train()
    assert packed_loss(model, batches, lengths).bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert model.training
    model.eval()
    special = {"input_ids": torch.zeros(1, 4).long(), "shift_labels": torch.full((1, 4), 511)}
    assert packed_loss(model, [special], lengths).bits_per_byte == math.inf


def test_documents_are_read_whole_in_windows(model, tokenizer):
    documents = ["1 + 1 = 2. " * 60, "Tom has 3 apples.", "é"]  # the first one is longer than the context of 256
    bos = special_token_ids(tokenizer)["<|bos|>"]
    found = documents_loss(model, tokenizer, documents, batch_tokens=600)
    assert [loss.bytes for loss in found] == [len(document.encode()) for document in documents]
    for document, loss in zip(documents, found):
        ids = [bos, *encode_text(tokenizer, document)]
        nats = 0.0
        for start in range(0, len(ids) - 1, 256):
            piece = torch.tensor([ids[start : start + 257]])
            nats += float(model.token_losses(piece[:, :-1], piece[:, 1:]).sum())
        assert loss.nats == pytest.approx(nats, rel=1e-5)
    assert len(encode_text(tokenizer, documents[0])) > 256


def test_token_losses_of_other_models_come_from_their_logits(model):
    class Plain:
        def __call__(self, **arguments):
            return model(**arguments)

    rows = torch.randint(0, 500, (2, 9))
    targets = rows[:, 1:].clone()
    targets[1, 4:] = -100
    expected = model.token_losses(rows[:, :-1], targets)
    with torch.no_grad():
        torch.testing.assert_close(token_losses(Plain(), rows[:, :-1], targets), expected)


@pytest.mark.parametrize(("n", "c", "k"), [(8, 3, 1), (8, 3, 4), (5, 1, 5), (6, 0, 2), (6, 6, 3)])
def test_pass_at_k_equals_counting_all_draws(n, c, k):
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_pass_at_k_refuses_the_impossible():
    with pytest.raises(ValueError, match="k=9"):
        pass_at_k(8, 1, 9)
    with pytest.raises(ValueError, match="no values"):
        mean_with_interval([])


def test_interval_is_wilsons_for_single_answers():
    interval = mean_with_interval([1] * 7 + [0] * 13)
    assert interval.mean == 0.35
    assert (interval.low, interval.high) == pytest.approx((0.1811918, 0.5671457), abs=1e-6)
    none = mean_with_interval([0] * 20)
    assert none.low == 0 and none.high == pytest.approx(0.1611252, abs=1e-6)


@pytest.mark.parametrize("spread", [0.0, 0.2, 0.45])
def test_interval_covers_the_truth_about_as_often_as_it_says(spread):
    """Questions of different difficulty, four samples each: the truth is the mean over all possible questions."""
    rng = random.Random(0)
    covered = 0
    for _ in range(1000):
        values = []
        for _ in range(40):
            chance = 0.5 + rng.choice((-spread, spread))
            values.append(sum(rng.random() < chance for _ in range(4)) / 4)
        interval = mean_with_interval(values, draws_per_value=4)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.93 <= covered / 1000 <= 0.99


def test_more_samples_of_a_question_narrow_the_interval_and_never_below_the_draws():
    once = mean_with_interval([0, 1] * 20)
    often = mean_with_interval([0.5] * 40, draws_per_value=8)
    drawn = mean_with_interval([0, 1] * 160)
    assert often.high - often.low == pytest.approx(drawn.high - drawn.low)
    assert often.high - often.low < once.high - once.low


def test_summary_names_every_k():
    figures = summarize_passes([8, 0, 4], 8, ks=(1, 8, 16))
    assert set(figures) == {"pass@1", "pass@8"}
    assert figures["pass@1"].mean == 0.5 and figures["pass@8"].mean == pytest.approx(2 / 3)


def test_generation_of_a_batch_equals_one_by_one(model, tokenizer):
    questions = ["2 + 3", "What is 12 + 30?", "Tom has 5 apples and gets 3 more. How many apples does Tom have?"]
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": text}]) for text in questions]
    together = generate_batch(model, tokenizer, prompts, max_new_tokens=12, temperature=0)
    for prompt, (completion,) in zip(prompts, together):
        assert completion == generate_batch(model, tokenizer, [prompt], max_new_tokens=12, temperature=0)[0][0]
        ids = torch.tensor([prompt])
        for token in completion:
            with torch.no_grad():
                assert int(model(ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_sampling_is_seeded_and_leaves_the_random_state_alone(model, tokenizer):
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": text}]) for text in ("1 + 1", "20 * 3", "7")]
    options = {"max_new_tokens": 8, "temperature": 0.9, "top_k": 20, "num_samples": 3, "batch_rows": 6}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = generate_batch(model, tokenizer, prompts, seed=1, **options)
    assert torch.equal(torch.rand(1), expected)
    assert first == generate_batch(model, tokenizer, prompts, seed=1, **options)
    assert first != generate_batch(model, tokenizer, prompts, seed=2, **options)
    assert [len(samples) for samples in first] == [3, 3, 3]
    with pytest.raises(ValueError, match="temperature 0"):
        generate_batch(model, tokenizer, prompts, temperature=0, num_samples=2)
    with pytest.raises(ValueError, match="empty"):
        generate_batch(model, tokenizer, [[]])


def test_completions_end_before_the_stop_token():
    assert until_stop([5, 6, 9, 9], [8, 9]) == [5, 6]
    assert until_stop([5, 6], [8, 9]) == [5, 6]
    assert until_stop([9], [9]) == []


@pytest.fixture(scope="module")
def trained(tokenizer):
    """A network that has learnt a few arithmetic answers and letters by heart, calculator calls included."""
    rows = list(itertools.islice(arithmetic.generate(3), 4))
    choices = [
        {"question": f"Which is {name}?", "choices": ["red", "green", "blue"], "answer": answer}
        for name, answer in (("grass", 1), ("sky", 2), ("blood", 0))
    ]
    conversations = [row["messages"] for row in rows] + [multiple_choice.to_messages(row) for row in choices]
    torch.manual_seed(0)
    config = NanoChatGPTConfig.from_depth(2, vocab_size=512, head_dim=32, max_position_embeddings=256)
    network = NanoChatGPTForCausalLM(config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=6e-3)
    rendered = [render_conversation(tokenizer, messages) for messages in conversations]
    length = max(len(ids) for ids, _ in rendered)
    ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in rendered])
    mask = torch.tensor([row + [0] * (length - len(row)) for _, row in rendered])
    labels = F.pad(ids.masked_fill(mask == 0, -100)[:, 1:], (0, 1), value=-100)
    enough = 0.005  # three letters, guessed, among all these tokens would still be a loss of 0.01
    for _ in range(300):
        loss = network(ids, shift_labels=labels).loss
        if loss < enough:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < enough
    return network.eval(), rows, choices


def test_a_trained_model_calls_the_calculator_and_is_judged_right(trained, tokenizer):
    network, rows, _ = trained
    records = sample_and_judge(
        network, tokenizer, rows, lambda pairs: [gsm8k.is_correct(text, row["answer"]) for row, text in pairs],
        num_samples=1, temperature=0, max_new_tokens=40,
    )  # fmt: skip
    assert [record["correct"] for record in records] == [[True]] * len(rows)
    for record, row in zip(records, rows):
        expression, value = (part["text"] for part in row["messages"][1]["content"][1:3])
        assert (
            f"<|python_start|>{expression}<|python_end|><|output_start|>{value}<|output_end|>"
            in record["completions"][0]
        )
        assert record["question"] == row["messages"][0]["content"]


def test_letters_are_chosen_among_the_choices_of_the_question(trained, model, tokenizer):
    network, _, choices = trained
    assert predict_letters(network, tokenizer, choices) == [1, 2, 0]
    one_by_one = [predict_letters(model, tokenizer, [row])[0] for row in choices]
    assert predict_letters(model, tokenizer, choices, batch_tokens=10) == one_by_one
    assert predict_letters(model, tokenizer, choices) == one_by_one
    only_two = [{**row, "choices": row["choices"][:2], "answer": 0} for row in choices]
    assert set(predict_letters(network, tokenizer, only_two)) <= {0, 1}


def test_letters_must_be_single_tokens(tokenizer):
    assert len(set(letter_tokens(tokenizer, 10))) == 10


def test_batches_hold_every_row_once_within_the_budget():
    rows = [[0] * length for length in (3, 50, 7, 7, 20, 1, 200)]
    batches = batches_by_length(rows, 60)
    assert sorted(itertools.chain(*batches)) == list(range(7))
    assert batches[0] == [6]
    assert all(len(batch) == 1 or len(batch) * max(len(rows[i]) for i in batch) <= 60 for batch in batches)


def test_chat_core_centers_on_guessing():
    rows = [{"choices": list("ab")}, {"choices": list("abcd")}]
    assert guessing_accuracy(rows) == 0.375
    lettered = Accuracy.of([True] * 5 + [False] * 3, 0.25)
    assert (lettered.accuracy, lettered.n, lettered.centered) == (0.625, 8, 0.5)
    assert lettered.stderr == pytest.approx(math.sqrt(0.625 * 0.375 / 8))
    assert chat_core([lettered, Accuracy.of([True] + [False] * 9)]) == pytest.approx(0.3)
