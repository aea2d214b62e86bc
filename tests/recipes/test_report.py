"""Evaluation of several models into a table, and the report of a run with its pictures."""

import itertools
import json
import sys

import pytest
import torch

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.eval.intervals import Interval
from modeling_nanochat.eval.tasks import arithmetic
from modeling_nanochat.recipes import evaluate
from modeling_nanochat.recipes.evaluate import column_names
from modeling_nanochat.recipes.report import ReportArguments, number, readable, write_report
from modeling_nanochat.recipes.stages.curves import PANELS, draw_curves, points, running_mean
from modeling_nanochat.recipes.stages.folder import save_checkpoint
from modeling_nanochat.recipes.stages.record import describe_machine, read_stage
from modeling_nanochat.recipes.stages.tables import cell, figure_names, text_table
from modeling_nanochat.tokenization_nanochat_gpt import message_text
from modeling_nanochat.training.tokenizer import train_tokenizer
from modeling_nanochat.training.whole_files import write_json


def record(name: str, **parts) -> dict:
    empty = {"arguments": {}, "inputs": {}, "announced": {}, "results": {}, "samples": [], "log_history": []}
    return {"name": name, "seconds": 90.0, "machine": describe_machine(), **empty, **parts}


@pytest.fixture
def run(tmp_path):
    """A finished run, as its stages would have recorded it."""
    losses = [{"step": step, "loss": 5 - step / 50, "tokens_per_second": 1000.0 + step} for step in range(1, 101)]
    bits = [{"step": step, "validation_bits_per_byte": 2.5 - step / 100} for step in (50, 100)]
    rewards = [{"step": step, "reward": 0.3 + step / 200, "completions/mean_length": 20.0} for step in range(1, 61)]
    passes = [{"step": 60, "eval_pass@1": Interval(0.6, 0.5, 0.7), "eval_pass@8": 0.9}]
    answer = "Add: <|python_start|>12 + 30<|python_end|><|output_start|>42<|output_end|>\n#### 42<|assistant_end|>"
    stages = {
        "data": record("data", results={"sft/train.jsonl": 12345}),
        "base": record(
            "pretrain", announced={"parameters": 4473030, "flops": 3.4e12, "seconds": 100.0},
            results={"parameters": 4473030, "validation_bits_per_byte": 1.5}, log_history=losses + bits,
            samples=[{"step": 100, "prompt": "The *king*", "completion": " of France"}], arguments={"depth": 4},
        ),
        "rl": record(
            "rl", log_history=rewards + passes, samples=[{"question": "12 + 30?", "completion": answer, "right": True}],
            results={"pass@1_before": Interval(0.3, 0.2, 0.4), "pass@1_after": Interval(0.6, 0.5, 0.7)},
        ),
        "eval": record(
            "eval",
            results={"base": {"bits_per_byte": 1.5}, "rl": {"pass@1": Interval(0.6, 0.5, 0.7)}},
        ),
    }  # fmt: skip
    for folder, stage in stages.items():
        write_json(tmp_path / folder / "stage.json", stage)
    return tmp_path


def test_report_has_every_stage_in_order_with_figures_and_samples(run):
    text = write_report(ReportArguments(run=str(run), price_per_hour=24.0)).read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Data", "## Pretraining", "## Reinforcement learning", "## Evaluation"]
    assert "| Pretraining | parameters 4.47 M, validation bits per byte 1.5 | 1 min 30 s | $0.60 |" in text
    assert "| **Together** |  | **6 min 00 s** | **$2.40** |" in text
    assert "| pass@1 before | 0.3 [0.200, 0.400] |" in text
    assert "| pass@1 | - | 0.600 [0.500, 0.700] |" in text
    assert "> **12 + 30?** Add: [12 + 30 = 42]  \n> \\#\\#\\#\\# 42 ✓" in text
    assert "> **The \\*king\\*** of France" in text
    assert '"depth": 4' in text and "FLOP" in text
    for name in ("pretrain", "rl"):
        assert f"(report/{name}.png)" in text
        assert (run / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.rglob("*tmp*"))


def test_without_a_price_the_report_says_so(run):
    text = write_report(ReportArguments(run=str(run))).read_text()
    assert "no price was given" in text and "$" not in text.split("## Data")[0]


def test_a_run_without_stages_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no stage has been finished"):
        write_report(ReportArguments(run=str(tmp_path)))


def test_curves_begin_with_what_was_measured_before(run, monkeypatch, tmp_path):
    drawn = {}

    def draw(ax, panel, log):
        drawn[panel.title] = {key: points(log, key) for key in panel.series}

    monkeypatch.setattr("modeling_nanochat.recipes.stages.curves.draw_panel", draw)
    draw_curves(read_stage(run / "rl"), tmp_path / "rl.png")
    assert drawn["Held-out problems"]["eval_pass@1"] == ([0, 60], [0.3, 0.6])
    assert set(drawn) == {panel.title for panel in PANELS["rl"]}
    assert draw_curves(read_stage(run / "eval"), tmp_path / "eval.png") is None


def test_running_mean_does_not_lag():
    values = [float(value) for value in range(100)]
    assert running_mean(values)[10:90] == values[10:90]


def test_numbers_are_readable():
    given = [(4473030, ""), (3.4e12, "flops"), (160.6, "seconds"), (7, ""), (0.12345, ""), ("x", ""), (True, "")]
    shown = ["4.47 M", "3.4 TFLOP", "2 min 41 s", "7", "0.1235", "x", "True"]
    assert [number(value, name) for value, name in given] == shown
    assert readable("<|python_start|>1 / 0<|python_end|> a_b") == "1 / 0 a\\_b"


def test_tables_show_intervals_and_gaps():
    columns = {"a": {"x": Interval(0.5, 0.4, 0.6)}, "b": {"y": 1.25}}
    assert figure_names(columns) == ["x", "y"]
    assert cell(columns["a"], "x") == "0.500 [0.400, 0.600]" and cell(columns["a"], "y") == "-"
    lines = text_table(columns).split("\n")
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert column_names(["out/a", "out/b"]) == ["a", "b"] and column_names(["x/a", "y/a"]) == ["x/a", "y/a"]


# ---------------------------------------------------------------- modeling_nanochat.recipes.evaluate


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
    command = ["evaluate", "--data", str(prepared / "data"), "--output_dir", str(prepared / "eval"), *arguments]
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
    stage = read_stage(prepared / "eval")
    assert set(stage["results"]) == {"base", "sft"}
    for figures in stage["results"].values():
        names = {"bits_per_byte", "sums", "pass@1", "spelling", "human_eval pass@1", "chat_core"}
        assert names <= set(figures) and 2.0 < figures["bits_per_byte"] < 9.0
        assert figures["sums"]["low"] <= figures["sums"]["mean"] <= figures["sums"]["high"]
        assert figures["chat_core_of"] == "human_eval + problems + spelling + sums"
        assert "calls" in figures["human_eval_isolation"]
    assert "bits_per_byte" in out and "chat_core" in out and "human_eval_isolation" in out
    assert {sample["task"] for sample in stage["samples"]} == {"problems", "spelling", "human_eval"}
    run_evaluate(monkeypatch, prepared, *arguments)
    assert "already done" in capsys.readouterr().out
    text = write_report(ReportArguments(run=str(prepared))).read_text()
    assert "| bits per byte |" in text


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
