"""Which group takes which parameter of a network, and at what rate."""

import math

import pytest

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.training.optimizer.groups import build_param_groups
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW


def build_model(era: str) -> NanoChatGPTForCausalLM:
    config = NanoChatGPTConfig.from_depth(3, vocab_size=64, head_dim=64, max_position_embeddings=32, era=era)
    return NanoChatGPTForCausalLM(config)


def by_name(model, **settings) -> dict[str, dict]:
    groups = build_param_groups(model, **({"weight_decay": 0.3} | settings))
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {group["name"]: group | {"names": [names[p] for p in group["params"]]} for group in groups}


def test_the_seed_eras_groups():
    model = build_model("seed")  # hidden 192
    groups = by_name(model, batch_tokens=2**17)
    width, batch = math.sqrt(768 / 192), 0.5
    expected = {
        "head": (0.004 * width, (0.8, 0.95)),
        "token_embedding": (0.3 * width, (0.8, 0.95)),
        "value_embeddings": (0.3 * width, (0.8, 0.95)),
        "resid_lambdas": (0.005, (0.8, 0.95)),
        "x0_lambdas": (0.5, (0.96, 0.95)),
    }
    assert set(groups) == {*expected, "matrices"}
    for name, (lr, betas) in expected.items():
        assert groups[name]["lr"] == pytest.approx(lr * batch) and groups[name]["betas"] == betas
        assert not groups[name]["use_muon"] and groups[name]["weight_decay"] == 0 and groups[name]["eps"] == 1e-10
    matrices = groups["matrices"]
    assert matrices["lr"] == pytest.approx(0.02 * batch) and matrices["weight_decay"] == 0.3
    assert any("value_gate" in name for name in matrices["names"]) and len(matrices["names"]) == 3 * 6 + 2


def test_the_head_eras_groups():
    groups = by_name(build_model("head"), era="head", batch_tokens=2**19)
    settings = {name: (group["betas"], group["weight_decay"]) for name, group in groups.items() if name != "matrices"}
    assert settings["head"] == ((0.8, 0.96), 0.01) and settings["token_embedding"] == ((0.8, 0.995), 0.001)
    assert settings["value_embeddings"] == ((0.8, 0.995), 0.01) and settings["resid_lambdas"][1] == 0.05
    assert groups["value_embeddings"]["lr"] == pytest.approx(0.5 * groups["token_embedding"]["lr"])
    assert groups["head"]["lr"] == pytest.approx(0.008 * 2) and groups["smear_backout"]["lr"] == pytest.approx(0.2)
    assert len(groups["smear_backout"]["names"]) == 3
    matrices = groups["matrices"]
    assert matrices["beta2"] == 0.9 and matrices["row_equilibration"] and matrices["frobenius_renormalization"]


@pytest.mark.parametrize("era", ["seed", "head"])
def test_smear_and_backout_have_a_constant_rate(era):
    """Neither the batch, nor the width, nor `scalar_lr` scales it; the fraction that finetuning takes of all rates
    does."""
    groups = by_name(build_model("head"), era=era, batch_tokens=2**9, scalar_lr=3.0)
    assert groups["smear_backout"]["lr"] == 0.2
    lowered = by_name(build_model("head"), era=era, batch_tokens=2**9, init_lr_frac=0.05)
    assert lowered["smear_backout"]["lr"] == 0.2 * 0.05


@pytest.mark.parametrize("model_era", ["launch", "lambdas", "seed", "head"])
@pytest.mark.parametrize("era", ["seed", "head"])
def test_every_parameter_of_every_era_has_one_group(model_era, era):
    model = build_model(model_era)
    groups = build_param_groups(model, era=era, batch_tokens=1024, weight_decay=0.0)
    taken = [parameter for group in groups for parameter in group["params"]]
    assert len(taken) == len(set(taken)) == len(list(model.parameters()))
    MuonAdamW(groups)


def test_rates_may_be_given_and_lowered_together():
    model = build_model("seed")
    groups = by_name(
        model, batch_tokens=2**19, embedding_lr=0.2, init_lr_frac=0.05, weight_decay=0.0, polar_dtype="float32"
    )
    assert groups["token_embedding"]["lr"] == groups["value_embeddings"]["lr"] == pytest.approx(0.2 * 2 * 0.05)
    assert groups["matrices"]["lr"] == pytest.approx(0.001) and groups["matrices"]["weight_decay"] == 0
    assert groups["matrices"]["polar_dtype"] == "float32"


def test_frozen_parameters_are_left_out():
    model = build_model("seed")
    model.lm_head.weight.requires_grad_(False)
    assert "head" not in by_name(model, batch_tokens=1024)


def test_what_the_table_does_not_know_is_refused():
    model = build_model("seed")
    with pytest.raises(ValueError, match="no such base rate: embeding_lr; expected unembedding_lr, embedding_lr"):
        build_param_groups(model, batch_tokens=1024, weight_decay=0.0, embeding_lr=0.2)
    with pytest.raises(ValueError, match="era is 'launch', expected one of seed, head"):
        build_param_groups(model, era="launch", batch_tokens=1024, weight_decay=0.0)
    model.extra = model.lm_head
    model.lm_head = None
    with pytest.raises(ValueError, match=r"no group of the optimizer takes extra\.weight"):
        build_param_groups(model, batch_tokens=1024, weight_decay=0.0)
