"""Muon for any network: how its parameters are sorted, what a step does to them, and the one line in stock trainers."""

import math

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification, Trainer, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from modeling_nanochat.training.muon import muon, muon_optimizer
from modeling_nanochat.training.optimizer.sorting import MATRIX, sort_parameters
from modeling_nanochat.training.optimizer.updates import POLAR_EXPRESS_COEFFICIENTS
from tests.training.toy_networks import CONTEXT, HEADS, HIDDEN, NETWORKS, VOCABULARY, WIDTH, build, obvious_matrices

RATES = {"lr": 0.02, "adamw_lr": 3e-3}
ALL = list(NETWORKS)


def kinds_of(model: torch.nn.Module, **options) -> dict[str, str]:
    return {each.name: each.kind for each in sort_parameters(model, **options)}


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_has_one_place(name):
    model = build(name)
    found = sort_parameters(model)
    assert [id(each.parameter) for each in found] == [id(parameter) for parameter in model.parameters()]
    groups = muon_optimizer(model, **RATES).param_groups
    taken = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(taken) == sorted(id(parameter) for parameter in model.parameters())
    blocks = {each.name for each in found if each.kind == MATRIX}
    share = sum(each.parameter.numel() for each in found if each.name in blocks) / sum(
        each.parameter.numel() for each in found if each.parameter.ndim > 1 and "embed" not in each.name
    )
    assert share > (0.4 if name == "mamba" else 0.7)


def test_kinds_of_a_llama_a_mixture_and_an_encoder():
    kinds = kinds_of(build("mixtral"))
    layer = "model.layers.1."
    expected = {
        "model.embed_tokens.weight": "embedding", "lm_head.weight": "head", "model.norm.weight": "vector",
        f"{layer}self_attn.q_proj.weight": MATRIX, f"{layer}mlp.experts.gate_up_proj": MATRIX,
        f"{layer}mlp.experts.down_proj": MATRIX, f"{layer}mlp.gate.weight": "router",
    }  # fmt: skip
    assert {name: kinds[name] for name in expected} == expected
    assert kinds_of(build("gemma"))["model.embed_tokens.weight"] == "tied"
    kinds = kinds_of(BertForSequenceClassification(build("bert").config))
    assert kinds["bert.embeddings.position_embeddings.weight"] == "embedding"
    assert kinds["bert.encoder.layer.0.attention.self.query.weight"] == MATRIX
    assert kinds["bert.pooler.dense.weight"] == kinds["classifier.weight"] == "outside"


def test_what_is_unsure_is_said(capsys):
    muon_optimizer(build("mamba"), **RATES)
    printed = capsys.readouterr().out
    assert "backbone.layers.0.mixer.in_proj.weight" in printed and "looks like several matrices in one" in printed
    assert "backbone.layers.0.mixer.A_log" in printed and "belongs to no linear layer" in printed
    assert "convolutions" in printed


def test_an_override_decides():
    model = build("mamba")
    kinds = kinds_of(model, overrides={r"in_proj": "muon", r"layers\.0\.mixer\.out_proj": "adamw"})
    assert kinds["backbone.layers.1.mixer.in_proj.weight"] == MATRIX == kinds["backbone.layers.1.mixer.out_proj.weight"]
    assert kinds["backbone.layers.0.mixer.out_proj.weight"] == "unknown"
    with pytest.raises(ValueError, match="qkv fit the name of no parameter"):
        sort_parameters(model, {"qkv": "muon"})
    with pytest.raises(ValueError, match="'sgd', expected 'muon' or 'adamw'"):
        sort_parameters(model, {"in_proj": "sgd"})
    with pytest.raises(ValueError, match=r"conv1d.weight of shape \(64, 1, 4\) is no matrix"):
        sort_parameters(model, {"conv1d": "muon"})


def test_frozen_parameters_and_adapters(capsys):
    model = build("llama")
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    assert not any("layers.0." in name for name in kinds_of(model))
    adapted = get_peft_model(build("phi3"), LoraConfig(r=2, target_modules=["qkv_proj"], modules_to_save=["lm_head"]))
    assert set(kinds_of(adapted).values()) == {"adapter"}
    muon_optimizer(adapted, **RATES)
    assert "only adapters are trained" in capsys.readouterr().out
    adapted.requires_grad_(True)  # adapters and the layers under them
    (split,) = {each.split for each in sort_parameters(adapted) if "qkv_proj.base_layer" in each.name}
    assert split.parts == (32, 16, 16)


