"""Checkpoints for other runtimes: what onnxruntime answers from the ONNX graph is what the network answers, and a GGUF
file holds the network and its tokenizer as llama.cpp and Transformers read them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from modeling_nanochat import SPLIT_PATTERN, NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.inference import eval_mode
from modeling_nanochat.recipes import convert
from modeling_nanochat.recipes.conversion import gguf_file
from modeling_nanochat.recipes.conversion.native_config import COMPATIBLE
from modeling_nanochat.tokenization_nanochat_gpt import encode_text, generation_token_ids, render_prompt
from modeling_nanochat.training.architectures import ARCHITECTURES, fresh_network, stock_config
from modeling_nanochat.training.tokenizer import tokenizer_from_ranks
from tests.toys import anything, digit_tokenizer, draw, drawn_model


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    convert.main()


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    digit_tokenizer().save_pretrained(folder)
    return folder


def compatible_model() -> NanoChatGPTForCausalLM:
    ids = generation_token_ids(digit_tokenizer())
    shape = {"vocab_size": 320, "head_dim": 32, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = NanoChatGPTForCausalLM(NanoChatGPTConfig.from_depth(2, **shape, **COMPATIBLE, **ids)).eval()
    draw(model, 0.2)
    return model


def stock_model(architecture: str, head_dim: int = 32):
    torch.manual_seed(0)
    ids = generation_token_ids(digit_tokenizer())
    shape = {"vocab_size": 320, "head_dim": head_dim, "aspect_ratio": head_dim}  # two heads
    model = fresh_network(stock_config(architecture, 2, **shape, **ids)).eval()
    draw(model, 0.2, anything)
    return model


# ---------------------------------------------------------------- ONNX

MOST_TOKENS = 256  # of an answer by the program beside the graph


def windowed_model() -> NanoChatGPTForCausalLM:
    """Two layers with everything that an era brought: windows, value embeddings, smear, backout."""
    model = drawn_model(2, 0.2, anything, era="head", sliding_window=9, window_pattern="SL").eval()
    model.generation_config.update(bos_token_id=311, eos_token_id=[315, 311], pad_token_id=311)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [windowed_model, compatible_model])
def test_onnxruntime_says_what_the_network_says(make, tmp_path, monkeypatch, capsys):
    """Greedy tokens, past the windows; and a batch whose rows are padded."""
    pytest.importorskip("onnxruntime")
    from modeling_nanochat.recipes.conversion.onnx_answer import Graph, greedy

    model = make()
    run(monkeypatch, "--to_onnx", save(model, tmp_path / "ours"), "--output", tmp_path / "onnx")
    assert "onnxruntime's logits are the network's own" in capsys.readouterr().out
    prompt = torch.randint(310, (1, 20), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 20:].tolist()
    assert greedy(Graph(tmp_path / "onnx"), prompt[0].tolist(), set(), 24) == expected
    graph = Graph(tmp_path / "onnx")
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), prompt[:, :17]], dim=1)
    ids, mask = torch.cat([prompt, padded]), torch.ones(2, 20, dtype=torch.int64)
    mask[1, :3] = 0
    cache = {name: value.repeat(2, axis=0) for name, value in graph.cache.items()}
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    logits = graph.session.run(None, {name: value.numpy() for name, value in feed.items()} | cache)[0]
    with eval_mode(model), torch.no_grad():
        expected = model(prompt[:, :17], use_cache=False).logits[0]
    torch.testing.assert_close(torch.from_numpy(logits[1, 3:]), expected, rtol=1e-4, atol=1e-4)
    if model.config.smear_channels:
        check_program(tmp_path / "onnx", model)


def check_program(folder: Path, model) -> None:
    """With nothing but onnxruntime and tokenizers, and what is typed stays text."""
    question, tokenizer = "<|bos|> is 12 + 30", digit_tokenizer()
    prompt = torch.tensor([render_prompt(tokenizer, [{"role": "user", "content": question}])])
    options = {"do_sample": False, "max_new_tokens": MOST_TOKENS}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
    code = WITHOUT.format(program=str(folder / "answer.py"))
    done = subprocess.run([sys.executable, "-c", code, question], capture_output=True, check=True)
    assert done.stdout.decode() == tokenizer.decode(output, skip_special_tokens=True) + "\n"


WITHOUT = """
import runpy, sys
sys.modules |= dict.fromkeys(("torch", "transformers", "modeling_nanochat"))
sys.stdout.reconfigure(encoding="utf-8")
runpy.run_path({program!r}, run_name="__main__")
"""


# ---------------------------------------------------------------- GGUF


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gguf_holds_the_network(architecture, tmp_path, monkeypatch):
    """Transformers reads it back to the same logits, where it reads that architecture at all; llama.cpp's own order of
    queries and keys is turned back in the others by hand."""
    gguf = pytest.importorskip("gguf")
    # Transformers' reader overlooks the width of a head, which is 128 to it in Qwen3; llama.cpp reads it.
    model = stock_model(architecture, head_dim=128 if architecture == "qwen3" else 32)
    run(monkeypatch, "--to_gguf", save(model, tmp_path / "ours"), "--output", tmp_path / "out")
    file = tmp_path / "out" / gguf_file.FILE
    ids = torch.randint(310, (1, 20), generator=torch.Generator().manual_seed(1))
    if architecture != "olmo2":
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=file.name, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
        return
    tensors = {each.name: each for each in gguf.GGUFReader(file).tensors}
    weights = model.state_dict()
    assert len(tensors) == len(weights)
    for ours, theirs in {"model.layers.1.self_attn.q_proj": "blk.1.attn_q", "lm_head": "output",
                         "model.layers.0.post_feedforward_layernorm": "blk.0.post_ffw_norm"}.items():  # fmt: skip
        found = torch.from_numpy(tensors[f"{theirs}.weight"].data.copy())
        assert torch.equal(found.view_as(weights[f"{ours}.weight"]), weights[f"{ours}.weight"])


def test_gguf_keeps_bfloat16(tmp_path, monkeypatch):
    """Of matrices; llama.cpp wants vectors in float32."""
    gguf = pytest.importorskip("gguf")
    model = stock_model("mistral").to(torch.bfloat16)
    run(monkeypatch, "--to_gguf", save(model, tmp_path / "ours"), "--output", tmp_path / "out")
    kinds = {len(each.shape): each.tensor_type for each in gguf.GGUFReader(tmp_path / "out" / gguf_file.FILE).tensors}
    assert kinds == {2: gguf.GGMLQuantizationType.BF16, 1: gguf.GGMLQuantizationType.F32}
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=gguf_file.FILE, dtype=torch.bfloat16)
    for mine, theirs in zip(model.state_dict().values(), read.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_gguf_holds_the_tokenizer(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    run(monkeypatch, "--to_gguf", save(stock_model("llama"), tmp_path / "ours"), "--output", tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / gguf_file.FILE).fields
    read = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}
    tokenizer = digit_tokenizer()
    assert read["tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert read["merges"][0] == "0 0" and len(read["merges"]) == 55 and read["pre"] == "llama-bpe"
    assert read["token_type"].count(gguf.TokenType.CONTROL) == 8  # and <|output_start|>, which is shown
    assert read["token_type"][tokenizer.convert_tokens_to_ids("<|output_start|>")] == gguf.TokenType.USER_DEFINED
    assert (read["bos_token_id"], read["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert read["tokenizer.chat_template"] == tokenizer.chat_template


def test_llama_cpp_differs_in_long_numbers_only():
    """What the page says of the pre-split that the file names, held against llama.cpp's own pattern of that name."""
    here, ranks = digit_tokenizer(), {bytes([byte]): byte for byte in range(256)}
    ranks |= {f"{number:02}".encode(): 256 + number for number in range(55)}
    there = tokenizer_from_ranks(ranks, pattern=LLAMA_BPE)
    assert isinstance(there.backend_tokenizer.pre_tokenizer, pre_tokenizers.PreTokenizer)
    for text in ("What is 12 + 30?", "don't 'LL\n\n\n  indented\r\n x  ", "café 👍 日本 7", " \n \n  a"):
        assert encode_text(here, text) == encode_text(there, text)
    assert encode_text(here, "12345") != encode_text(there, "12345")
    assert SPLIT_PATTERN.replace("{1,2}", "{1,3}") != SPLIT_PATTERN


# llama.cpp, src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_LLAMA3; the names llama-bpe, llama3 and others stand for it.
LLAMA_BPE = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# ---------------------------------------------------------------- what does not go


@pytest.mark.parametrize("direction, package", [("--to_onnx", "onnxscript"), ("--to_gguf", "gguf")])
def test_a_missing_package_is_one_line(direction, package, tmp_path, monkeypatch):
    folder = save(stock_model("llama"), tmp_path / "ours")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{direction} needs the package {package}; expected .*\.\[export\]"):
        run(monkeypatch, direction, folder, "--output", tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["ours"]


def test_what_other_runtimes_cannot_take_is_refused(tmp_path, monkeypatch):
    ours = save(windowed_model(), tmp_path / "ours")
    with pytest.raises(ValueError, match="model_type is 'nanochat_gpt', expected one of llama, qwen3, mistral, olmo2"):
        run(monkeypatch, "--to_gguf", ours, "--output", tmp_path / "out")
    with pytest.raises(ValueError, match="--override would do nothing with --to_onnx"):
        run(monkeypatch, "--to_onnx", ours, "--output", tmp_path / "out", "--override", "rms_norm_eps=1e-5")
    assert [each.name for each in tmp_path.iterdir()] == ["ours"]
