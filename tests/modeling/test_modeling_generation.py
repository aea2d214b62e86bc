"""Every way of decoding against greedy recomputation without a cache, with windows smaller than the prompt."""

import pytest
import torch
from transformers import CompileConfig, ContinuousBatchingConfig, DynamicCache, GenerationConfig, TextStreamer

from modeling_nanochat.tool_use import CalculatorLogitsProcessor
from tests.toys import SHARP_NEW, SHARP_VOCAB, digit_tokenizer, sharp_model

PROMPT = 21


@pytest.fixture(scope="module", params=["seed", "head"])
def model(request):
    return sharp_model(request.param)


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(1, SHARP_VOCAB, (3, PROMPT), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def recompute(model, ids, new=SHARP_NEW):
    """The obvious decoding: the whole row through the network for every token. (B, T) -> (B, new)"""
    start = ids.shape[1]
    for _ in range(new):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids[:, start:]


@pytest.fixture(scope="module")
def expected(model, prompts):
    tokens = recompute(model, prompts)
    assert all(len(set(row.tolist())) > 4 for row in tokens)  # no loop that would hide an error
    return tokens


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 8},
        {"prefill_chunk_size": 8, "cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_every_cache_equals_recomputation(model, prompts, expected, arguments):
    rows = 1 if "prompt_lookup_num_tokens" in arguments else len(prompts)  # speculation takes one row
    ids = prompts[:rows]
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    assert tokens[:, PROMPT:].equal(expected[:rows])


def left_padded(prompts, lengths):
    """Rows cut to their last `lengths` tokens, padded on the left."""
    mask = torch.arange(PROMPT) >= PROMPT - torch.tensor(lengths).unsqueeze(1)
    return prompts.masked_fill(~mask, 0), mask.long()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padding_does_not_leak(model, prompts, cache):
    lengths = [5, PROMPT, 13]
    ids, mask = left_padded(prompts, lengths)
    for chunk in (None, 8):
        tokens = model.generate(
            ids, attention_mask=mask, cache_implementation=cache, prefill_chunk_size=chunk, disable_compile=True
        )
        for row, length in enumerate(lengths):
            alone = recompute(model, prompts[row : row + 1, PROMPT - length :])
            assert tokens[row : row + 1, PROMPT:].equal(alone), (row, chunk)


def test_a_plain_forward_pass_with_a_padding_mask(model, prompts):
    """Positions come from the mask where the caller gives none: losses of padded rows are those of the rows alone."""
    ids, mask = left_padded(prompts, [5, PROMPT, 13])
    losses = model.token_losses(ids[:, :-1], ids[:, 1:], attention_mask=mask[:, :-1])
    alone = model.token_losses(prompts[2:, -13:-1], prompts[2:, -12:])
    torch.testing.assert_close(losses[2:, -12:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["head"], indirect=True)
def test_compiled_decoding(model, prompts):
    """generate() compiles the step of a static cache: whole graphs, a few at most (before and after a window fills)."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.__dict__.pop("_compiled_call", None)
    compile_config = CompileConfig(backend="aot_eager", fullgraph=True)
    compile_config._compile_all_devices = True
    lengths = [5, PROMPT, 13]
    ids, mask = left_padded(prompts, lengths)
    tokens = model.generate(ids, attention_mask=mask, cache_implementation="static", compile_config=compile_config)
    for row, length in enumerate(lengths):
        assert tokens[row : row + 1, PROMPT:].equal(recompute(model, prompts[row : row + 1, PROMPT - length :]))
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@torch.no_grad()
def recomputed_beams(model, ids, beams, new):
    """The best of `beams` hypotheses of `new` tokens by summed log-probability, everything recomputed."""
    rows, scores = ids, torch.zeros(1)
    for _ in range(new):
        totals = scores[:, None] + model(rows, use_cache=False).logits[:, -1].log_softmax(-1)
        scores, best = totals.flatten().topk(beams)
        rows = torch.cat((rows[best // SHARP_VOCAB], (best % SHARP_VOCAB)[:, None]), dim=1)
    return rows[scores.argmax()]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beam_search(model, prompts, cache):
    found = model.generate(
        prompts[:1], num_beams=4, max_new_tokens=8, length_penalty=0.0, cache_implementation=cache, disable_compile=True
    )
    assert found[0].equal(recomputed_beams(model, prompts[:1], 4, 8))


def test_assisted_decoding(model, prompts, expected):
    draft = sharp_model("seed")
    for parameter in draft.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # right sometimes, so that tokens are kept and dropped
    tokens = model.generate(prompts[:1], assistant_model=draft, num_assistant_tokens=4)
    assert tokens[:, PROMPT:].equal(expected[:1])


def test_sampling_is_the_same_with_and_without_a_cache(model, prompts):
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        samples.append(model.generate(prompts, do_sample=True, temperature=0.8, top_k=50, use_cache=use_cache))
    assert samples[0].equal(samples[1])


def test_a_conversation_goes_on_with_its_cache(model, prompts, expected):
    """The second turn gives the cache of the first one and only adds tokens."""
    cache = DynamicCache(config=model.config)
    first = model.generate(prompts, past_key_values=cache, max_new_tokens=5)
    assert first[:, PROMPT:].equal(expected[:, :5])
    second = torch.cat((first, prompts[:, :7]), dim=1)
    tokens = model.generate(second, past_key_values=cache, max_new_tokens=6)
    assert tokens[:, second.shape[1] :].equal(recompute(model, second, 6))


def test_continuous_batching(model, prompts, expected):
    settings = GenerationConfig(do_sample=False, max_new_tokens=SHARP_NEW, eos_token_id=-1, pad_token_id=0)
    if model.config.smear_channels:
        with pytest.raises(ValueError, match="smear_channels is 24, expected 0"):
            model.generate_batch(prompts.tolist(), generation_config=settings)
        return
    before = model.config._attn_implementation
    pages = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=64)
    rows = [prompts[0].tolist(), prompts[1].tolist(), prompts[2, -13:].tolist()]
    results = model.generate_batch(rows, settings, pages)
    tokens = [result.generated_tokens for result in results.values()]
    assert tokens[:2] == expected[:2].tolist()
    assert tokens[2] == recompute(model, prompts[2:, -13:])[0].tolist()
    assert model.config._attn_implementation == before


@pytest.fixture(scope="module")
def tokenizer():
    return digit_tokenizer(model_max_length=64)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_calculator_inside_generate(model, tokenizer, prompts, streaming, capsys):
    """Rows that call at different times: the model calls nothing by itself here, so its choices are written for it."""
    ids = [
        tokenizer.encode(text) for text in ("a<|python_start|>12*12<|python_end|>", "<|python_start|>7<|python_end|>z")
    ]
    result = len(tokenizer.encode("<|output_start|>144<|output_end|>"))
    written = tokenizer.encode("<|python_start|>1/0<|python_end|><|python_start|>2+3<|python_end|>")
    size = max(map(len, ids))
    mask = torch.tensor([[0] * (size - len(row)) + [1] * len(row) for row in ids])
    ids = torch.tensor([[0] * (size - len(row)) + row for row in ids])

    def writes(input_ids, scores):
        """Both rows write the same text after what the calculator gave the first one: 144 in its marks."""
        step = input_ids.shape[1] - size - result
        if 0 <= step < len(written):
            scores = torch.full_like(scores, -1e9)
            scores[:, written[step]] = 0.0
        return scores

    rows = slice(0, 1) if streaming else slice(None)
    tokens = model.generate(
        ids[rows],
        attention_mask=mask[rows],
        logits_processor=[writes, CalculatorLogitsProcessor(tokenizer)],
        max_new_tokens=result + len(written) + 3,
        streamer=TextStreamer(tokenizer) if streaming else None,
    )
    script = "<|python_start|>1/0<|python_end|><|python_start|>2+3<|python_end|><|output_start|>5<|output_end|>"
    text = tokenizer.decode(tokens[0])
    assert text.endswith("<|python_end|><|output_start|>144<|output_end|>" + script)
    if streaming:
        assert "<|output_start|>144<|output_end|>" in capsys.readouterr().out
    else:
        assert tokenizer.decode(tokens[1]).endswith(script)
