"""Any causal language model: tiny stand-ins of ten architectures score as their plain forward passes do."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.core import slow_scores
from modeling_nanochat.eval.bits_per_byte import documents_loss
from modeling_nanochat.eval.core.prompts import make_question
from modeling_nanochat.eval.models import chat_prompt, context_length, decoding_ids, first_tokens, hard_context
from modeling_nanochat.eval.multiple_choice import predict_letters
from modeling_nanochat.eval.sampling import sample_and_judge
from modeling_nanochat.eval.span_scores import Group, SpanScorer
from modeling_nanochat.tokenization_nanochat_gpt import encode_text
from tests.toys import draw

VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
ARCHITECTURES = {
    "gpt2": GPT2,
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "llama": SIZES,
    "qwen3": SIZES,
    "gemma2": {**SIZES, "sliding_window": 16, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SIZES, "sliding_window": 16},
    "granite": {**SIZES, "logits_scaling": 8.0},
    "cohere": {**SIZES, "logit_scale": 0.0625},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {**SIZES, "state_size": 8},
}


def make_model(kind: str) -> torch.nn.Module:
    """Weights large enough that a wrong scale or a lost cache would change every score."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ARCHITECTURES[kind])).float().eval()
    draw(model, 0.3)
    return model


def make_groups(longest: int = 60) -> list[Group]:
    rng = random.Random(0)

    def words(low: int, high: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]

    groups = []
    for _ in range(12):  # choices with a common beginning, as in multiple choice
        beginning = words(5, longest - 12)
        rows = [[*beginning, *words(1, 10)] for _ in range(rng.randint(2, 4))]
        groups.append(Group(rows, [(len(beginning), len(row)) for row in rows]))
    for _ in range(4):  # a common end, as in a schema; and single rows
        end = words(2, 5)
        rows = [[*words(3, 20), *end] for _ in range(2)]
        groups.append(Group(rows, [(len(row) - len(end), len(row)) for row in rows]))
        row = words(10, longest)
        groups.append(Group([row], [(len(row) - 3, len(row))]))
    return groups


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("batch_tokens", [60, 2000])
def test_fast_scores_are_those_of_plain_forward_passes(kind, batch_tokens):
    model, groups = make_model(kind), make_groups()
    scorer = SpanScorer(model, batch_tokens)
    assert scorer.chooses_states and scorer.shares_beginnings == (kind != "mamba")
    for group, scores in zip(groups, scorer(groups)):
        for row, span, score in zip(group.sequences, group.spans, scores):
            (loss,), (certain,) = slow_scores(model, [row], [span])
            assert score.loss == pytest.approx(loss, abs=2e-4)
            assert (score.certain == span[1] - span[0]) == certain
    assert not model.training


def test_a_full_device_halves_the_batch(monkeypatch, capfd):
    model, groups = make_model("llama"), make_groups()
    expected = SpanScorer(model)(groups)
    held, forward = 300, model.model.forward  # tokens that the made-up device holds

    def full(input_ids, **arguments):
        if input_ids.numel() > held:
            raise torch.OutOfMemoryError
        return forward(input_ids=input_ids, **arguments)

    scorer = SpanScorer(model)
    monkeypatch.setattr(model.model, "forward", full)
    for own, plain in zip(scorer(groups), expected, strict=True):
        assert [score.loss for score in own] == pytest.approx([score.loss for score in plain], abs=2e-4)
    assert scorer.batch_tokens < 1000 and "out of memory with" in capfd.readouterr().out
    held = 10
    with pytest.raises(torch.OutOfMemoryError):  # not even one row
        scorer(groups)


def test_scales_behind_the_head_matter_for_the_choice():
    """What made Granite and Cohere wrong: the head's own output is not their logits."""
    for kind, setting in (("granite", {"logits_scaling": 1.0}), ("cohere", {"logit_scale": 1.0})):
        scaled = make_model(kind)
        plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**ARCHITECTURES[kind], **setting}))
        plain.load_state_dict(scaled.state_dict())
        groups = make_groups()
        losses = [[score.loss for scores in SpanScorer(model)(groups) for score in scores] for model in (scaled, plain)]
        assert max(abs(one - other) for one, other in zip(*losses)) > 0.5


def test_only_learned_positions_end_hard():
    ends = {kind: hard_context(make_model(kind)) for kind in ARCHITECTURES}
    assert {kind for kind, end in ends.items() if end} == {"gpt2", "opt"} and ends["gpt2"] == ends["opt"] == 64
    assert context_length(make_model("llama")) == 64


def test_prompts_beyond_a_hard_end_are_cropped_on_the_left():
    model = make_model("gpt2")
    rng = random.Random(1)
    rows = [[1, *(rng.randrange(3, VOCABULARY) for _ in range(100))] for _ in range(2)]
    question = make_question("schema", [[*row, 5, 6, 7] for row in rows], 0, hard_context(model))
    assert question.cropped and question.group.longest == 64
    assert [row[0] for row in question.group.sequences] == [1, 1]
    (scores,) = SpanScorer(model)([question.group])
    loss, _ = slow_scores(model, [[1, *rows[0][-60:], 5, 6, 7]], [(61, 64)])
    assert scores[0].loss == pytest.approx(loss[0], abs=1e-4)


@pytest.fixture(scope="module")
def foreign_tokenizer():
    """A tokenizer without BOS and without the nine special tokens, with a chat template, as Qwen has."""
    bytes_and_pairs = Tokenizer(models.BPE())
    bytes_and_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_and_pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"])
    bytes_and_pairs.train_from_iterator(["red green blue yes no " * 20], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_and_pairs, eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def test_tokenizers_without_bos_or_our_special_tokens(foreign_tokenizer):
    model, tokenizer = make_model("llama"), foreign_tokenizer
    assert tokenizer.bos_token_id is None and first_tokens(tokenizer) == []
    prompt = chat_prompt(tokenizer, [{"role": "user", "content": "red?"}])
    assert tokenizer.decode(prompt) == "user: red?\nassistant: "
    assert set(decoding_ids(model, tokenizer)["eos_token_id"]) == {2, tokenizer.eos_token_id}
    documents = ["red green", "blue"]
    for document, loss in zip(documents, documents_loss(model, tokenizer, documents)):
        ids = torch.tensor([[tokenizer.eos_token_id, *encode_text(tokenizer, document)]])
        with torch.no_grad():
            expected = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        assert loss.nats == pytest.approx(float(expected), rel=1e-4) and loss.bytes == len(document)


def test_chat_tasks_use_the_models_own_template(foreign_tokenizer):
    model, tokenizer = make_model("qwen3"), foreign_tokenizer
    rows = [{"question": f"{color}?", "choices": ["red", "green", "blue"], "answer": 0} for color in ("red", "blue")]
    one_by_one = [predict_letters(model, tokenizer, [row])[0] for row in rows]
    assert predict_letters(model, tokenizer, rows, batch_tokens=1000) == one_by_one
    problem = {"messages": [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "yes"}]}
    (record,) = sample_and_judge(
        model, tokenizer, [problem], lambda pairs: [text != "" for _, text in pairs],
        num_samples=2, temperature=1.0, max_new_tokens=4,
    )  # fmt: skip
    assert len(record["completions"]) == len(record["correct"]) == 2 and record["question"] == "red?"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        chat_prompt(tokenizer, problem["messages"][:1])
