"""MuonAdamW on one rank: upstream's golden steps, compiled against eager, and what libraries ask of an optimizer."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from modeling_nanochat.training.optimizer import shards as optimizer_shards
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.optimizer.updates import POLAR_EXPRESS_COEFFICIENTS, muon_update, polar_express

GOLDEN = Path(__file__).parents[1] / "golden" / "optimizer"


# ---------------------------------------------------------------- upstream's golden steps


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


# ---------------------------------------------------------------- the rules, against slow twins


def test_polar_express_is_its_polynomials_of_the_singular_values():
    torch.manual_seed(0)
    for shape in [(3, 24, 24), (2, 40, 16), (2, 16, 40)]:
        x = torch.randn(shape, dtype=torch.float64)
        u, values, v = torch.linalg.svd(x / (1.02 * x.norm(dim=(-2, -1), keepdim=True)), full_matrices=False)
        for a, b, c in POLAR_EXPRESS_COEFFICIENTS:
            values = a * values + b * values**3 + c * values**5
        expected = u @ torch.diag_embed(values) @ v
        torch.testing.assert_close(polar_express(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(polar_express(x.float()).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 64, 64), (2, 48, 160), (2, 160, 48)])
def test_compiled_bfloat16_is_nearer_to_the_exact_result(shape):
    """Compiled code may round elsewhere than upstream does, but not more."""
    torch._dynamo.reset()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).bfloat16()
    exact = polar_express(x.double())
    compiled = torch.compile(polar_express, backend="aot_eager", fullgraph=True)(x)
    eager_error, error = ((each - exact).norm() / exact.norm() for each in (polar_express(x), compiled))
    assert compiled.dtype == torch.bfloat16 and error < 0.9 * eager_error < 0.06


def test_adamw_follows_torchs_on_any_shape():
    torch.manual_seed(0)
    shapes = [(70, 20), (5,), ()]
    ours, theirs = ([torch.nn.Parameter(torch.full(shape, 0.3)) for shape in shapes] for _ in range(2))
    settings = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    optimizer = MuonAdamW([{"params": ours, "use_muon": False, **settings}])
    twin = torch.optim.AdamW(theirs, foreach=False, **settings)
    for _ in range(4):
        for mine, other in zip(ours, theirs):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        optimizer.step()
        twin.step()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- a toy for the rest


def toy_parameters(shapes=((8, 8), (8, 8), (12, 4), (30, 8), (6,))) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def toy_optimizer(parameters: list[torch.nn.Parameter], compile: bool | None = None) -> MuonAdamW:
    muon = {"use_muon": True, "lr": 0.02, "weight_decay": 0.1, "polar_dtype": "float32"}
    groups = [{"params": parameters[:3], **muon}, {"params": parameters[3:], "use_muon": False, "lr": 0.1}]
    return MuonAdamW(groups, compile=compile)


def toy_steps(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The rates and the momentum change at every step, as schedules do."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.param_groups[0]["momentum"] = 0.85 + 0.01 * step
        optimizer.step()


def assert_equal(parameters: list[torch.nn.Parameter], others: list[torch.nn.Parameter]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def test_a_parameter_without_gradient_is_as_one_with_zeros():
    """So that all ranks take part in every exchange, and stacks stay whole."""
    ours, theirs = toy_parameters(), toy_parameters()
    optimizers = [toy_optimizer(ours), toy_optimizer(theirs)]
    for parameters, optimizer in zip((ours, theirs), optimizers):
        toy_steps(parameters, optimizer, range(1))
        for i in (0, 3):
            parameters[i].grad = torch.zeros_like(parameters[i]) if parameters is ours else None
        optimizer.step()
    assert_equal(ours, theirs)


def test_resuming_from_a_saved_state_is_exact(tmp_path):
    expected = toy_parameters()
    toy_steps(expected, toy_optimizer(expected), range(5))
    parameters = toy_parameters()
    optimizer = toy_optimizer(parameters)
    toy_steps(parameters, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = toy_optimizer(parameters)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    toy_steps(parameters, resumed, range(3, 5))
    assert_equal(parameters, expected)


def test_an_optimizer_in_use_takes_a_state_over():
    parameters, expected = toy_parameters(), toy_parameters()
    optimizer, reference = toy_optimizer(parameters), toy_optimizer(expected)
    toy_steps(parameters, optimizer, range(2))
    toy_steps(expected, reference, range(3))
    for mine, other in zip(parameters, expected):
        mine.data.copy_(other.data)
    optimizer.load_state_dict(reference.state_dict())
    toy_steps(parameters, optimizer, range(3, 5))
    toy_steps(expected, reference, range(3, 5))
    assert_equal(parameters, expected)


def test_accelerate_prepares_it():
    expected = toy_parameters()
    toy_steps(expected, toy_optimizer(expected), range(3))
    parameters = toy_parameters()
    prepared = Accelerator(cpu=True).prepare(toy_optimizer(parameters))
    toy_steps(parameters, prepared, range(3))
    assert_equal(parameters, expected)


def test_a_group_added_later_is_trained_and_the_others_go_on():
    parameters, expected = toy_parameters(), toy_parameters()
    late = torch.nn.Parameter(torch.ones(4, 4))
    optimizer, reference = toy_optimizer(parameters), toy_optimizer(expected)
    toy_steps(parameters, optimizer, range(2))
    optimizer.add_param_group({"params": [late], "use_muon": True, "lr": 0.02, "polar_dtype": "float32"})
    toy_steps(expected, reference, range(2))
    late.grad = torch.ones(4, 4)
    toy_steps(parameters, optimizer, range(2, 4))
    toy_steps(expected, reference, range(2, 4))
    assert_equal(parameters, expected)
    assert not torch.equal(late, torch.ones(4, 4))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"use_muon": "yes"}, "use_muon of a parameter group is 'yes', expected True"),
        ({"params": [torch.nn.Parameter(torch.ones(3))]}, r"matrices only, got a parameter of shape \(3,\)"),
        ({"ns_steps": 6}, "ns_steps is 6, expected 1 to 5"),
        ({"polar_dtype": "float16"}, "polar_dtype is 'float16', expected auto"),
    ],
)
def test_a_wrong_group_is_refused(changes, message):
    group = {"params": [torch.nn.Parameter(torch.ones(3, 3))], "use_muon": True, "lr": 0.1}
    with pytest.raises(ValueError, match=message):
        MuonAdamW([group | changes])


def test_a_group_without_rate_is_refused():
    with pytest.raises(ValueError, match="a parameter group has no lr"):
        MuonAdamW([{"params": toy_parameters(), "use_muon": False}])


# ---------------------------------------------------------------- compilation


def test_one_graph_serves_all_values_of_the_hyperparameters():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(muon_update, backend=count, dynamic=False, fullgraph=True)
    ours, theirs = [], []
    for tensors, update in ((ours, compiled), (theirs, muon_update)):
        torch.manual_seed(0)
        tensors += [torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.zeros(2, 6, 4), torch.zeros(2, 6, 1)]
        for step in range(4):
            values = {"lr": 0.02 / (step + 1), "momentum": 0.85 + step / 100, "beta2": 0.95, "weight_decay": 0.1 * step}
            if update is compiled:
                values = {name: torch.tensor(value) for name, value in values.items()}
            update(*tensors, **values, polar_dtype=torch.float32)
    assert len(graphs) == 1
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compiled_equals_eager():
    compiled, eager = (toy_parameters(((6, 4), (6, 4), (6, 4), (5,))) for _ in range(2))
    toy_steps(compiled, toy_optimizer(compiled, compile=True), range(3))
    toy_steps(eager, toy_optimizer(eager, compile=False), range(3))
    for mine, other in zip(compiled, eager):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_it_runs_eagerly(monkeypatch):
    monkeypatch.setattr(optimizer_shards.shutil, "which", lambda name: None)
    parameters, expected = toy_parameters(), toy_parameters()
    toy_steps(parameters, toy_optimizer(parameters, compile=True), range(2))
    toy_steps(expected, toy_optimizer(expected, compile=False), range(2))
    assert_equal(parameters, expected)
