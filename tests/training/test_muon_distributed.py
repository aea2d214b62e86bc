"""Muon in the stock Trainer on two ranks: DDP and FSDP2 end with the weights of one process, and go on exactly."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer

from modeling_nanochat.training.muon import muon_optimizer
from modeling_nanochat.training.optimizer import shards
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from tests.ranks import run_two_ranks
from tests.training.test_muon import RATES, stock_trainer
from tests.training.toy_networks import NETWORKS, build

ARCHITECTURES = [name for name in NETWORKS if name not in ("mamba", "falcon", "gpt_oss")]
FUSED = ["llama", "gpt2", "gpt_neox", "mixtral", "gpt_oss"]  # every form that a tensor of several matrices has
FSDP = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"},
}
RESUMED = ["llama", "gpt2"]  # whose checkpoints the Trainer itself reads back whole
STEPS = 4


def train(name: str, folder: Path, batch: int, resume: bool = False, **settings) -> Trainer:
    shards.choose_dtype = lambda *_: torch.float32  # where bfloat16 is native, two ranks' roundings would differ
    trainer = stock_trainer(name, folder, steps=STEPS, batch=batch, **settings)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}") if resume else None)
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for name, p in named}


def under_ddp(folder: Path) -> None:
    train_all(folder, "ddp", ARCHITECTURES)
    share_the_work(folder)


def under_fsdp(folder: Path) -> None:
    train_all(folder, "fsdp", FUSED, **FSDP)


def train_all(folder: Path, kind: str, names: list[str], **settings) -> None:
    """Half of the batch on each rank; the weights at the end, of the straight run and of one that was resumed."""
    for name in names:
        place, resumed = folder / kind / name, {}
        trainer = train(name, place, 4, **settings)
        assert trainer.args.world_size == 2 and trainer.is_fsdp_enabled == (kind == "fsdp")
        if name in RESUMED:
            resumed = weights(train(name, place, 4, resume=True, **settings))
        torch.save((weights(trainer), resumed), folder / f"{kind}_{name}_{trainer.args.process_index}.pt")


def share_the_work(folder: Path) -> None:
    """As this project's trainers do: each rank has its own gradients, and a part of the state."""
    rank, report = torch.distributed.get_rank(), {}
    for name in FUSED:
        expected, model = build(name), build(name)
        alone = muon_optimizer(expected, **RATES)
        shared = MuonAdamW(muon_optimizer(model, **RATES).param_groups)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for one, other in zip(expected.parameters(), model.parameters()):
                grads = [torch.randn(one.shape, generator=generator) for _ in range(2)]
                one.grad, other.grad = (grads[0] + grads[1]) / 2, grads[rank]
            alone.step()
            shared.step()
        pairs = zip(expected.parameters(), model.parameters())
        report[name] = max((one - other).abs().max().item() for one, other in pairs)
        held = [sum(t.numel() for s in each.state.values() for t in s.values()) for each in (shared, alone)]
        assert held[0] < 0.75 * held[1]
    (folder / f"shared_{rank}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    for work in (under_ddp, under_fsdp):
        run_two_ranks(work, folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, two_ranks) -> dict[str, dict[str, torch.Tensor]]:
    folder, before = tmp_path_factory.mktemp("alone"), shards.choose_dtype
    try:
        return {name: weights(train(name, folder / name, 8)) for name in {*ARCHITECTURES, *FUSED}}
    finally:
        shards.choose_dtype = before


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], network: str) -> None:
    start = dict(build(network).named_parameters())
    for name, weight in expected.items():
        moved = (weight - start[name]).norm()
        assert (found[name] - weight).norm() <= 1e-3 * moved + 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ddp_equals_one_process(name, two_ranks, one_rank):
    first, second = (torch.load(two_ranks / f"ddp_{name}_{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[0][n], second[0][n]) for n in first[0])
    assert_close(first[0], one_rank[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
def test_fsdp2_equals_one_process(name, two_ranks, one_rank):
    found, _ = torch.load(two_ranks / f"fsdp_{name}_0.pt")
    assert_close(found, one_rank[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_on_two_ranks_goes_on_exactly(kind, two_ranks):
    for name in RESUMED:
        straight, resumed = torch.load(two_ranks / f"{kind}_{name}_0.pt")
        assert straight and all(torch.equal(straight[n], resumed[n]) for n in straight), name


@pytest.mark.slow
def test_sharing_the_work_changes_nothing(two_ranks):
    for rank in (0, 1):
        report = json.loads((two_ranks / f"shared_{rank}.json").read_text())
        assert set(report) == set(FUSED) and max(report.values()) < 1e-4
