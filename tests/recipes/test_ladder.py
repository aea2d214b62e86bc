"""The ladder: its curve and multipliers on made-up runs whose law is known, and a tiny one climbed in two calls."""

import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM

from benchmarks.tail_study import TailAverages
from modeling_nanochat import NanoChatGPTConfig
from modeling_nanochat.recipes import ladder
from modeling_nanochat.recipes.ladder import Curve, LadderArguments, Rung, bytes_of_a_token, multipliers
from modeling_nanochat.recipes.stages.record import is_main_process, read_json, read_stage
from modeling_nanochat.training.whole_files import write_json
from tests.ranks import run_two_ranks
from tests.recipes.test_pretrain_recipe import folder, settings  # noqa: F401 (a fixture)


def rungs(shift: float = 1.0, spread: float = 0.0) -> list[Rung]:
    """Runs on the law 0.7 + 40 * (shift * flops) ** -0.2, in the middle of what their seeds come to."""
    made = []
    for depth, flops in enumerate((1e10, 1e11, 1e12, 1e13, 1e14), start=2):
        for seed, factor in enumerate((1 / (1 + spread), 1.0, 1 + spread)):
            made.append(Rung(depth, seed, flops, 1, 1, 0.7 + 40 * (factor * shift * flops) ** -0.2, 1.0))
    return made


def test_curve_gives_back_the_law_that_the_runs_lie_on():
    curve = Curve.through([each.flops for each in rungs()], [each.bits_per_byte for each in rungs()])
    assert (curve.floor, curve.exponent) == (pytest.approx(0.7, abs=2e-3), pytest.approx(0.2, abs=2e-3))
    assert curve.flops(curve.loss(3e12)) == pytest.approx(3e12)
    assert curve.flops(curve.floor) == math.inf
    with pytest.raises(ValueError, match="through 1 size"):
        Curve.through([1e10, 1e10], [2.0, 2.1])


def test_multiplier_is_the_compute_that_a_change_saves():
    found = multipliers(rungs(shift=1.25, spread=0.1), rungs())
    for mean, error in found.values():
        assert mean == pytest.approx(1.25, rel=0.02)
        assert error == pytest.approx(math.exp(math.log(1.1) / math.sqrt(3)), rel=0.02)
    assert all(mean == pytest.approx(1, rel=0.02) for mean, _ in multipliers(rungs(), rungs()).values())


def test_bytes_of_a_token_are_those_of_the_tensors_that_are_read():
    config = NanoChatGPTConfig.from_depth(2, vocab_size=64, head_dim=32, max_position_embeddings=64)
    model = AutoModelForCausalLM.from_config(config)
    tables = [*model.model.value_embeddings.values(), model.model.embed_tokens]
    looked_up = sum(table.weight.numel() for table in tables)
    weights = sum(each.numel() for each in model.parameters()) - looked_up * 63 // 64
    cache = 2 * config.num_key_value_heads * 32 * (16 + 16)  # both layers see 16 positions, within their windows
    assert bytes_of_a_token(config, 16, 4) == 4 * (weights + cache)


def climb(monkeypatch, groups, **changes) -> None:
    monkeypatch.setattr(ladder, "parse", lambda *_, **__: (LadderArguments(**changes), *vars(groups).values()))
    ladder.main()


def test_ladder_goes_on_after_its_budget_and_a_second_one_has_its_flops(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    tiny = {"save_strategy": "no", "sample_prompts": [], "validate_every": 0}
    groups = settings(folder, tmp_path / "seed", max_steps=3, **tiny)
    climb(monkeypatch, groups, depths=[2, 1], seeds=[0, 1], max_hours=1e-9)
    printed = capsys.readouterr().out
    assert "0 of 4 runs are done" in printed and read_stage(tmp_path / "seed") is None
    climb(monkeypatch, groups, depths=[2, 1], seeds=[0, 1])
    results = read_stage(tmp_path / "seed")["results"]
    assert [(each["depth"], each["seed"]) for each in results["rungs"]] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert results["rungs"][0]["bits_per_byte"] != results["rungs"][1]["bits_per_byte"]  # other seeds, other weights
    assert (tmp_path / "seed" / "ladder.png").stat().st_size > 1000

    groups = settings(folder, tmp_path / "head", max_steps=-1, era="head", **tiny)
    climb(monkeypatch, groups, depths=[1, 2], seeds=[0], reference=str(tmp_path / "seed"))
    own = read_stage(tmp_path / "head")["results"]["rungs"]
    for rung, reference in zip(own, results["rungs"][::2]):
        assert rung["flops"] == pytest.approx(reference["flops"], rel=0.2)  # in whole steps
    assert set(read_stage(tmp_path / "head")["results"]["multipliers"]) == {"1", "2"}
    capsys.readouterr()
    climb(monkeypatch, groups, depths=[1, 2], seeds=[0], reference=str(tmp_path / "seed"))
    assert "already done" in capsys.readouterr().out


def climb_on_each_rank(place: Path) -> None:
    """A stand-in for training: the main process writes its record late, and the other one's clock says that the budget
    is used up."""

    def train(settings: SimpleNamespace) -> None:
        if is_main_process():
            time.sleep(0.3)
            results = {"flops": 1.0, "parameters": 1, "tokens": 1, "validation_bits_per_byte": 2.0}
            write_json(Path(settings.config.output_dir) / "stage.json", {"results": results, "seconds": 1.0})

    PartialState(cpu=True)
    ladder.pretrain = train
    hours = 0 if is_main_process() else 10
    ladder.time = SimpleNamespace(time=lambda: time.time() + 3600 * hours)
    runs = []
    for seed in (0, 1):
        config = SimpleNamespace(output_dir=str(place / f"seed_{seed}"), seed=seed)
        runs.append((SimpleNamespace(network=SimpleNamespace(depth=1), config=config), 1.0))
    stage = SimpleNamespace(started=time.time(), say=lambda text: None)
    found = ladder.climb(stage, runs, max_hours=1)
    write_json(place / f"rank_{os.environ['RANK']}.json", {"seeds": [each.seed for each in found]})


def test_on_two_ranks_the_main_process_reads_and_decides(tmp_path):
    for seed in (0, 1):
        (tmp_path / f"seed_{seed}").mkdir()
    run_two_ranks(climb_on_each_rank, tmp_path)
    assert [read_json(tmp_path / f"rank_{rank}.json") for rank in (0, 1)] == [{"seeds": [0, 1]}] * 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depths": []}, "depths is \\[\\], expected different"),
        ({"seeds": [1, 1]}, "seeds is \\[1, 1\\]"),
        ({"max_hours": 0}, "max_hours is 0"),
    ],
)
def test_what_is_no_ladder_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LadderArguments(**wrong)


def test_reference_must_be_a_finished_ladder(tmp_path):
    with pytest.raises(ValueError, match="expected the folder of a finished ladder"):
        ladder.reference_rungs(str(tmp_path), [2])


def test_tail_averages_are_the_means_of_the_last_steps():
    """What benchmarks/tail_study.py judges: of ten steps the last 20%, and 35% rounded up."""
    model = torch.nn.Linear(2, 1, bias=False)
    averages, seen = TailAverages([0.2, 0.35]), []
    for step in range(1, 11):
        torch.nn.init.normal_(model.weight)
        seen.append(model.weight.detach().clone())
        averages.on_step_end(None, SimpleNamespace(global_step=step, max_steps=10), None, model)
    for share, count in ((0.2, 2), (0.35, 4)):
        assert torch.allclose(averages.means[share][0], torch.stack(seen[-count:]).mean(0), atol=1e-6)
