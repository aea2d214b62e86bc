"""MuonAdamW on 1, 2, 3 and 4 gloo ranks against one process on the same global batch; resumption; FSDP2.

This file is also the program that the ranks run: one process that forks into four, so that torch is imported once, of
which the first 1 to 4 work together. What they send is counted, and compared with what the plan of a run counts.
"""

import copy
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[2]))  # when run as a program
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.optimizer.shards import Ranks
from modeling_nanochat.training.step_time import bytes_exchanged

pytestmark = pytest.mark.slow

WORLD = 4
EXAMPLES = 12  # in a global batch: an equal share for every number of ranks
MUON_SHAPES = [(8, 8)] * 5 + [(12, 4)] * 3 + [(4, 12)] * 2 + [(2, 8)]  # stacks that 4, 3 or 2 ranks cannot share evenly
ADAMW_SHAPES = {
    "embedding": (67, 32),  # rows that no number of ranks divides
    "even": (96, 16),  # rows that all do
    "one_row": (1, 2048),  # fewer rows than ranks
    "vector": (1500,),
    "tiny": (6,),
    "scalar": (),
    "bfloat16": (70, 24),
}


def build_parameters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {f"muon.{i}": shape for i, shape in enumerate(MUON_SHAPES)} | ADAMW_SHAPES
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    values["bfloat16"] = values["bfloat16"].bfloat16()
    return {name: torch.nn.Parameter(value) for name, value in values.items()}


def build_optimizer(parameters: dict[str, torch.nn.Parameter], process_group=None) -> MuonAdamW:
    muon = [p for name, p in parameters.items() if name.startswith("muon")]
    embeddings = [parameters[name] for name in ("embedding", "even", "one_row", "bfloat16")]
    scalars = [parameters[name] for name in ("vector", "tiny", "scalar")]
    groups = [
        {"params": embeddings, "use_muon": False, "lr": 0.05, "weight_decay": 0.1},
        {"params": muon, "use_muon": True, "lr": 0.02, "weight_decay": 0.2, "polar_dtype": "float32"},
        {"params": scalars, "use_muon": False, "lr": 0.01, "betas": (0.96, 0.95)},
    ]
    return MuonAdamW(groups, process_group)


def set_gradients(parameters: dict[str, torch.nn.Parameter], step: int, examples: range) -> None:
    """The mean gradient over some examples of a step's batch. `even` has none from the first half of them."""
    for index, (name, parameter) in enumerate(parameters.items()):
        total = torch.zeros(parameter.shape)
        for example in examples:
            generator = torch.Generator().manual_seed(1000 * step + 100 * example + index)
            if name != "even" or example >= EXAMPLES // 2:
                total += torch.randn(parameter.shape, generator=generator) + 0.3
        has_gradient = name != "even" or examples.stop > EXAMPLES // 2
        parameter.grad = (total / len(examples)).to(parameter.dtype) if has_gradient else None


def train(parameters: dict, optimizer: MuonAdamW, steps: range, rank: int = 0, world: int = 1) -> None:
    share = EXAMPLES // world
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        set_gradients(parameters, step, range(rank * share, (rank + 1) * share))
        optimizer.step()


def distance(parameters: dict, expected: dict) -> dict[str, float]:
    init = build_parameters()
    return {
        name: (
            (p.float() - expected[name].float()).norm() / (expected[name].float() - init[name].float()).norm()
        ).item()
        for name, p in parameters.items()
    }


@contextmanager
def counted_exchange() -> Iterator[Counter]:
    """The bytes of the whole tensors that go through the collectives in here."""
    whole = {"reduce_scatter_tensor": 1, "all_gather_into_tensor": 0, "all_reduce": 0}  # which argument
    before = {name: getattr(dist, name) for name in whole}
    counted = Counter()

    def counting(name: str, *tensors, **settings):
        counted[name] += tensors[whole[name]].nbytes
        return before[name](*tensors, **settings)

    for name in whole:
        setattr(dist, name, partial(counting, name))
    yield counted
    for name, function in before.items():
        setattr(dist, name, function)


def exchange_by_theory(optimizer: MuonAdamW, group: dist.ProcessGroup) -> Counter:
    """What `step_time` counts for the same parameters; one rank sends nothing."""
    names = {"reduce_scatter": "reduce_scatter_tensor", "all_gather": "all_gather_into_tensor"}
    theory = Counter()
    ranks = Ranks(group, dist.get_rank(group), dist.get_world_size(group))
    for part in optimizer.layout(ranks) if ranks.size > 1 else ():
        theory.update({names.get(name, name): size for name, size in bytes_exchanged(part).items()})
    return theory


