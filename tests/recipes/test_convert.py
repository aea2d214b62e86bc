"""Checkpoints of upstream and of Transformers' own class: every era arrives exactly and goes back to the same bits,
and what does not fit is refused by name, with nothing written."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import tiktoken
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, NanoChatConfig, NanoChatForCausalLM

from modeling_nanochat import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    NanoChatGPTConfig,
    NanoChatGPTForCausalLM,
    encode_text,
    token_bytes,
)
from modeling_nanochat.decoder_layer import NanoChatGPTRMSNorm
from modeling_nanochat.recipes import convert
from tests import golden_models
from tests.golden_models import ERA_OF_CASE
from tests.toys import anything, digit_tokenizer, draw, drawn_model

MERGES = [b" t", b"he", b" a", b"in", b"re", b"on", b" the", b"er", b" s", b"at", b" w", b" o", b"en", b" c", b"it",
          b"is", b"an", b"or", b"es", b" b", b"ed", b" f", b"ing", b" p", b"ou", b" an", b"al", b"ar", b" to", b" m",
          b"\xc3\xa9", b"\n\n", b"  ", b"    ", b" and"]  # fmt: skip
SPECIAL_IDS = {token: 256 + len(MERGES) + i for i, token in enumerate(SPECIAL_TOKENS)}  # 300 tokens, as in the cases
TEXTS = ["the rain in Spain, 12345 times!", "", "    indented\n\n\nand café \ud7ff\u200d", "<|bos|> typed by a user"]


def upstream_tokenizer() -> tiktoken.Encoding:
    ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + i for i, token in enumerate(MERGES)}
    return tiktoken.Encoding("rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=SPECIAL_IDS)


def golden(case: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Upstream's tensors, and the meta file that it would write."""
    shape = golden_models.report(case)["model_config"]
    meta = {"step": 10, "val_bpb": 1.25, "model_config": shape, "device_batch_size": 32}
    return golden_models.upstream_weights(case), meta


