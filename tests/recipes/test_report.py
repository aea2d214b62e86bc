"""Evaluation of several models into a table, and the report of a run with its pictures."""

import re
import shutil
import sys

import pytest

from modeling_nanochat.eval.intervals import Interval
from modeling_nanochat.recipes.command_line import parse
from modeling_nanochat.recipes.report import ReportArguments, write_report
from modeling_nanochat.recipes.stages.anchors import core_of_models
from modeling_nanochat.recipes.stages.curves import PANELS, draw_curves, points, running_mean
from modeling_nanochat.recipes.stages.record import describe_machine, read_stage
from modeling_nanochat.recipes.stages.sections import number, readable
from modeling_nanochat.recipes.stages.sentences import sentence
from modeling_nanochat.recipes.stages.tables import cell, figure_names, text_table
from modeling_nanochat.training.whole_files import write_json


def record(name: str, **parts) -> dict:
    empty = {"arguments": {}, "inputs": {}, "announced": {}, "results": {}, "samples": [], "log_history": []}
    return {"name": name, "seconds": 90.0, "machine": describe_machine(), **empty, **parts}


@pytest.fixture
def run(tmp_path):
    """A finished run, as its stages would have recorded it."""
    losses = [{"step": step, "loss": 5 - step / 50, "tokens_per_second": 1000.0 + step} for step in range(1, 101)]
    bits = [{"step": step, "validation_bits_per_byte": 2.5 - step / 100} for step in (50, 100)]
    same = {"completions/mean_length": 20.0, "entropy": 0.4}
    rewards = [{"step": step, "reward": 0.3 + step / 200, **same} for step in range(1, 61)]
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
    text = write_report(ReportArguments(run=[str(run)], price_per_hour=24.0)).read_text()
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
    text = write_report(ReportArguments(run=[str(run)])).read_text()
    assert "no price was given" in text and "$" not in text.split("## Data")[0]


def test_the_rent_of_a_known_accelerator_is_the_cost(run):
    for file in run.glob("*/stage.json"):
        stage = read_stage(file.parent)
        stage["machine"]["accelerators"] = ["NVIDIA H100 80GB HBM3"] * 8
        write_json(file, stage)
    text = write_report(ReportArguments(run=[str(run)])).read_text()
    assert "| 1 min 30 s | $0.80 |" in text and "rents for orientation" in text


def test_the_page_stands_alone(run):
    page = write_report(ReportArguments(run=[str(run)])).with_suffix(".html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "<table>" in page and "<details>" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<script" not in page


def test_a_sample_cannot_write_into_the_page(run):
    hostile = read_stage(run / "base")
    hostile["samples"] = [{"step": 1, "prompt": "<script>alert(1)</script>", "completion": "![x](http://a.example/)"}]
    write_json(run / "base" / "stage.json", hostile)
    page = write_report(ReportArguments(run=[str(run)])).with_suffix(".html").read_text()
    assert "<script" not in page and "<img" not in page.replace('<img src="data:', "")


def test_settings_are_those_that_a_person_chose(run):
    chosen = read_stage(run / "base")
    chosen["arguments"] |= {"report_to": [], "debug": "", "accelerator_config": "AcceleratorConfig(x=None, y=True)"}
    write_json(run / "base" / "stage.json", chosen)
    text = write_report(ReportArguments(run=[str(run)])).read_text()
    assert "depth" in text and not any(name in text for name in ("report_to", "debug", "accelerator_config"))


def test_runs_are_compared(run, tmp_path_factory):
    other = tmp_path_factory.mktemp("runs") / "wider"
    shutil.copytree(run, other)
    wider = read_stage(other / "base")
    wider["arguments"]["depth"], wider["results"]["validation_bits_per_byte"] = 6, 1.25
    write_json(other / "base" / "stage.json", wider)
    shutil.rmtree(other / "rl")
    file = write_report(ReportArguments(run=[str(run), str(other)], output=str(other / "comparison.md")))
    text = file.read_text()
    assert "| validation bits per byte | 1.5 | 1.25 |" in text and "| depth | 4 | 6 |" in text
    assert "The settings are the same." in text and f"Only {run.name}".replace("_", "\\_") in text
    assert file.with_suffix(".html").read_text().count("data:image/png;base64,") == 1
    with pytest.raises(ValueError, match="twice"):
        write_report(ReportArguments(run=[str(run), str(run)]))


def test_runs_are_named_together_or_one_after_another(monkeypatch):
    given = {
        "--run a b": ["a", "b"],
        "--run a --run b": ["a", "b"],
        "--config demo/report": ["out/demo"],
        "--config demo/report --run a": ["a"],
    }
    for words, runs in given.items():
        monkeypatch.setattr(sys, "argv", ["nanochat report", *words.split()])
        (arguments,) = parse(ReportArguments)
        assert arguments.run == runs


def test_sentences_say_what_came_of_a_stage(run):
    assert "needs 1.50 bits" in sentence(record("pretrain", results={"tokens": 5, "validation_bits_per_byte": 1.5}))
    rise = {"pass@1_before": Interval(0.3, 0.2, 0.4), "pass@1_after": Interval(0.6, 0.5, 0.7)}
    assert sentence(record("rl", results=rise)).endswith("30% of problems that it has not seen, and solves 60% now.")
    assert "may be chance" in sentence(record("rl", results=rise | {"pass@1_after": Interval(0.35, 0.3, 0.4)}))
    assert sentence(record("rl")) == sentence(record("data")) == ""


def test_stages_that_are_left_out_are_named(run, capsys):
    (run / "rl" / "stage.json").write_text((run / "rl" / "stage.json").read_text()[:100])
    (run / "eval" / "stage.json").rename(run / "eval" / "stage.begun.json")
    text = write_report(ReportArguments(run=[str(run)])).read_text()
    named = "eval (begun and not finished), rl (stage.json cannot be read)"
    assert f"Not in here: {named}." in text.replace("\\", "") and named in capsys.readouterr().out


def test_a_run_without_stages_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no stage has been finished"):
        write_report(ReportArguments(run=[str(tmp_path)]))


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
    named = {model: figures | {"went_in": "one task + another + a third"} for model, figures in columns.items()}
    assert text_table(named) == text_table(columns) + "\nwent_in: one task + another + a third"
    lines = text_table(columns).split("\n")
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1


def test_core_is_placed_among_known_models(run):
    core = Interval(0.2, 0.19, 0.21)
    results = {"base": {"core": core, "core/copa": 0.1}, "other": {"core_of_18_tasks": core}}
    write_json(run / "eval" / "stage.json", record("eval", results=results))
    text = write_report(ReportArguments(run=[str(run)])).read_text()
    assert "![Evaluation](report/eval.png)" in text and "| core | 0.200 [0.190, 0.210] | - |" in text
    assert (run / "report" / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert list(core_of_models(results)) == ["base"]  # a part of the benchmark has no place there