def state_elements(state_dict: dict) -> int:
    """Without `one_row`, which no two ranks can share."""
    kept = [entry for key, entry in state_dict["state"].items() if key != 2]
    return sum(value.numel() for entry in kept for value in entry.values())


# ---------------------------------------------------------------- what the ranks run


def check_groups(folder: Path, rank: int, groups: list, alone: dist.ProcessGroup) -> list[dict]:
    """Train 3 steps on each number of ranks and save every rank's state; report on each."""
    expected = build_parameters()
    reference = build_optimizer(expected, alone)
    train(expected, reference, range(3))
    whole = state_elements(reference.state_dict())
    reports = []
    for world, group in enumerate(groups, start=1):
        if rank >= world:
            continue
        parameters = build_parameters()
        optimizer = build_optimizer(parameters, group)
        train(parameters, optimizer, range(2), rank, world)
        with counted_exchange() as counted:
            train(parameters, optimizer, range(2, 3), rank, world)
        torch.save(optimizer.state_dict(), folder / f"state_{rank}_of_{world}.pt")
        values = {name: p.detach() for name, p in parameters.items()}
        if rank == 0:
            torch.save(values, folder / f"weights_{world}.pt")
        report = {"test": "groups", "world": world, "error": distance(parameters, expected)}
        report["state_share"] = state_elements(optimizer.state_dict()) / whole
        report["exchanged"] = counted, exchange_by_theory(optimizer, group)
        report["sum"] = {name: p.double().sum().item() for name, p in values.items()}
        reports.append(report)
    return reports


def check_resumption(folder: Path, rank: int, groups: list, alone: dist.ProcessGroup) -> list[dict]:
    """Go on for 2 steps on M ranks from what N ranks saved."""
    expected = build_parameters()
    train(expected, build_optimizer(expected, alone), range(5))
    reports = []
    for saved_by in range(1, WORLD + 1):
        paths = [folder / f"state_{i}_of_{saved_by}.pt" for i in range(saved_by)]
        parts = [torch.load(path, weights_only=True) for path in paths]
        for world, group in enumerate(groups, start=1):
            if rank >= world:
                continue
            parameters = build_parameters()
            for name, value in torch.load(folder / f"weights_{saved_by}.pt", weights_only=True).items():
                parameters[name].data.copy_(value)
            optimizer = build_optimizer(parameters, group)
            optimizer.load_state_dict(parts[rank] if saved_by == world else optimizer.merge_state_dicts(parts))
            train(parameters, optimizer, range(3, 5), rank, world)
            error = distance(parameters, expected)
            reports.append({"test": "resumption", "saved_by": saved_by, "world": world, "error": error})
    return reports


