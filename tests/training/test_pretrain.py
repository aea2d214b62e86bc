"""The pretraining Trainer follows upstream's own run step by step, counts right, and refuses nonsense."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.recipes.conversion.upstream_tensors import (
    UPSTREAM_NAMES,
    config_from_upstream,
    other_name,
    tensors_to_ours,
)
from modeling_nanochat.training import scaling
from modeling_nanochat.training.data.row_loader import RowLoader
from modeling_nanochat.training.trainers.pretrain import (
    Evaluation,
    PretrainConfig,
    PretrainTrainer,
    store_tables_in_bfloat16,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "training"
HEAD_CASE_WEIGHT_DECAY = 0.04949747468305833  # chosen for the case: its horizon is no ratio's


class ListedRows:
    """The rows of a list, in order."""

    def __init__(self, rows: np.ndarray):
        self.rows, self.place = rows, 0

    def __next__(self) -> np.ndarray:
        self.place += 1
        return self.rows[(self.place - 1) % len(self.rows)]

    def state_dict(self) -> dict:
        return {"place": self.place}

    def load_state_dict(self, state: dict) -> None:
        self.place = state["place"]


def quiet_config(folder: Path, **settings) -> PretrainConfig:
    defaults = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "torch_compile": False}
    return PretrainConfig(output_dir=str(folder), **(defaults | settings))


def golden_trainer(name: str, era: str, polar_dtype: str, folder: Path, **settings) -> tuple[dict, PretrainTrainer]:
    """A case of upstream's own training, and our trainer with its network, rows and given rates."""
    case = json.loads((GOLDEN / f"{name}_{polar_dtype}" / "case.json").read_text())
    tensors = {file: load_file(GOLDEN / f"{name}_float32" / f"{file}.safetensors") for file in ("init", "rows")}
    network = config_from_upstream(case["model_config"], era)
    model = NanoChatGPTForCausalLM(network)
    model.load_state_dict(tensors_to_ours(tensors["init"], network, UPSTREAM_NAMES))
    length = case["model_config"]["sequence_len"]
    listed = tensors["rows"]["rows"].reshape(-1, length + 1).numpy()
    config = quiet_config(
        folder,
        max_steps=case["steps"],
        gradient_accumulation_steps=case["accumulation"],
        polar_dtype=polar_dtype,
        activation_dtype="float32",
        logging_steps=1,
        **{name: case["base"][name] for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")},
        **settings,
    )
    rows = RowLoader(lambda stream, streams: ListedRows(listed), case["batch_rows"], length)
    trainer = PretrainTrainer(model, config, rows)
    assert trainer.batch_tokens == case["total_batch_tokens"]
    return case, trainer


def losses_of(trainer: PretrainTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def assert_upstreams_norms(trainer: PretrainTrainer, case: dict) -> None:
    tensors = trainer.model.state_dict()
    norms = {other_name(name, UPSTREAM_NAMES): tensor.norm().item() for name, tensor in tensors.items()}
    assert norms == pytest.approx(case["final_norms"], rel=0.005)


@pytest.mark.parametrize(("polar_dtype", "tolerance"), [("float32", 0.002), ("bfloat16", 0.02)])
def test_follows_upstreams_seed_at_every_step(tmp_path, polar_dtype, tolerance):
    """Losses of 100 steps within the tolerance of the golden cases, and with float32 the norms of all final tensors."""
    case, trainer = golden_trainer("2026_01_seed", "seed", polar_dtype, tmp_path, warmup_steps=0.1)
    trainer.train()
    assert losses_of(trainer) == pytest.approx(case["losses"], abs=tolerance)
    if polar_dtype == "float32":
        assert_upstreams_norms(trainer, case)


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


@pytest.mark.slow
@pytest.mark.parametrize(("polar_dtype", "steps"), [("float32", 480), ("bfloat16", 120)])
def test_follows_upstreams_head_at_every_step(tmp_path, polar_dtype, steps):
    """A run of 480 steps by head's own schedules, which no setting names; of that in bfloat16 a quarter, because it is
    emulated here and takes a minute. The run amplifies noise: 1e-6 in the weights moves a loss by up to 0.015."""
    case, trainer = golden_trainer("2026_07_head", "head", polar_dtype, tmp_path, weight_decay=HEAD_CASE_WEIGHT_DECAY)
    trainer.add_callback(StopAt(steps))
    trainer.train()
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert {name: group["initial_lr"] for name, group in groups.items()} == {
        **case["initial_lr"],
        "matrices": case["matrix_lr"],
    }
    assert groups["matrices"]["initial_weight_decay"] == case["weight_decay"]
    schedules = trainer.schedules
    for step, applied in case["schedule_at_steps"].items():
        factor, momentum, decay = (schedule(int(step), case["steps"]) for schedule in schedules.values())
        assert factor == pytest.approx(applied["lr_multiplier"], rel=1e-12)
        assert momentum == pytest.approx(applied["muon_momentum"], rel=1e-12)
        assert decay * case["weight_decay"] == pytest.approx(applied["muon_weight_decay"], rel=1e-9)
    errors = np.abs(np.subtract(losses_of(trainer), case["losses"][:steps]))
    assert errors[:100].max() < 0.015 and errors.max() < 0.05 and errors.mean() < 0.006


def tiny_trainer(folder: Path, evaluations=(), **settings) -> PretrainTrainer:
    """Two layers on rows that repeat, so that something is learnt."""
    torch.manual_seed(0)
    network = NanoChatGPTConfig.from_depth(2, vocab_size=64, head_dim=32, max_position_embeddings=16)
    listed = np.tile(np.arange(17, dtype=np.int32), (4, 1)) + np.arange(4, dtype=np.int32)[:, None]
    rows = RowLoader(lambda stream, streams: ListedRows(listed), 4, 16)
    config = quiet_config(folder, **({"max_steps": 6, "polar_dtype": "float32"} | settings))
    return PretrainTrainer(NanoChatGPTForCausalLM(network), config, rows, evaluations=evaluations)


def test_log_counts_and_evaluations(tmp_path):
    seen = []

    def measure(model: NanoChatGPTForCausalLM, step: int) -> dict[str, float]:
        assert not model.training
        seen.append(step)
        return {"figure": float(step)}

    trainer = tiny_trainer(
        tmp_path,
        [Evaluation(measure, every_steps=4)],
        gradient_accumulation_steps=3,
        logging_steps=2,
        eval_on_start=True,
    )
    trainer.train()
    log = trainer.state.log_history
    lines = {line["step"]: line for line in log if "loss" in line}
    assert sorted(lines) == [1, 2, 4, 6]
    assert seen == [0, 4, 6] and [line["figure"] for line in log if "figure" in line] == [0.0, 4.0, 6.0]
    assert lines[6]["loss"] < lines[1]["loss"]
    assert trainer.batch_tokens == 3 * 4 * 16 and lines[6]["tokens"] == 6 * 192
    per_token = scaling.flops_per_token(trainer.model.config, 16)
    assert trainer.state.total_flos == per_token * 6 * 192
    expected = lines[4]["tokens_per_second"] * per_token / trainer.peak_flops_per_second
    assert lines[4]["mfu"] == pytest.approx(expected)
    assert "grad_norm" not in lines[6]


def test_rates_decay_and_schedules_reach_the_groups(tmp_path):
    trainer = tiny_trainer(tmp_path, matrix_lr=0.5, weight_decay=0.125, warmup_steps=3, max_steps=6)
    assert (trainer.args.warmdown_ratio, trainer.args.final_lr_frac) == (0.5, 0.0)  # the era's
    trainer.create_optimizer()
    trainer.create_scheduler(6)
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    scale = scaling.learning_rate_scale(trainer.batch_tokens)
    assert groups["matrices"]["initial_lr"] == pytest.approx(0.5 * scale)
    assert groups["matrices"]["lr"] == pytest.approx(0.5 * scale / 3)  # first of three steps of warmup
    assert groups["matrices"]["weight_decay"] == 0.125
    assert groups["x0_lambdas"]["initial_lr"] == pytest.approx(0.5 * scale)  # the era's


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_grad_norm": 1.0}, r"max_grad_norm=1.0, expected 0"),
        ({"activation_dtype": "float16"}, r"'float16', expected auto, bfloat16 or float32"),
        ({"optimizer_era": "launch"}, r"optimizer_era is 'launch', expected one of seed, head"),
        ({"max_steps": -1}, r"max_steps=-1, expected at least 1"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **settings)


def test_tables_in_bfloat16_learn(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=3)
    store_tables_in_bfloat16(trainer.model)
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    trainer.train()
    tables = [name for name, tensor in trainer.model.named_parameters() if tensor.dtype == torch.bfloat16]
    assert tables == ["model.embed_tokens.weight", "model.value_embeddings.1.weight"]
    assert all((trainer.model.get_parameter(name) != before[name]).any() for name in tables)


@pytest.mark.slow
def test_compiled_run_equals_eager(tmp_path, monkeypatch):
    """And a second compiled run on two threads equals the first to the bit."""
    losses, weights = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    for flag in (False, True, True):  # one after the other: Accelerate's choice of a compiler is global
        for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
            monkeypatch.delenv(name)
        trainer = tiny_trainer(tmp_path, torch_compile=flag, logging_steps=1)
        trainer.train()
        assert (type(trainer.model_wrapped).__name__ == "OptimizedModule") == flag
        losses.append(losses_of(trainer))
        weights.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    torch.set_num_threads(threads)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[1] == losses[2]
    assert all(torch.equal(tensor, weights[2][name]) for name, tensor in weights[1].items())


def test_compilation_is_for_long_runs(tmp_path):
    short, long = (tiny_trainer(tmp_path, torch_compile=None, max_steps=steps) for steps in (6, 10**7))
    assert (short.args.torch_compile, long.args.torch_compile) == (False, True)
