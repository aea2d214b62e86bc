"""Schedules as upstream applies them, their presets, and the scheduler that writes them into groups."""

import json
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from modeling_nanochat.training.optimizer.eras import pretraining_schedules
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.optimizer.schedules import GroupScheduler, rl_schedules, sft_schedules

GOLDEN = Path(__file__).parents[1] / "golden" / "training" / "2026_01_seed_float32" / "case.json"


def build_optimizer() -> MuonAdamW:
    matrix, scalars = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))
    return MuonAdamW(
        [
            {"params": [matrix], "use_muon": True, "lr": 0.02, "weight_decay": 1.8, "polar_dtype": "float32"},
            {"params": [scalars], "use_muon": False, "lr": 0.5, "weight_decay": 0.01},
        ]
    )


def applied(schedules: dict, total: int) -> list[dict]:
    """What the groups hold at every step of a run."""
    optimizer = build_optimizer()
    scheduler = GroupScheduler(optimizer, total, **schedules)
    history = []
    for _ in range(total):
        muon, adamw = optimizer.param_groups
        assert adamw["weight_decay"] == 0.01 and "momentum" not in adamw
        assert adamw["lr"] / 0.5 == pytest.approx(muon["lr"] / 0.02)
        history.append({"lr": adamw["lr"] / 0.5, "momentum": muon["momentum"], "decay": muon["weight_decay"] / 1.8})
        optimizer.step()
        scheduler.step()
    return history


def test_seed_schedules_equal_upstreams():
    case = json.loads(GOLDEN.read_text())
    schedules = pretraining_schedules(
        "seed",
        warmup_steps=case["warmup_ratio"],
        warmdown_ratio=case["warmdown_ratio"],
        final_lr_frac=case["final_lr_frac"],
    )
    history = applied(schedules, case["steps"])
    for step, expected in case["schedule_at_steps"].items():
        got = history[int(step)]
        assert got["lr"] == pytest.approx(expected["lr_multiplier"])
        assert got["momentum"] == pytest.approx(expected["muon_momentum"])
        assert 1.8 * got["decay"] == pytest.approx(expected["muon_weight_decay"])


def test_warmdown_ends_at_the_final_fraction():
    history = applied(pretraining_schedules("seed", warmdown_ratio=0.25, final_lr_frac=0.2), 8)
    assert [entry["lr"] for entry in history] == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.5 + 0.5 * 0.2])


def test_head_momentum_rises_stays_and_falls_and_decay_follows_a_cosine():
    schedules = pretraining_schedules("head", warmdown_ratio=0.5)
    momentum = [schedules["momentum_schedule"](step, 1000) for step in range(1001)]
    assert [momentum[0], momentum[200]] == pytest.approx([0.85, 0.91])
    assert momentum[400:501] == pytest.approx([0.97] * 101)
    assert [momentum[750], momentum[1000]] == pytest.approx([0.935, 0.90])
    decay = [schedules["weight_decay_schedule"](step, 1000) for step in (0, 250, 500, 1000)]
    assert decay == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.0])


def test_sft_keeps_the_rate_for_four_fifths_without_decay():
    history = applied(sft_schedules(), 10)
    assert [entry["lr"] for entry in history] == pytest.approx([1] * 9 + [0.5])
    assert all(entry["decay"] == 0 for entry in history) and history[0]["momentum"] == 0.85


def test_rl_falls_linearly_from_the_start():
    history = applied(rl_schedules(), 4)
    assert [entry["lr"] for entry in history] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert all(entry["decay"] == 0 and entry["momentum"] == 0.95 for entry in history)


def test_a_resumed_scheduler_goes_on_where_it_was(tmp_path):
    schedules = pretraining_schedules("seed", warmup_steps=0.3)
    optimizer = build_optimizer()
    scheduler = GroupScheduler(optimizer, 10, **schedules)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed_optimizer = build_optimizer()
    resumed = GroupScheduler(resumed_optimizer, 10, **schedules)
    resumed_optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["scheduler"])
    assert isinstance(resumed, LRScheduler)
    for _ in range(3):
        for group, expected in zip(resumed_optimizer.param_groups, optimizer.param_groups):
            assert {k: v for k, v in group.items() if k != "params"} == {
                k: v for k, v in expected.items() if k != "params"
            }
        for each in (optimizer, scheduler, resumed_optimizer, resumed):
            each.step()


def test_a_counted_warmup_may_reach_into_the_warmdown_of_a_short_run():
    rates = [entry["lr"] for entry in applied(pretraining_schedules("head"), 50)]  # 40 steps up, the last 32 down
    assert rates[:40] == pytest.approx([(step + 1) / 40 for step in range(40)])
    assert rates[40:] == pytest.approx([p + (1 - p) * 0.05 for p in ((50 - step) / 32 for step in range(40, 50))])


@pytest.mark.parametrize(
    "settings",
    [{"warmup_steps": 0.6, "warmdown_ratio": 0.6}, {"warmup_steps": -1}, {"warmdown_ratio": 1.5}],
    ids=str,
)
def test_ratios_that_are_no_shares_of_a_run_are_refused(settings):
    with pytest.raises(ValueError, match=r"expected a number of steps .* and a share of the run"):
        pretraining_schedules("seed", **settings)


def test_an_unknown_era_is_refused():
    with pytest.raises(ValueError, match="'bigram', expected one of seed, head"):
        pretraining_schedules("bigram")