class Network(torch.nn.Module):
    """Two matrices of each of three shapes, whose rows not every number of ranks divides, and an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(37, 10)
        self.up = torch.nn.ModuleList(torch.nn.Linear(10, 22, bias=False) for _ in range(2))
        self.down = torch.nn.ModuleList(torch.nn.Linear(22, 10, bias=False) for _ in range(2))
        self.gate = torch.nn.Linear(10, 3, bias=False)  # fewer rows than ranks

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for up, down in zip(self.up, self.down):
            x = x + down(up(x).relu().square())
        return (x.square().mean(-1) * self.gate(x).sigmoid().sum(-1)).mean()


def network_optimizer(model: torch.nn.Module, process_group=None, **options) -> MuonAdamW:
    matrices = [*(layer.weight for layer in (*model.up, *model.down)), model.gate.weight]
    groups = [
        {"params": [model.embedding.weight], "use_muon": False, "lr": 0.05, "weight_decay": 0.1},
        {"params": matrices, "use_muon": True, "lr": 0.02, "weight_decay": 0.2, "polar_dtype": "float32", **options},
    ]
    return MuonAdamW(groups, process_group)


def train_network(model: torch.nn.Module, optimizer: MuonAdamW, steps: range, rank: int = 0, world: int = 1) -> None:
    for step in steps:
        ids = torch.randint(37, (EXAMPLES, 5), generator=torch.Generator().manual_seed(step))
        model(ids.chunk(world)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()


def check_fsdp(rank: int, meshes: list[DeviceMesh], alone: dist.ProcessGroup) -> list[dict]:
    """FSDP2 on 2, 3 and 4 ranks against the network unsharded, with a state that goes out and in by DCP on the way."""
    reports = []
    options = {"row_equilibration": True, "frobenius_renormalization": True}
    expected = Network()
    train_network(expected, network_optimizer(expected, alone, **options), range(4))
    for world, mesh in enumerate(meshes, start=2):
        if rank >= world:
            continue
        model = Network()
        for layer in (*model.up, *model.down):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = network_optimizer(model, **options)
        train_network(model, optimizer, range(2), rank, world)
        saved = get_optimizer_state_dict(model, optimizer)
        optimizer = network_optimizer(model, **options)
        set_optimizer_state_dict(model, optimizer, saved)
        train_network(model, optimizer, range(2, 4), rank, world)
        pairs = zip(model.named_parameters(), expected.named_parameters(), Network().parameters())
        error = {name: ((p.full_tensor() - e).norm() / (e - init).norm()).item() for (name, p), (_, e), init in pairs}
        local = sum(value.to_local().numel() for value in optimizer.state[model.up[0].weight].values())
        reports.append({"test": "fsdp", "world": world, "error": error, "state_elements": local})
    return reports


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    groups = [dist.new_group(range(world)) for world in range(1, WORLD + 1)]
    alone = [dist.new_group([i]) for i in range(WORLD)][rank]
    meshes = [DeviceMesh("cpu", list(range(world))) for world in range(2, WORLD + 1)]
    reports = check_groups(folder, rank, groups, alone)
    dist.barrier()
    reports += check_resumption(folder, rank, groups, alone)
    reports += check_fsdp(rank, meshes, alone)
    for report in reports:
        report |= {"rank": rank, "launched": dist.get_world_size()}
    (folder / f"reports_{rank}.json").write_text(json.dumps(reports))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.start_processes(run_rank, (Path(sys.argv[1]),), nprocs=WORLD, start_method="fork")


# ---------------------------------------------------------------- what is asserted of it


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [report for i in range(WORLD) for report in json.loads((folder / f"reports_{i}.json").read_text())]


def of(reports: list[dict], test: str) -> list[dict]:
    chosen = [report for report in reports if report["test"] == test]
    assert chosen and all(report["launched"] == WORLD for report in chosen)
    return chosen


def assert_close(report: dict) -> None:
    for name, error in report["error"].items():
        # bfloat16 gradients are summed in bfloat16, a few roundings of 2^-9 away from the mean in one process
        assert error < (3e-2 if name == "bfloat16" else 1e-4), (name, report)


def test_any_number_of_ranks_ends_with_the_weights_of_one(reports):
    chosen = of(reports, "groups")
    assert len(chosen) == 1 + 2 + 3 + 4
    for report in chosen:
        assert_close(report)


def test_what_is_sent_is_what_the_plan_counts(reports):
    for report in of(reports, "groups"):
        counted, theory = report["exchanged"]
        assert counted == theory and bool(counted) == (report["world"] > 1)


def test_all_ranks_hold_the_same_weights(reports):
    for world in range(1, WORLD + 1):
        sums = [report["sum"] for report in of(reports, "groups") if report["world"] == world]
        assert len(sums) == world and all(entry == sums[0] for entry in sums)


def test_state_per_rank_shrinks_as_the_ranks_grow(reports):
    for world in range(1, WORLD + 1):
        shares = [report["state_share"] for report in of(reports, "groups") if report["world"] == world]
        assert len(shares) == world and sum(shares) < 1.01  # only tiny tensors are kept twice
        assert max(shares) < 1.25 / world, shares  # no matrix is split, and few stand for many here


def test_a_run_goes_on_with_another_number_of_ranks(reports):
    chosen = of(reports, "resumption")
    assert {(r["saved_by"], r["world"]) for r in chosen} == {(n, m) for n in range(1, 5) for m in range(1, 5)}
    for report in chosen:
        assert_close(report)


def test_fsdp2_equals_unsharded(reports):
    chosen = of(reports, "fsdp")
    assert {report["world"] for report in chosen} == {2, 3, 4}
    for report in chosen:
        assert_close(report)
        assert report["state_elements"] < (22 * 10 + 22) / report["world"] + 11 + 1


def test_parts_of_another_number_of_ranks_are_refused():
    parameters = build_parameters()
    optimizer = build_optimizer(parameters)
    train(parameters, optimizer, range(1))
    whole = optimizer.state_dict()
    part = copy.deepcopy(whole)
    part["state"][0]["exp_avg"] = part["state"][0]["exp_avg"][:34]
    with pytest.raises(ValueError, match=r"\(34, 32\).*Merge all parts first"):
        optimizer.load_state_dict(part)
    part = copy.deepcopy(whole)
    del part["state"][5]
    with pytest.raises(ValueError, match="nothing for parameter 5"):
        optimizer.load_state_dict(part)
    part = copy.deepcopy(whole)
    part["state"][0]["exp_avg"] = part["state"][0]["exp_avg"][:34]
    with pytest.raises(ValueError, match="expected the parts of all ranks"):
        optimizer.merge_state_dicts([part])
