"""A checkpoint brings its decoding along: every stock way to generate uses the calculator without being told."""

import json
import subprocess
import sys
import sysconfig

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM, render_conversation, render_prompt
from modeling_nanochat.inference import pad_left
from modeling_nanochat.recipes.stages.folder import save_checkpoint
from modeling_nanochat.tool_use import CalculatorLogitsProcessor
from tests.toys import digit_tokenizer

SUMS = [(a, b) for a in (7, 12, 30, 45, 88) for b in (5, 19, 60, 99)]


def question(a: int, b: int) -> dict:
    return {"role": "user", "content": f"{a}+{b}?"}


def conversation(a: int, b: int) -> list[dict]:
    """What it learns by heart: to ask. The answer that it is shown is wrong, so it cannot know it."""
    parts = [("text", "Add: "), ("python", f"{a} + {b}"), ("python_output", "0"), ("text", ".")]
    return [question(a, b), {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a tiny network that knows how to call the calculator for twenty sums."""
    torch.manual_seed(0)
    tokenizer = digit_tokenizer(model_max_length=64)
    rows = [render_conversation(tokenizer, conversation(*terms)) for terms in SUMS]
    ids, real = pad_left([ids for ids, _ in rows], tokenizer.pad_token_id)
    labels = ids.masked_fill(pad_left([mask for _, mask in rows], 0)[0] == 0, -100)
    config = NanoChatGPTConfig.from_depth(2, head_dim=32, vocab_size=320, max_position_embeddings=64)
    model = NanoChatGPTForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(ids, attention_mask=real, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    folder = tmp_path_factory.mktemp("own_decoding") / "checkpoint"
    save_checkpoint(model, tokenizer, str(folder))
    return folder


STRANGER = """
import json, sys
sys.path[:0] = [sys.argv[1]]  # the libraries alone: no package of ours, no working directory
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

torch.set_num_threads(1)
folder, sums = sys.argv[2], json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
chats = [[{"role": "user", "content": f"{a}+{b}?"}] for a, b in sums]
greedy = {"do_sample": False}
found = {}
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
found["pipeline"] = [answer[0]["generated_text"][-1]["content"] for answer in pipe(chats, **greedy)]
texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
found["pipeline of text"] = [answer[0]["generated_text"] for answer in pipe(texts, return_full_text=False, **greedy)]
inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
new = slice(inputs["input_ids"].shape[1], None)
found["generate"] = tokenizer.batch_decode(model.generate(**inputs, **greedy)[:, new], skip_special_tokens=True)
beams = model.generate(**inputs, num_beams=2, **greedy)
found["beams"] = tokenizer.batch_decode(beams[:, new], skip_special_tokens=True)
single = [tokenizer(text, return_tensors="pt", add_special_tokens=False) for text in texts[:3]]
ways = {"assisted": {"assistant_model": model}, "prompt lookup": {"prompt_lookup_num_tokens": 2}}
found |= {"assisted": [], "prompt lookup": [], "streamed": []}
for row in single:
    cut = slice(row["input_ids"].shape[1], None)
    for name, options in ways.items():
        answer = model.generate(**row, **options, **greedy)[0, cut]
        found[name].append(tokenizer.decode(answer, skip_special_tokens=True))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**row, streamer=streamer, **greedy)
    found["streamed"].append("".join(streamer))
without = model.generate(**inputs, use_calculator=False, **greedy)[:, new]
found["without"] = tokenizer.batch_decode(without, skip_special_tokens=True)
json.dump(found, sys.stdout)
"""


def test_every_stock_way_to_generate_computes_in_a_process_without_this_package(checkpoint, tmp_path):
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", STRANGER, sysconfig.get_path("purelib"), str(checkpoint), json.dumps(SUMS)],
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    expected = [f"Add: {a} + {b} = {a + b}." for a, b in SUMS]
    assert set(found) == {
        "pipeline", "pipeline of text", "generate", "beams", "assisted", "prompt lookup", "streamed", "without",
    }  # fmt: skip
    for name, answers in found.items():
        if name == "without":
            assert not any(f"= {a + b}" in answer for (a, b), answer in zip(SUMS, answers))
        else:
            assert answers == expected[: len(answers)] and len(answers) in (3, 20), name


@pytest.fixture(scope="module")
def loaded(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts = [render_prompt(tokenizer, [question(*terms)]) for terms in SUMS]
    return AutoModelForCausalLM.from_pretrained(checkpoint), tokenizer, prompts


def test_continuous_batching_computes_too(loaded):
    model, tokenizer, prompts = loaded
    pages = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=128)
    settings = GenerationConfig(do_sample=False, max_new_tokens=32, eos_token_id=tokenizer.eos_token_id)
    for prefer, expected in ((True, 20), (False, 0)):
        settings.use_calculator = prefer
        results = model.generate_batch(prompts, settings, pages)
        texts = [tokenizer.decode(result.generated_tokens, skip_special_tokens=True) for result in results.values()]
        right = [f"Add: {a} + {b} = {a + b}." for a, b in SUMS]
        assert sum(text == answer for text, answer in zip(texts, right)) == expected


def test_a_calculator_that_is_passed_is_the_only_one(loaded):
    model, tokenizer, prompts = loaded
    calls = []

    class Counting(CalculatorLogitsProcessor):
        def __call__(self, input_ids, scores):
            calls.append(input_ids.shape)
            return super().__call__(input_ids, scores)

    processors = model._get_logits_processor(model.generation_config, logits_processor=[Counting(tokenizer)])
    assert sum(isinstance(each, CalculatorLogitsProcessor) for each in processors) == 1
    ids, mask = pad_left(prompts[:2], tokenizer.pad_token_id)
    own = model.generate(ids, attention_mask=mask, do_sample=False)
    given = model.generate(ids, attention_mask=mask, do_sample=False, logits_processor=[Counting(tokenizer)])
    assert given.equal(own) and len(calls) == own.shape[1] - ids.shape[1]


def test_settings_say_whether_the_calculator_is_used(checkpoint, loaded, tmp_path):
    model, tokenizer, prompts = loaded
    saved = json.loads((checkpoint / "generation_config.json").read_text())
    assert saved["use_calculator"] and saved["do_sample"] and saved["max_new_tokens"] == 32
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 64
    ids = torch.tensor(prompts[:1])
    own_settings = GenerationConfig(do_sample=False, max_new_tokens=32)  # says nothing of it
    assert "= 12." in tokenizer.decode(model.generate(ids, generation_config=own_settings)[0], skip_special_tokens=True)
    model.save_pretrained(tmp_path)  # without the tokenizer
    alone = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"needs a tokenizer, but .* expected use_calculator=False, or"):
        alone.generate(ids)
    alone.generate(ids, use_calculator=False)
