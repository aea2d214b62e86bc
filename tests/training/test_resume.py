"""A run killed at any moment, also while saving, goes on from its last complete checkpoint to the very same weights."""

import json
import multiprocessing
import os
import shutil
import signal
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load, load_file
from transformers import TrainerCallback

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.training.data.row_loader import RowLoader
from modeling_nanochat.training.trainers.checkpoints import latest_checkpoint, remove_old_checkpoints
from modeling_nanochat.training.trainers.pretrain import PretrainConfig, PretrainTrainer
from modeling_nanochat.training.whole_files import replace_files
from tests.hub_stand_in import TOKEN, USER, hub_stand_in
from tests.ranks import PROCESSES, free_port, join_ranks

STEPS, SAVE_EVERY, LENGTH, VOCABULARY = 9, 3, 16, 64
WRAPPED = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["NanoChatGPTDecoderLayer"]}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT", **WRAPPED}}


class RandomWalk:
    """Rows that can be learnt: each token is the one before it plus a step of 1 or 2; a stream has its own seed."""

    def __init__(self, stream: int, streams: int):
        self.stream, self.place = stream, 0

    def __next__(self) -> np.ndarray:
        draw = np.random.default_rng([self.stream, self.place])
        self.place += 1
        return ((draw.integers(VOCABULARY) + draw.integers(1, 3, LENGTH + 1).cumsum()) % VOCABULARY).astype(np.int32)

    def state_dict(self) -> dict:
        return {"place": self.place}

    def load_state_dict(self, state: dict) -> None:
        self.place = state["place"]


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAtStep(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def die_at_call(owner: object, name: str, call: int) -> None:
    """Kill this process instead of making the `call`-th call of a function."""
    function, calls = getattr(owner, name), iter(range(1, 10_000))
    setattr(owner, name, lambda *args, **kwargs: die() if next(calls) == call else function(*args, **kwargs))


def train(folder: str, death: tuple, rank: int, ranks: int, port: int, settings: dict) -> None:
    """One rank of a run, from the latest checkpoint if there is one; killed as `death` says."""
    join_ranks(rank, ranks, port)
    config = PretrainConfig(
        output_dir=folder,
        max_steps=STEPS,
        save_steps=SAVE_EVERY,
        logging_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        polar_dtype="float32",
        gradient_accumulation_steps=2,
        **{"torch_compile": False} | settings,
    )
    assert config.world_size == ranks
    if config.fsdp:  # accelerate shards on accelerators only: let these processes pass for some
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_NPU
    torch.manual_seed(0 if config.fsdp else rank)  # rank 0's weights become everybody's, but are sharded as they are
    model = NanoChatGPTForCausalLM(
        NanoChatGPTConfig.from_depth(2, vocab_size=VOCABULARY, head_dim=32, max_position_embeddings=LENGTH)
    )
    rows = RowLoader(RandomWalk, config.per_device_train_batch_size, LENGTH, rank=rank, ranks=ranks)
    trainer = PretrainTrainer(model, config, rows)
    if death and rank == death[-1]:
        if death[0] == "step":
            trainer.add_callback(DieAtStep(death[1]))
        else:
            die_at_call({"os": os, "torch": torch}[death[0]], death[1], death[2])
    trainer.train(resume_from_checkpoint=True)
    if config.fsdp and config.torch_compile:
        assert all(layer._compiled_call_impl for layer in trainer.model.model.layers)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        assert not torch._dynamo.utils.counters["graph_break"]
    whole = trainer.whole_model()
    if rank == 0:
        replace_files(folder, whole.save_pretrained)
        (Path(folder) / "log.json").write_text(json.dumps(trainer.state.log_history))
    if config.push_to_hub:
        trainer.push_to_hub()


def run(folder: Path, death: tuple = (), ranks: int = 1, processes: BaseContext = PROCESSES, **settings) -> list[int]:
    """Exit codes of the ranks of a run."""
    port = free_port()
    settings = {"activation_dtype": "float32", "per_device_train_batch_size": 4 // ranks} | settings
    children = [
        processes.Process(target=train, args=(str(folder), death, rank, ranks, port, settings), daemon=True)
        for rank in range(ranks)
    ]
    for child in children:
        child.start()
    if death:  # the others wait for the dead one; torchrun would end them
        children[death[-1]].join(120)
        for child in children:
            child.kill()
    for child in children:
        child.join(120)
    return [child.exitcode for child in children]


def losses(folder: Path) -> dict[int, float]:
    log = json.loads((folder / "log.json").read_text())
    return {line["step"]: line["loss"] for line in log if "loss" in line}


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    expected = load_file(one / "model.safetensors")
    for name, tensor in load_file(other / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_killed_again_and_again(tmp_path):
    """One process: killed between checkpoints, before the rename, while writing, while removing an old one."""
    straight, interrupted = tmp_path / "straight", tmp_path / "interrupted"
    assert run(straight) == [0]
    deaths = [
        (("os", "rename", 2, 0), "checkpoint-3"),  # the second checkpoint was written and not renamed yet
        (("step", 5, 0), "checkpoint-3"),
        (("torch", "save", 2, 0), "checkpoint-3"),
        (("os", "rename", 3, 0), "checkpoint-9"),  # all steps done, the oldest checkpoint is to go
    ]
    for death, survivor in deaths:
        assert run(interrupted, death) == [-signal.SIGKILL]
        assert Path(latest_checkpoint(interrupted)).name == survivor
    assert run(interrupted) == [0]
    assert_same_run(straight, interrupted)
    assert sorted(path.name for path in straight.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A run of two ranks that nothing interrupted."""
    folder = tmp_path_factory.mktemp("two") / "straight"
    assert run(folder, ranks=2, save_total_limit=5) == [0, 0]
    return folder


@pytest.mark.slow
def test_two_ranks_killed(two_ranks, tmp_path):
    for death in (("step", 5, 1), ("torch", "save", 5, 1), ("os", "rename", 1, 0)):
        assert -signal.SIGKILL in run(tmp_path, death, ranks=2)
    assert run(tmp_path, ranks=2) == [0, 0]
    assert_same_run(two_ranks, tmp_path)


@pytest.mark.slow
def test_another_number_of_ranks(two_ranks, tmp_path):
    """From two ranks to one, and from that one's checkpoint to two again: the same rows, so the same losses."""
    fewer, more = tmp_path / "fewer", tmp_path / "more"
    shutil.copytree(two_ranks / "checkpoint-3", fewer / "checkpoint-3")
    assert run(fewer, save_total_limit=5) == [0]
    shutil.copytree(fewer / "checkpoint-6", more / "checkpoint-6")
    assert run(more, ranks=2) == [0, 0]
    for folder in (fewer, more):
        assert losses(folder) == pytest.approx(losses(two_ranks), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "weight_tolerance"), [("float32", 1e-5, 1e-3), ("bfloat16", 1e-4, 0.1)]
)
def test_fsdp2_equals_unsharded_and_resumes(two_ranks, tmp_path, dtype, loss_tolerance, weight_tolerance):
    """To float noise, and in bfloat16 to the noise of activations that FSDP2 rounds elsewhere."""
    unsharded = two_ranks
    if dtype != "float32":
        unsharded = tmp_path / "unsharded"
        assert run(unsharded, ranks=2, activation_dtype=dtype) == [0, 0]
    settings = {"activation_dtype": dtype, **FSDP}
    sharded = tmp_path / "sharded"
    assert -signal.SIGKILL in run(sharded, ("step", 5, 1), ranks=2, **settings)
    assert run(sharded, ranks=2, **settings) == [0, 0]
    assert losses(sharded) == pytest.approx(losses(unsharded), rel=loss_tolerance)
    expected = load_file(unsharded / "model.safetensors")
    for name, tensor in load_file(sharded / "model.safetensors").items():  # noise turns the sign of some decays
        assert (tensor - expected[name]).norm() <= weight_tolerance * expected[name].norm(), name
    for folder in (sharded, sharded / "checkpoint-9"):  # the network's own code lies beside its weights
        assert (folder / "modeling_nanochat_gpt.py").exists() and not (folder / "_fsdp_api.py").exists()


@pytest.mark.slow
def test_fsdp2_with_compiled_blocks(two_ranks, tmp_path):
    """Each block is compiled by itself: what is saved on the way has the names and weights of the eager run."""
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", **FSDP}  # inductor takes a minute longer
    assert -signal.SIGKILL in run(tmp_path, ("step", 5, 1), ranks=2, **settings)
    assert run(tmp_path, ranks=2, **settings) == [0, 0]
    assert losses(tmp_path) == pytest.approx(losses(two_ranks), rel=1e-5)
    expected = load_file(two_ranks / "model.safetensors")
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert (tensor - expected[name]).norm() <= 1e-3 * expected[name].norm(), name


@pytest.mark.slow
def test_two_sharded_ranks_push_one_whole_model(tmp_path, monkeypatch):
    """With each checkpoint and at the end, in one commit each (none where nothing is new), and what was saved."""
    with hub_stand_in() as hub:
        client = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        for name, value in client.items():
            monkeypatch.setenv(name, value)
        pushed = {"push_to_hub": True, "hub_model_id": f"{USER}/sharded", "hub_strategy": "every_save"}
        fresh = multiprocessing.get_context("spawn")  # the others have imported the client, which asks the real Hub
        assert run(tmp_path / "run", ranks=2, processes=fresh, **FSDP, **pushed) == [0, 0]
        assert hub.unknown == []
    *_, before, last = hub.repositories[f"{USER}/sharded"].commits
    assert before.title.startswith("Training in progress, step ")
    assert last.title in (f"Training in progress, step {STEPS}", "End of training")
    assert "modeling_nanochat_gpt.py" in last.files and "modeling_nanochat_gpt.py" in before.files
    expected = load_file(tmp_path / "run" / "model.safetensors")
    weights = load(last.files["model.safetensors"])
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_published_files_replace_whole_ones(tmp_path):
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "notes.txt").write_text("kept")

    def fail(folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_files(tmp_path, fail)
    assert (tmp_path / "config.json").read_text() == "old"
    replace_files(tmp_path, lambda folder: (folder / "config.json").write_text("new"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config.json": "new", "notes.txt": "kept"}


def test_old_checkpoints_go_by_step(tmp_path):
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_old_checkpoints(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 3
    remove_old_checkpoints(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-10"}
    assert Path(latest_checkpoint(tmp_path)).name == "checkpoint-10"