def write_upstream(folder: Path, tensors: dict, meta: dict, step: int = 10) -> Path:
    """A checkpoint folder as upstream writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=4))
    return folder


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(upstream_tokenizer(), protocol=4))


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    convert.main()


def bits(tensors: dict[str, torch.Tensor]) -> bytes:
    """Names, dtypes, shapes and bits of tensors, in a fixed order."""
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})


@pytest.mark.parametrize("case", ERA_OF_CASE)
def test_every_era_arrives_exactly(case, tmp_path, monkeypatch, capsys):
    tensors, meta = golden(case)
    source = write_upstream(tmp_path / "d5", {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, meta)
    (source / "optim_000010_rank0.pt").write_bytes(b"")
    run(monkeypatch, "--from_upstream", source, "--output", tmp_path / "ours")

    said = capsys.readouterr().out
    assert f"{ERA_OF_CASE[case]} era" in said and "not converted: optim_000010_rank0.pt" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    expected = golden_models.expected(case)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits[:, expected["positions"]]
    assert logits.shape == expected["logits"].shape and (logits - expected["logits"]).abs().max() < 2e-4


@pytest.mark.parametrize("case", ERA_OF_CASE)
def test_the_round_trip_changes_no_bit(case, tmp_path, monkeypatch):
    tensors, meta = golden(case)
    for name, tensor in tensors.items():  # as upstream trains on a GPU: tables in bfloat16, the rest in float32
        if name.startswith(("transformer.wte", "value_embeds")):
            tensors[name] = tensor.bfloat16()
    source = write_upstream(tmp_path / "d5", tensors, meta)
    write_tokenizer(source / "tokenizer")
    run(monkeypatch, "--from_upstream", source, "--output", tmp_path / "ours")
    run(monkeypatch, "--to_upstream", tmp_path / "ours", "--output", tmp_path / "back")

    back = torch.load(tmp_path / "back" / "model_000010.pt", weights_only=True)
    assert bits(back) == bits(tensors)
    for file in ("meta_000010.json", "tokenizer/tokenizer.pkl"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["vocab_size"] == 300
    loaded = NanoChatGPTForCausalLM.from_pretrained(tmp_path / "ours")
    assert loaded.model.embed_tokens.weight.equal(tensors["transformer.wte.weight"][:300].float())


def test_pure_bfloat16_stays_so(tmp_path, monkeypatch):
    tensors, meta = golden("2025_10_launch")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    source = write_upstream(tmp_path / "d5", tensors, meta)
    run(monkeypatch, "--from_upstream", source, "--output", tmp_path / "ours")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16
    run(monkeypatch, "--to_upstream", tmp_path / "ours", "--output", tmp_path / "back", "--step", "7")
    assert bits(torch.load(tmp_path / "back" / "model_000007.pt", weights_only=True)) == bits(tensors)
    assert json.loads((tmp_path / "back" / "meta_000007.json").read_text()) == meta | {"step": 7}


@pytest.mark.parametrize("place", ["base_checkpoints/d5", "base_checkpoints/d5/tokenizer", "tokenizer", "elsewhere"])
def test_the_tokenizer_gives_the_same_ids(place, tmp_path, monkeypatch):
    source = write_upstream(tmp_path / "base_checkpoints" / "d5", *golden("2026_01_seed"))
    write_tokenizer(tmp_path / place)
    given = ["--tokenizer", tmp_path / place] if place == "elsewhere" else []
    run(monkeypatch, "--from_upstream", source, "--output", tmp_path / "ours", *given)

    tokenizer, encoding = AutoTokenizer.from_pretrained(tmp_path / "ours"), upstream_tokenizer()
    for text in TEXTS:
        assert encode_text(tokenizer, text) == encoding.encode_ordinary(text)
        assert tokenizer.decode(encode_text(tokenizer, text)) == text
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS} == SPECIAL_IDS
    assert (len(tokenizer), tokenizer.model_max_length) == (300, 256)
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").generation_config
    ends = [SPECIAL_IDS["<|assistant_end|>"], SPECIAL_IDS["<|bos|>"]]
    assert (generation.eos_token_id, generation.pad_token_id) == (ends, SPECIAL_IDS["<|bos|>"])

    run(monkeypatch, "--to_upstream", tmp_path / "ours", "--output", tmp_path / "back")
    lengths = torch.load(tmp_path / "back" / "tokenizer" / "token_bytes.pt", weights_only=True)
    assert lengths.tolist() == token_bytes(tokenizer) and sum(lengths) == 256 + sum(map(len, MERGES))


def test_last_step_or_the_one_asked_for(tmp_path, monkeypatch):
    tensors, meta = golden("2025_10_launch")
    source = write_upstream(tmp_path / "d5", tensors, meta, step=900)
    write_upstream(source, {name: tensor + 1 for name, tensor in tensors.items()}, meta, step=1000)
    run(monkeypatch, "--from_upstream", source, "--output", tmp_path / "last")
    run(monkeypatch, "--from_upstream", source, "--output", tmp_path / "first", "--step", "900")
    weights = [load_file(tmp_path / name / "model.safetensors")["lm_head.weight"] for name in ("first", "last")]
    assert weights[0].equal(tensors["lm_head.weight"]) and weights[1].equal(tensors["lm_head.weight"] + 1)
    with pytest.raises(ValueError, match=r"no step 7; expected one of \[900, 1000\]"):
        run(monkeypatch, "--from_upstream", source, "--output", tmp_path / "none", "--step", "7")


def test_a_softcap_of_20_is_told_by_override(tmp_path, monkeypatch, capsys):
    source = write_upstream(tmp_path / "d5", *golden("2026_01_seed"))
    run(monkeypatch, "--from_upstream", source, "--output", tmp_path / "ours", "--override",
        "final_logit_softcapping=20")  # fmt: skip
    assert NanoChatGPTConfig.from_pretrained(tmp_path / "ours").final_logit_softcapping == 20.0
    run(monkeypatch, "--to_upstream", tmp_path / "ours", "--output", tmp_path / "back")
    assert "softcap20 era of upstream" in capsys.readouterr().out


def lose(tensors, meta):
    del tensors["transformer.h.2.attn.c_v.weight"], tensors["x0_lambdas"]


def add(tensors, meta):
    tensors["transformer.h.5.mlp.c_fc.weight"] = torch.zeros(256, 64)
    tensors["value_embeds.1.weight"] = torch.zeros(320, 32)


def misshape(tensors, meta):
    tensors["transformer.h.0.attn.c_q.weight"] = torch.zeros(64, 60)
    tensors["lm_head.weight"] = torch.zeros(384, 64)


def bigram(tensors, meta):
    tensors |= {"bigram_embed.weight": torch.zeros(8, 64), "bigram_lambdas": torch.zeros(5)}


def widen_gate(tensors, meta):
    for name in tensors:
        if "ve_gate" in name:
            tensors[name] = torch.zeros(1, 16)


def change_shape(tensors, meta):
    meta["model_config"]["n_expert"] = 4


def lose_shape(tensors, meta):
    del meta["model_config"]


def hold_a_function(tensors, meta):
    tensors["callback"] = os.system


def hold_a_number(tensors, meta):
    tensors["resid_lambdas"] = 1.0


DAMAGES = {
    lose: "(?s)missing transformer.h.2.attn.c_v.weight.*missing x0_lambdas",
    add: r"(?s)unexpected transformer.h.5.mlp.c_fc.weight \(256, 64\).*unexpected value_embeds.1.weight",
    misshape: r"(?s)lm_head.weight is \(384, 64\), expected \(300, 64\).*c_q.weight is \(64, 60\), expected \(64, 64\)",
    bigram: "bigram era.*bigram_embed.weight.*bigram_lambdas",
    widen_gate: "ve_gate.weight': 16",
    change_shape: "n_expert",
    lose_shape: "has no model_config",
    hold_a_function: r"no plain file of tensors: it asks for \['(posix|nt).system'\]",
    hold_a_number: "resid_lambdas': 'float'",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_does_not_fit_is_named_and_nothing_written(damage, tmp_path, monkeypatch):
    tensors, meta = golden("2026_01_seed")
    damage(tensors, meta)
    source = write_upstream(tmp_path / "d5", tensors, meta)
    with pytest.raises(ValueError, match=DAMAGES[damage]):
        run(monkeypatch, "--from_upstream", source, "--output", tmp_path / "ours")
    assert os.listdir(tmp_path) == ["d5"]


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def encoding_with(**changes) -> tiktoken.Encoding:
    encoding = upstream_tokenizer()
    encoding.__dict__.update(changes)
    return encoding


def not_an_encoding(file):
    return {"mergeable_ranks": {}}


def code_beside_the_encoding(file):
    return [upstream_tokenizer(), Command(file)]


def code_inside_the_encoding(file):
    return encoding_with(_pat_str=Command(file))


def code_instead(file):
    return Command(file)


def other_special_tokens(file):
    return encoding_with(_special_tokens={"<|endoftext|>": 291})


def text_as_token(file):
    return encoding_with(_mergeable_ranks=upstream_tokenizer()._mergeable_ranks | {"text": 291})


def other_vocabulary(file):
    ranks = dict(list(upstream_tokenizer()._mergeable_ranks.items())[:280])
    special = {token: 280 + i for i, token in enumerate(SPECIAL_TOKENS)}
    return encoding_with(_mergeable_ranks=ranks, _special_tokens=special)


PICKLES = {
    not_an_encoding: "holds a dict",
    code_beside_the_encoding: r"asks for (posix|nt)\.system",
    code_inside_the_encoding: r"asks for (posix|nt)\.system",
    code_instead: r"asks for (posix|nt)\.system",
    other_special_tokens: "endoftext",
    text_as_token: "not all bytes",
    other_vocabulary: "289 tokens, expected the network's 300",
}


@pytest.mark.parametrize("content", PICKLES, ids=lambda content: content.__name__)
def test_a_pickle_may_hold_the_encoding_and_nothing_else(content, tmp_path, monkeypatch):
    source = write_upstream(tmp_path / "d5", *golden("2026_01_seed"))
    (source / "tokenizer.pkl").write_bytes(pickle.dumps(content(tmp_path / "executed"), protocol=4))
    with pytest.raises(ValueError, match=PICKLES[content]):
        run(monkeypatch, "--from_upstream", source, "--output", tmp_path / "ours")
    assert os.listdir(tmp_path) == ["d5"]


def test_a_torn_pickle_is_an_error_too(tmp_path, monkeypatch):
    source = write_upstream(tmp_path / "d5", *golden("2026_01_seed"))
    (source / "tokenizer.pkl").write_bytes(pickle.dumps(upstream_tokenizer(), protocol=4)[:-100])
    with pytest.raises(ValueError, match="no pickled tiktoken encoding"):
        run(monkeypatch, "--from_upstream", source, "--output", tmp_path / "ours")


@pytest.mark.parametrize("arguments, message", [
    (["--output", "new"], "no folder to read given, expected exactly one of --from_upstream"),
    (["--output", "new", "--from_upstream", "d5", "--to_upstream", "d5"], "expected exactly one"),
    (["--output", "new", "--from_upstream", "nowhere"], "--from_upstream nowhere is no folder"),
    (["--output", "d5", "--from_upstream", "d5"], "--output d5 exists already"),
    (["--output", "new", "--to_upstream", "d5"], "d5 has no config.json"),
    (["--output", "new", "--from_upstream", "."], "no model_<step>.pt"),
    (["--output", "new", "--from_upstream", "d5", "--tokenizer", "."], "has no tokenizer.pkl"),
    (["--output", "new", "--from_upstream", "d5", "--override", "softcap=20"], "softcap=20.*final_logit_softcapping"),
])  # fmt: skip
def test_misuse_is_explained(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_upstream(tmp_path / "d5", *golden("2025_10_launch"))
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, *arguments)
    assert os.listdir(tmp_path) == ["d5"]


def native_model() -> NanoChatForCausalLM:
    config = NanoChatConfig(
        vocab_size=300, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = NanoChatForCausalLM(config).eval()
    draw(model, 0.2, anything)
    return model


def test_transformers_own_class_arrives_exactly(tmp_path, monkeypatch):
    """With an epsilon large enough that a network without it would give other logits."""
    native = native_model()
    native.save_pretrained(tmp_path / "native", max_shard_size="100KB")
    assert (tmp_path / "native" / "model.safetensors.index.json").is_file()
    run(monkeypatch, "--from_native", tmp_path / "native", "--output", tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(ours) is NanoChatGPTForCausalLM

    input_ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = native(input_ids).logits
        torch.testing.assert_close(ours(input_ids).logits, expected, rtol=0, atol=1e-4)
        ours.config.rms_norm_eps = None
        for module in ours.modules():
            if isinstance(module, NanoChatGPTRMSNorm):
                module.eps = None
        assert (ours(input_ids).logits - expected).abs().max() > 1e-3

    with pytest.raises(ValueError, match=r"closest era is launch: intermediate_size is 192.*rms_norm_eps is 0.001"):
        run(monkeypatch, "--to_upstream", tmp_path / "ours", "--output", tmp_path / "back")


def test_a_launch_network_goes_to_transformers_own_class_and_back(tmp_path, monkeypatch):
    model = drawn_model(3, 0.2, anything, era="launch", bfloat16_rotary_tables=False).eval()
    model.save_pretrained(tmp_path / "ours")
    digit_tokenizer(model_max_length=64).save_pretrained(tmp_path / "ours")
    run(monkeypatch, "--to_native", tmp_path / "ours", "--output", tmp_path / "native")
    assert not list((tmp_path / "native").glob("*.py"))
    assert "use_calculator" not in json.loads((tmp_path / "native" / "generation_config.json").read_text())
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native", trust_remote_code=False)
    assert type(native) is NanoChatForCausalLM
    ids = torch.randint(320, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(native(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12}
    assert native.generate(ids, **options).equal(
        model.generate(ids, **options, pad_token_id=311, eos_token_id=[315, 311])
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "native")("12").input_ids == digit_tokenizer()("12").input_ids

    run(monkeypatch, "--from_native", tmp_path / "native", "--output", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(weight.equal(again[name]) for name, weight in model.state_dict().items())


def test_transformers_own_class_is_refused_what_it_cannot_express(tmp_path, monkeypatch):
    for era, said in (("seed", "use_value_embeddings is True, expected False"), ("launch", "--override bfloat16_rot")):
        config = NanoChatGPTConfig.from_depth(2, era=era, vocab_size=300, head_dim=32, max_position_embeddings=64)
        NanoChatGPTForCausalLM(config).save_pretrained(tmp_path / era)
        with pytest.raises(ValueError, match=f"is the launch era: .*{said}"):
            run(monkeypatch, "--to_native", tmp_path / era, "--output", tmp_path / "native")
    run(monkeypatch, "--to_native", tmp_path / "launch", "--output", tmp_path / "native",
        "--override", "bfloat16_rotary_tables=false")  # fmt: skip


def test_a_network_of_our_own_goes_upstream_and_comes_back(tmp_path, monkeypatch):
    model = drawn_model(6, 0.2, anything, era="head", vocab_size=300, head_dim=64, max_position_embeddings=512)
    model.save_pretrained(tmp_path / "ours")
    run(monkeypatch, "--to_upstream", tmp_path / "ours", "--output", tmp_path / "upstream")
    meta = json.loads((tmp_path / "upstream" / "meta_000000.json").read_text())
    assert meta["model_config"]["window_pattern"] == "SSSL"
    tensors = torch.load(tmp_path / "upstream" / "model_000000.pt", weights_only=True)
    assert tensors["lm_head.weight"].shape == (320, 384)
    run(monkeypatch, "--from_upstream", tmp_path / "upstream", "--output", tmp_path / "again")
    files = [tmp_path / name / "model.safetensors" for name in ("ours", "again")]
    assert bits(load_file(files[0])) == bits(load_file(files[1]))
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "ours" / "config.json").read_text()


WITHOUT_THE_PACKAGE = """
import sys
for name in ("modeling_nanochat", "training", "recipes"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
prompt = tokenizer("the rain in", return_tensors="pt")
print(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0].tolist())
"""


def test_the_folder_loads_without_the_package(tmp_path, monkeypatch):
    source = write_upstream(tmp_path / "d5", *golden("2026_07_head"))
    write_tokenizer(source)
    run(monkeypatch, "--from_upstream", source, "--output", tmp_path / "ours")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "ours")]
    output = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    prompt = tokenizer("the rain in", return_tensors="pt")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").generate(
        **prompt, max_new_tokens=8, do_sample=False
    )
    assert json.loads(output.stdout.splitlines()[-1]) == expected[0].tolist()