def test_no_matrix_is_an_error():
    flat = torch.nn.Module()
    flat.weight = torch.nn.Parameter(torch.zeros(100))  # as FSDP1 leaves it
    with pytest.raises(ValueError, match="no matrix in the blocks"):
        muon_optimizer(flat, **RATES)
    with pytest.raises(ValueError, match=r"lr=-1, adamw_lr=0\.1; expected two rates"):
        muon(lr=-1, adamw_lr=0.1)


def test_processes_that_do_not_know_one_another_are_an_error(monkeypatch):
    """As torchrun starts them on a machine without GPUs, where a Trainer must be told to use the CPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were launched, .* TrainingArguments\(use_cpu=True\)"):
        muon_optimizer(build("llama"), **RATES)


# ---------------------------------------------------------------- fused tensors are split as the network splits them


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3"])
def test_queries_keys_and_values_are_what_attention_gets(name):
    """Values as they are; queries and keys may have been rotated, which leaves the norm of each head."""
    seen = {}

    def record(module, query, key, value, attention_mask, **kwargs):
        seen.update(query=query, key=key, value=value)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    model = build(name).eval()
    ALL_ATTENTION_FUNCTIONS.register("record", record)
    model.config._attn_implementation = "record"
    fused = [each for each in sort_parameters(model) if each.split.parts and len(each.split.parts) == 3][-1]
    layer = model.get_submodule(fused.name.rpartition(".")[0])
    inputs = {}
    layer.register_forward_pre_hook(lambda _, given: inputs.update(x=given[0]))
    model(input_ids=torch.arange(CONTEXT)[None])
    bias = torch.zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
    stored = fused.split._replace(transposed=False)
    biases = stored.take_apart(bias[None, :, None])
    for matrix, part_bias, of in zip(fused.split.take_apart(layer.weight[None]), biases, ("query", "key", "value")):
        expected = (inputs["x"] @ matrix[0].T + part_bias[0, :, 0]).view(1, CONTEXT, -1, WIDTH).transpose(1, 2)
        got = seen[of]
        if of != "value":
            expected, got = expected.norm(dim=-1), got.norm(dim=-1)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", [{"new_decoder_architecture": True, "num_kv_heads": 2}, {"multi_query": True}, {}])
def test_falcons_three_ways(kind):
    config_class, model_class, settings = NETWORKS["falcon"]
    settings = settings | {"new_decoder_architecture": False, "multi_query": False} | kind
    model = model_class(config_class(**settings))
    (fused, *_) = [each for each in sort_parameters(model) if "query_key_value" in each.name]
    attention = model.transformer.h[0].self_attention
    x = torch.randn(3, HIDDEN)
    query, key, value = attention._split_heads((x @ fused.parameter.T)[None])  # (1, 3, heads, D)
    matrices = [x @ matrix[0].T for matrix in fused.split.take_apart(fused.parameter[None])]
    torch.testing.assert_close(query.flatten(2)[0], matrices[0])
    for whole, part in ((key, matrices[1]), (value, matrices[2])):
        whole = whole.expand(1, 3, max(whole.shape[2], 1), WIDTH)[0]
        repeated = part.view(3, -1, WIDTH).repeat_interleave(whole.shape[1] // (part.shape[1] // WIDTH), dim=1)
        torch.testing.assert_close(whole, repeated)


# ---------------------------------------------------------------- a step, against a slow twin


def slow_muon_step(weight, grad, state: dict, lr: float, momentum: float, decay: float) -> torch.Tensor:
    """One matrix (m, n), in float64, by singular values and loops."""
    m, n = weight.shape
    state["momentum"] = momentum * state.get("momentum", torch.zeros(m, n).double()) + (1 - momentum) * grad
    u, values, v = torch.linalg.svd((1 - momentum) * grad + momentum * state["momentum"], full_matrices=False)
    values = values / (1.02 * values.norm())
    for a, b, c in POLAR_EXPRESS_COEFFICIENTS:
        values = a * values + b * values**3 + c * values**5
    update = u @ torch.diag(values) @ v
    lines = update if m >= n else update.T  # rows, or columns of a wide matrix
    means = state.setdefault("second_moment", [torch.tensor(0.0).double()] * len(lines))
    for i, line in enumerate(lines):
        means[i] = 0.95 * means[i] + 0.05 * (line**2).mean()
    scaled = torch.stack([line / mean.sqrt() for line, mean in zip(lines, means)])
    scaled = scaled * update.norm() / scaled.norm()
    update = scaled if m >= n else scaled.T
    agrees = (update * weight >= 0).double()
    return weight - lr * math.sqrt(max(1, m / n)) * (update + decay * agrees * weight)


@pytest.mark.parametrize("name", ALL)
def test_steps_equal_a_slow_twins(name):
    model, twin = build(name), build(name).double()
    optimizer = muon_optimizer(model, **RATES, weight_decay=0.1)
    for group in optimizer.param_groups:
        if group["use_muon"]:
            group["polar_dtype"] = "float32"
    kinds = kinds_of(model)
    rest = {kind: [p for n, p in twin.named_parameters() if kinds[n] != MATRIX and (kinds[n] == "vector") == kind]
            for kind in (True, False)}  # fmt: skip
    adamw = torch.optim.AdamW(
        [{"params": rest[True], "weight_decay": 0.0}, {"params": rest[False], "weight_decay": 0.1}],
        lr=RATES["adamw_lr"], betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    states: dict = {}
    before = {n: p.detach().clone() for n, p in twin.named_parameters()}
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for (n, mine), theirs in zip(model.named_parameters(), twin.parameters()):
            mine.grad = torch.randn(mine.shape, generator=generator)
            theirs.grad = mine.grad.double()
            if kinds[n] == MATRIX:
                flat, grad = theirs.data.flatten(), theirs.grad.flatten()
                for i, places in enumerate(obvious_matrices(name, n, mine.shape)):
                    state = states.setdefault((n, i), {})
                    flat[places] = slow_muon_step(flat[places], grad[places], state, RATES["lr"], 0.95, 0.1)
                theirs.data = flat.view(mine.shape)
        optimizer.step()
        adamw.step()
    for (n, mine), theirs in zip(model.named_parameters(), twin.parameters()):
        moved = (theirs - before[n]).norm()
        assert moved > 0 and (mine - theirs).norm() < 2e-3 * moved, n  # float32 squares small singular values


# ---------------------------------------------------------------- in the stock Trainer


def rows(name: str, count: int = 8) -> Dataset:
    """Rows that count upwards from somewhere, some with a step of two: easy to learn."""
    made = []
    for i in range(count):
        ids = [(5 * i + (1 + i % 2) * place) % (VOCABULARY - 1) + 1 for place in range(CONTEXT)]
        made.append({"input_ids": ids, "labels": ids})
    return Dataset.from_list(made)


def stock_trainer(name: str, folder, steps: int = 4, batch: int = 8, **settings) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=batch, use_cpu=True, report_to="none",
        logging_steps=1, save_strategy="steps", save_steps=steps // 2, disable_tqdm=True, weight_decay=7.0, **settings,
    )  # fmt: skip
    if arguments.fsdp:  # accelerate shards on accelerators only: let these processes pass for some
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_NPU
    return Trainer(build(name), arguments, train_dataset=rows(name), optimizer_cls_and_kwargs=muon(**RATES))


@pytest.mark.parametrize("name", ALL)
def test_a_stock_trainer_learns_saves_and_resumes(name, tmp_path):
    straight = stock_trainer(name, tmp_path)
    straight.train()
    losses = [line["loss"] for line in straight.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    resumed = stock_trainer(name, tmp_path)
    checkpoint = str(tmp_path / "checkpoint-2")
    # The Trainer itself misses weights that a checkpoint names otherwise than the class does (GPT-NeoX's head).
    resumed.model.load_state_dict(type(resumed.model).from_pretrained(checkpoint, dtype=torch.float32).state_dict())
    resumed.train(resume_from_checkpoint=checkpoint)
    for mine, expected in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, expected)


def test_gpt2_has_the_layers_that_the_split_is_for():
    """If a coming version stores them otherwise, the table of fused layers must follow."""
    attention = build("gpt2").transformer.h[0].attn
    assert isinstance(attention.c_attn, Conv1D) and attention.c_attn.weight.shape == (HIDDEN, 3 * HIDDEN)
    assert build("gpt_neox").gpt_neox.layers[0].attention.query_key_value.weight.shape == (3 * HEADS * WIDTH, HIDDEN)
