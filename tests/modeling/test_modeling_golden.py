"""Every era against numbers that upstream's own code computed: logits, losses, gradient norms, greedy tokens."""

import pytest
import torch

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from tests import golden_models
from tests.golden_models import ERA_OF_CASE

RENAMED = (
    ("transformer.wte", "model.embed_tokens"),
    ("transformer.h.", "model.layers."),
    ("attn.c_q", "self_attn.q_proj"),
    ("attn.c_k", "self_attn.k_proj"),
    ("attn.c_v", "self_attn.v_proj"),
    ("attn.c_proj", "self_attn.o_proj"),
    ("attn.ve_gate", "self_attn.value_gate"),
    ("mlp.c_fc", "mlp.up_proj"),
    ("mlp.c_proj", "mlp.down_proj"),
    ("value_embeds.", "model.value_embeddings."),
    ("smear_gate", "model.smear_gate"),
)


def our_name(name: str) -> str:
    if name.endswith("lambda") or name.endswith("lambdas"):
        return f"model.residual_scalars.{name}"
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name


def load_case(case: str) -> tuple[NanoChatGPTForCausalLM, dict, dict]:
    """The network with upstream's weights (vocabulary padding dropped), what upstream computed, and its report."""
    report = golden_models.report(case)
    shape = report["model_config"]
    config = NanoChatGPTConfig.from_depth(
        shape["n_layer"],
        vocab_size=shape["vocab_size"],
        head_dim=shape["n_embd"] // shape["n_head"],
        max_position_embeddings=shape["sequence_len"],
        era=ERA_OF_CASE[case],
        window_pattern=shape.get("window_pattern", "L"),
        hidden_size=shape["n_embd"],
        num_attention_heads=shape["n_head"],
        num_key_value_heads=shape["n_kv_head"],
    )
    model = NanoChatGPTForCausalLM(config)
    weights = golden_models.upstream_weights(case)
    expected_shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = {our_name(name): tensor for name, tensor in weights.items()}
    model.load_state_dict({name: tensor[: expected_shapes[name][0]] for name, tensor in weights.items()})
    return model, golden_models.expected(case), report


@pytest.fixture(scope="module", params=ERA_OF_CASE)
def case(request):
    return load_case(request.param)


def test_logits_and_losses(case):
    model, expected, report = case
    model.eval()
    targets = expected["targets"].masked_fill(expected["targets"] < 0, -100)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits[:, expected["positions"]]
        loss = model(expected["input_ids"], shift_labels=targets).loss
    assert (logits - expected["logits"]).abs().max() < 2e-4
    assert loss.item() == pytest.approx(report["loss"], abs=1e-5)
    losses = model.token_losses(expected["input_ids"], targets)
    assert (losses - expected["token_losses"]).abs().max() < 2e-4


def test_gradient_norms(case):
    model, expected, report = case
    model.train()
    model.zero_grad()
    targets = expected["targets"].masked_fill(expected["targets"] < 0, -100)
    model(expected["input_ids"], shift_labels=targets).loss.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms.keys() == {our_name(name) for name in report["grad_norms"]}
    for name, norm in report["grad_norms"].items():
        assert norms[our_name(name)] == pytest.approx(norm, rel=1e-3), name


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens(case, use_cache):
    model, expected, _ = case
    model.eval()
    tokens = model.generate(expected["greedy"][:, :9], max_new_tokens=24, do_sample=False, use_cache=use_cache)
    assert torch.equal(tokens, expected["greedy"])
