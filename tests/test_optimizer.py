"""MuonAdamW on one rank: upstream's golden steps, compiled against eager, and what libraries ask of an optimizer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.muon_adamw import MuonAdamW

GOLDEN = Path(__file__).parent / "golden" / "optimizer"
MUON_OPTIONS = ("ns_steps", "polar_dtype", "row_equilibration", "frobenius_renormalization")


def golden_optimizer(
    case: dict, tensors: dict, compile: bool = False
) -> tuple[MuonAdamW, dict[str, torch.nn.Parameter]]:
    names = [name.removeprefix("init.") for name in tensors if name.startswith("init.")]
    parameters = {name: torch.nn.Parameter(tensors["init." + name].clone()) for name in names}
    groups = [
        {"params": [parameters[f"adamw.{i}"]], "use_muon": False, **{k: v for k, v in group.items() if k != "base_lr"}}
        for i, group in enumerate(case["adamw"])
    ]
    muon = {name: value for name, value in case["muon"].items() if name != "norm_safety"}
    groups.append(
        {"params": [p for name, p in parameters.items() if name.startswith("muon")], "use_muon": True, **muon}
    )
    return MuonAdamW(groups, compile=compile), parameters


def golden_errors(case: dict, tensors: dict, compile: bool = False) -> dict[str, float]:
    """Relative distance from upstream's parameters, over all steps it recorded."""
    optimizer, parameters = golden_optimizer(case, tensors, compile)
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    errors = {}
    for step, applied in enumerate(case["schedule"]):
        for group, base_lr in zip(optimizer.param_groups, base_lrs):
            group["lr"] = base_lr * applied["lr_multiplier"]
        optimizer.param_groups[-1].update(momentum=applied["muon_momentum"], weight_decay=applied["muon_weight_decay"])
        for name, parameter in parameters.items():
            parameter.grad = tensors[f"grad.{step}.{name}"].clone()
        optimizer.step()
        for name, parameter in parameters.items():
            if f"after.{step}.{name}" in tensors:
                expected, init = tensors[f"after.{step}.{name}"], tensors[f"init.{name}"]
                errors[f"{step}.{name}"] = ((parameter - expected).norm() / (expected - init).norm()).item()
    return errors


def read_golden(name: str) -> tuple[dict, dict]:
    return json.loads((GOLDEN / name / "case.json").read_text()), load_file(GOLDEN / name / "steps.safetensors")


@pytest.mark.parametrize("precision,tolerance", [("float32", 1e-4), ("bfloat16", 0.08)])
@pytest.mark.parametrize("era", ["2026_01_seed", "2026_07_head"])
def test_steps_equal_upstreams(era, precision, tolerance):
    errors = golden_errors(*read_golden(f"{era}_{precision}"))
    assert len(errors) == 3 * 16
    assert max(errors.values()) < tolerance, errors
