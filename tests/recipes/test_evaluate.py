"""`nanochat evaluate`: models side by side in a table, a record that can be trusted, errors in one line."""

import itertools
import json
import shutil
import sys
import zipfile

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.core import make_bundle
from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.eval.tasks import arithmetic
from modeling_nanochat.recipes import evaluate
from modeling_nanochat.recipes.data.core_bundle import provide_bundle
from modeling_nanochat.recipes.evaluate import beside, column_names
from modeling_nanochat.recipes.report import ReportArguments, write_report
from modeling_nanochat.recipes.stages.folder import save_checkpoint
from modeling_nanochat.recipes.stages.record import read_stage
from modeling_nanochat.tokenization_nanochat_gpt import message_text
from modeling_nanochat.training.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Data and two models as the stages before would leave them, tiny."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("run")
    problems = list(itertools.islice(arithmetic.generate(0), 600))
    texts = [" ".join(message_text(message["content"]) for message in row["messages"]) for row in problems]
    (folder / "data" / "pretrain").mkdir(parents=True)
    for shard in range(2):
        table = pa.table({"text": texts[shard::2]})
        pq.write_table(table, folder / "data" / "pretrain" / f"shard_{shard:05d}.parquet")
    questions = [
        {"question": f"{a} + 1?", "choices": ["more", "less"], "answer": a % 2, "source": "sums"} for a in range(9)
    ]
    program = {
        "prompt": "def one():\n", "entry_point": "one", "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }  # fmt: skip
    for name, rows in (
        ("rl/validation", problems[:6]),
        ("eval/multiple_choice", questions),
        ("eval/humaneval", [program]),
    ):
        file = folder / "data" / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer(texts, 512)
    config = NanoChatGPTConfig.from_depth(1, vocab_size=512, head_dim=64, max_position_embeddings=64)
    for seed, name in enumerate(("base", "sft")):
        torch.manual_seed(seed)
        save_checkpoint(NanoChatGPTForCausalLM(config), tokenizer, str(folder / name))
    return folder


def run_evaluate(monkeypatch, prepared, *arguments: str) -> None:
    command = ["evaluate", "--data", str(prepared / "data"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    evaluate.main()


def test_models_are_measured_side_by_side_and_only_once(monkeypatch, capsys, prepared):
    arguments = [
        "--models", str(prepared / "base"), str(prepared / "sft"), "--tasks", "bits_per_byte", "multiple_choice",
        "problems", "spelling", "human_eval", "--num_samples", "2", "--max_new_tokens", "8", "--max_problems", "4",
        "--allow_weak_sandbox", "true",
    ]  # fmt: skip
    run_evaluate(monkeypatch, prepared, *arguments)
    out = capsys.readouterr().out
    stage = read_stage(prepared / "eval")  # beside the models
    assert set(stage["results"]) == {"base", "sft"}
    for figures in stage["results"].values():
        names = {"bits_per_byte", "sums", "pass@1", "spelling", "human_eval pass@1", "chat_core"}
        assert names <= set(figures) and 2.0 < figures["bits_per_byte"] < 9.0
        assert figures["sums"]["low"] <= figures["sums"]["mean"] <= figures["sums"]["high"]
        assert "calls" in figures["human_eval_isolation"]
        assert figures["chat_core_of"] == "human_eval + problems + spelling + sums"
    assert "bits_per_byte" in out and "chat_core" in out and "activations float32" in out
    assert {sample["task"] for sample in stage["samples"]} == {"problems", "spelling", "human_eval"}
    scores = json.loads((prepared / "eval" / "scores.json").read_text())
    assert set(scores) == {"base", "sft"} and set(scores["base"]) == {"sums", "problems", "spelling", "human_eval"}
    sums = scores["base"]["sums"]
    assert set(sums) == {"accuracy", "n", "stderr", "baseline", "centered"}
    assert sums["n"] == 9 and sums["baseline"] == 0.5
    assert sums["centered"] == pytest.approx(2 * sums["accuracy"] - 1)
    run_evaluate(monkeypatch, prepared, *arguments)
    assert "already done" in capsys.readouterr().out
    text = write_report(ReportArguments(run=[str(prepared)])).read_text()
    assert "| bits per byte |" in text


def test_replaced_weights_are_measured_again(monkeypatch, capsys, prepared, tmp_path):
    arguments = ["--models", str(tmp_path / "model"), "--tasks", "bits_per_byte", "--validation_bytes", "100"]
    shutil.copytree(prepared / "base", tmp_path / "model")
    run_evaluate(monkeypatch, prepared, *arguments)
    first = read_stage(tmp_path / "eval")
    run_evaluate(monkeypatch, prepared, *arguments)
    assert "already done" in capsys.readouterr().out
    shutil.copy(prepared / "sft" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    run_evaluate(monkeypatch, prepared, *arguments)
    second = read_stage(tmp_path / "eval")
    assert "already done" not in capsys.readouterr().out
    assert first["results"]["model"] != second["results"]["model"]
    assert first["arguments"]["weights"] != second["arguments"]["weights"]
    assert {"torch_version", "transformers_version", "device"} <= set(second["arguments"])
    # Emulated bfloat16 is too slow to be timed here.
    monkeypatch.setattr("modeling_nanochat.recipes.evaluate.devices.expected_seconds", lambda *_: 1.0)
    run_evaluate(monkeypatch, prepared, *arguments, "--dtype", "bfloat16")
    third = read_stage(tmp_path / "eval")
    assert third["arguments"]["dtype"] == "bfloat16" and third["results"] != second["results"]
    assert "0.6% of CORE's decisions" in capsys.readouterr().out


@pytest.fixture(scope="module")
def gpt2(prepared):
    """A model of another architecture with another tokenizer."""
    torch.manual_seed(0)
    questions = [row["messages"][0]["content"] for row in itertools.islice(arithmetic.generate(9), 400)]
    tokenizer = train_tokenizer(questions, 320)
    network = GPT2LMHeadModel(
        GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    )
    network.save_pretrained(prepared / "gpt2")
    tokenizer.save_pretrained(prepared / "gpt2")
    return prepared / "gpt2"


def test_bits_per_byte_reads_the_same_bytes_with_any_tokenizer(monkeypatch, prepared, gpt2, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Tom has 12 apples. Köln is a city. " * 50)
    for extra in ([], ["--text", str(text)]):
        run_evaluate(
            monkeypatch, prepared, "--models", str(prepared / "base"), str(gpt2), "--tasks", "bits_per_byte",
            "--validation_bytes", "1500", "--output_dir", str(tmp_path / "eval"), *extra,
        )  # fmt: skip
        results = read_stage(tmp_path / "eval")["results"]
        assert results["base"]["bytes_read"] == results["gpt2"]["bytes_read"] >= 1499
        assert all(3 < figures["bits_per_byte"] < 12 for figures in results.values())


def test_core_of_a_fetched_bundle_is_labelled_and_logged(monkeypatch, capsys, prepared, gpt2, tmp_path):
    folder = make_bundle(tmp_path / "made" / "eval_bundle")
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    arguments = [
        "--models", str(prepared / "base"), str(gpt2), "--tasks", "core", "--core_examples", "4", "--log_samples",
        "true", "--core_bundle", str(tmp_path / "there"), "--core_bundle_url", (tmp_path / "bundle.zip").as_uri(),
        "--output_dir", str(tmp_path / "eval"), "--output_json", str(tmp_path / "own.json"),
    ]  # fmt: skip
    run_evaluate(monkeypatch, prepared, *arguments)
    out = capsys.readouterr().out
    assert (tmp_path / "there" / "core.yaml").is_file() and "CORE without agi_eval_lsat_ar" in out
    results = read_stage(tmp_path / "eval")["results"]
    assert {"core_of_3_tasks_cut_to_4", "core/letters", "core_examples_per_second"} <= set(results["base"])
    assert results["gpt2"]["core_prompts_cropped"] > 0 == results["base"]["core_prompts_cropped"]
    scores = json.loads((tmp_path / "own.json").read_text())
    assert set(scores["gpt2"]) == {"core/letters", "core/who", "core/next"}
    lines = [json.loads(line) for line in (tmp_path / "eval" / "examples" / "base.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and {line["label"] for line in lines} == {"letters", "who", "next"}
    letters = [line for line in lines if line["label"] == "letters"]
    assert all(len(line["scores"]) == len(line["prompts"]) == 4 for line in letters)
    assert all(line["correct"] == (line["scores"].index(min(line["scores"])) == line["gold"]) for line in letters)
    assert scores["base"]["core/letters"]["accuracy"] == sum(line["correct"] for line in letters) / 4
    run_evaluate(monkeypatch, prepared, *arguments, "--core_control", "no_shots")
    assert "core_of_3_tasks_cut_to_4_no_shots" in read_stage(tmp_path / "eval")["results"]["base"]


def test_a_bundle_is_fetched_whole_or_not_at_all(tmp_path):
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"PK nothing")
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "no tasks here")
    for url in ((tmp_path / "missing.zip").as_uri(), broken.as_uri(), other.as_uri()):
        with pytest.raises(ValueError, match=r"could not be fetched|holds no core\.yaml"):
            provide_bundle(str(tmp_path / "place" / "bundle"), url)
    assert list((tmp_path / "place").iterdir()) == []


def test_columns_and_folders_are_named_after_the_models():
    assert column_names(["out/a", "out/b"]) == ["a", "b"] and column_names(["x/a", "y/a"]) == ["x/a", "y/a"]
    assert beside("./out/d20/sft") == "out/d20/eval" and beside("owner/name") == "out/eval/owner_name"


def test_wrong_tasks_models_and_data_are_named(monkeypatch, prepared):
    with pytest.raises(ValueError, match="tasks among"):
        run_evaluate(monkeypatch, prepared, "--tasks", "nonsense")
    with pytest.raises(ValueError, match="no checkpoint"):
        run_evaluate(monkeypatch, prepared, "--models", str(prepared / "nothing"), "--rerun", "true")
    with pytest.raises(ValueError, match="does not exist"):
        run_evaluate(
            monkeypatch, prepared, "--models", str(prepared / "base"), "--data", str(prepared / "none"),
            "--tasks", "problems", "--rerun", "true",
        )  # fmt: skip
