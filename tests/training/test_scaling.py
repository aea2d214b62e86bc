"""The depth dial: formulas equal what real models hold, upstream's own plans come out exactly, errors explain."""

import json
from datetime import date
from pathlib import Path

import pytest
import torch

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.recipes import plan
from modeling_nanochat.recipes.stages import prices
from modeling_nanochat.training import devices, scaling

GOLDEN = Path(__file__).parents[1] / "golden" / "plan"
SHAPES = [
    {"depth": 4, "era": "seed", "head_dim": 64},
    {"depth": 3, "era": "seed", "head_dim": 64, "num_key_value_heads": 1},
    {"depth": 5, "era": "head", "head_dim": 64},
    {"depth": 2, "era": "launch", "head_dim": 32},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape['era']}-{shape['depth']}")
def test_counts_equal_the_real_model(shape):
    config = NanoChatGPTConfig.from_depth(vocab_size=320, max_position_embeddings=128, **shape)
    with torch.device("meta"):
        model = NanoChatGPTForCausalLM(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts = scaling.count_parameters(config)

    assert counts.total == sum(sizes.values())
    assert counts.token_embedding == sizes["model.embed_tokens.weight"]
    assert counts.head == sizes["lm_head.weight"]
    assert counts.value_embeddings == sum(size for name, size in sizes.items() if "value_embeddings" in name)
    assert counts.matrices == sum(size for name, size in sizes.items() if ".layers." in name)


def test_upstreams_published_d20():
    """Upstream printed these for its first d20 with its first vocabulary (github.com/karpathy/nanochat, 2025-10-13)."""
    config = NanoChatGPTConfig.from_depth(20, vocab_size=65536, era="launch")
    assert scaling.count_parameters(config).total == 560_988_160
    assert f"{scaling.flops_per_token(config):.6e}" == "3.491758e+09"


def test_windows_cost_what_they_see():
    full = NanoChatGPTConfig.from_depth(8, window_pattern="L")
    windowed = NanoChatGPTConfig.from_depth(8, window_pattern="SSSL")
    heads, width, context = full.num_attention_heads, full.head_dim, full.max_position_embeddings
    saved = scaling.flops_per_token(full) - scaling.flops_per_token(windowed)
    assert saved == 6 * 12 * heads * width * context // 2  # six of the eight layers see half the context
    assert scaling.flops_per_token(full, 512) == scaling.flops_per_token(windowed, 512)  # no window is reached


def test_horizon_ratio_flops_steps():
    config = NanoChatGPTConfig.from_depth(12)
    by_ratio = scaling.plan_training(config)
    assert by_ratio.batch_tokens == 2**19
    assert by_ratio.steps == int(10.5 * by_ratio.parameters.scaling // 2**19)
    assert by_ratio.tokens == by_ratio.steps * 2**19

    by_flops = scaling.plan_training(config, target_flops=1e18)
    assert by_flops.flops == pytest.approx(1e18, rel=1 / by_flops.steps)
    assert scaling.plan_training(config, max_steps=7, target_flops=1e18, batch_tokens=4096).tokens == 7 * 4096
    with pytest.raises(ValueError, match=r"shorter than one batch of 524,288 tokens"):
        scaling.plan_training(NanoChatGPTConfig.from_depth(1, vocab_size=64), tokens_per_parameter=0.01)
    with pytest.raises(ValueError, match="tokens_per_parameter is 0, expected more than 0"):
        scaling.plan_training(config, tokens_per_parameter=0)


GOLDEN_PLANS = [
    pytest.param(
        case["era"], case["vocab_size"], plan, case["tokens_per_parameter"], id=f"{case['era']}-{plan['depth']}"
    )
    for case in (json.loads((GOLDEN / f"{era}.json").read_text()) for era in ("seed", "head"))
    for plan in case["plans"]
]


@pytest.mark.parametrize(("era", "vocab_size", "expected", "ratio"), GOLDEN_PLANS)
def test_plans_equal_upstreams_exactly(era, vocab_size, expected, ratio):
    config = NanoChatGPTConfig.from_depth(expected["depth"], era=era, vocab_size=vocab_size)
    plan = scaling.plan_training(config, era=era)
    counts = plan.parameters
    assert expected["parameters"] == {
        "wte": counts.token_embedding,
        "value_embeds": counts.value_embeddings,
        "lm_head": counts.head,
        "transformer_matrices": counts.matrices,
        "scalars": counts.scalars,
        "total": counts.total,
    }
    assert counts.scaling == expected["scaling_parameters"]
    assert plan.flops_per_token == expected["flops_per_token"]
    assert (plan.batch_tokens, plan.steps) == (expected["batch_tokens"], expected["steps"])
    assert plan.steps == ratio * counts.scaling // plan.batch_tokens
    assert scaling.learning_rate_scale(plan.batch_tokens) == expected["learning_rate_scale"]
    assert plan.weight_decay == expected["weight_decay"]


@pytest.mark.parametrize("horizon", [{"max_steps": 7}, {"target_flops": 1e19}])
def test_decay_and_batch_are_those_of_the_ratio_whatever_the_number_of_steps(horizon):
    config = NanoChatGPTConfig.from_depth(20, era="head")
    by_ratio, other = (scaling.plan_training(config, era="head", **given) for given in ({}, horizon))
    assert other.steps != by_ratio.steps
    assert (other.batch_tokens, other.weight_decay) == (by_ratio.batch_tokens, by_ratio.weight_decay)


def test_the_reference_has_the_runs_own_proportions():
    """A run of depth 12 is its own reference, whatever its aspect ratio, head width and vocabulary."""
    proportions = {"aspect_ratio": 20, "head_dim": 64, "vocab_size": 512}
    config = NanoChatGPTConfig.from_depth(12, era="head", **proportions)
    assert scaling.plan_training(config, era="head", aspect_ratio=20).weight_decay == 0.28


def test_accumulation_explains_itself():
    assert scaling.accumulation_steps(2**19, 32, 2048, 8) == 1
    assert scaling.accumulation_steps(2**19, 8, 2048, 1) == 32
    with pytest.raises(ValueError, match=r"3 rows x 2048 tokens x 8 devices = 49,152 .* such as 540,672"):
        scaling.accumulation_steps(2**19, 3, 2048, 8)


def test_plan_prints_parameters_time_and_cost(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plan", "--depth", "20", "--gpus", "8", "--device", "H100"])
    plan.main()
    printed = capsys.readouterr().out
    for expected in ("896,535,720", "4,569,169,920", "8,715", "1.373e+19", "1 h 00 min", "32 $", "32 rows x 1"):
        assert expected in printed
    assert "where the time goes:" in printed and "exchange not hidden" in printed and "48%" in printed.splitlines()[-1]
    assert set(prices.RENTS) == set(devices.DEVICES)
    assert all(date.fromisoformat(rent.day) and rent.source for rent in prices.RENTS.values())
    monkeypatch.setattr("sys.argv", ["plan", "--device", "A100", "--fp8"])
    plan.main()
    assert "A100 multiplies no float8; expected one of B200, H200" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["plan", "--device", "abacus"])
    with pytest.raises(ValueError, match="'abacus', expected one of B200"):
        plan.main()
