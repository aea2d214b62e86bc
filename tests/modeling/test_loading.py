"""A checkpoint loaded in other ways than whole: offloaded, shared by ranks, with another's attention."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch.fx.experimental.meta_tracer import MetaTracer
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from modeling_nanochat.decoder_layer import NanoChatGPTRMSNorm
from tests.toys import whole_model

ROOT = Path(__file__).parents[2]
ERAS = ("seed", "head")


@pytest.fixture(scope="module", params=ERAS)
def checkpoint(request, tmp_path_factory):
    """(folder, model, token ids, logits)"""
    folder = tmp_path_factory.mktemp("loading") / request.param
    model = whole_model(request.param)
    model.save_pretrained(folder)
    input_ids = torch.randint(320, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return folder, model, input_ids, model(input_ids).logits


def test_offloading_to_disk(checkpoint, tmp_path):
    folder, model, input_ids, expected = checkpoint
    inside = {f"model.{name}": "disk" for name, _ in model.model.named_children()}
    device_map = inside | {"lm_head": "disk", "model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    assert offloaded.model.residual_scalars.resid_lambdas.is_meta and offloaded.lm_head.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(offloaded(input_ids).logits, expected)


def attend_alone(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    """An attention function as vLLM registers it: no mask and no cache; what attends is found by the layer's number.

    query (1, H, T, D), key and value (1, H_kv, T, D) -> (T, H * D)
    """
    assert attention_mask is None
    query, key, value = (x.transpose(1, 2)[0] for x in (query, key, value))  # (T, heads, D)
    return attention_instances[module.layer_idx](query, key, value, scaling).flatten(1), None


def packed_attention(lengths: list[int], window: int | None):
    """The attention of one layer for sequences packed into one row."""

    def attend(query, key, value, scaling):
        outputs = []
        for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths)):
            distance = torch.arange(len(q)).unsqueeze(1) - torch.arange(len(q))
            seen = (distance >= 0) & (distance < (window or len(q)))
            heads = (x.transpose(0, 1) for x in (q, k, v))  # (heads, t, D)
            output = F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scaling, enable_gqa=True)
            outputs.append(output.transpose(0, 1))
        return torch.cat(outputs)

    return attend


def test_what_the_vllm_backend_asks_of_a_model(checkpoint):
    """Its steps, with a stand-in for its attention: build without memory, load by name, run packed sequences."""
    folder, _, input_ids, _ = checkpoint
    AttentionInterface.register("stand_in_for_vllm", attend_alone)
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config, attn_implementation="stand_in_for_vllm")
    assert model._supports_attention_backend
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert type(module) is torch.nn.Linear and module.bias is None
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items() if "lm_head" not in name},
                          assign=True)  # fmt: skip
    windows = [config.sliding_window if "sliding" in kind else None for kind in config.layer_types]
    lengths = [12, 9]
    arguments = {
        "input_ids": input_ids[:1],
        "inputs_embeds": None,
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        "attention_instances": {i: packed_attention(lengths, window) for i, window in enumerate(windows)},
        "use_cache": False,
        "return_dict": False,
    }
    if config.smear_channels:
        with pytest.raises(ValueError, match="smear_channels is 24"):
            model(**arguments)
        return
    with torch.no_grad():
        hidden = model(**arguments)[0][0]  # (T, C)
        logits = config.final_logit_softcapping * torch.tanh(
            hidden @ weights["lm_head.weight"].T / config.final_logit_softcapping
        )
        alone = AutoModelForCausalLM.from_pretrained(folder)
        expected = torch.cat([alone(part.unsqueeze(0)).logits[0] for part in input_ids[0].split(lengths)])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


class WholeModulesTracer(MetaTracer):
    """Records a module's own forward: its children are single calls; shapes come from tensors without memory. As for
    vLLM, a forward's `**kwargs` are empty, which fx asks by their keys."""

    def is_leaf_module(self, module, name):
        return True

    def iter(self, obj):
        return iter(()) if obj.node.target == "keys" else super().iter(obj)


@torch.fx.wrap
def recorded_attention(query: torch.Tensor) -> torch.Tensor:
    """Stands for the kernel in a trace: (B, H, T, D) -> (B, T, H, D)."""
    return query.transpose(1, 2)


@pytest.mark.filterwarnings("ignore:Could not compute metadata")  # of cosines and sines, given without a shape
@pytest.mark.parametrize("era", ERAS)
def test_vllm_can_trace_what_it_fuses(era, monkeypatch):
    """It looks at modules by torch.fx before it merges or replaces what is in them: the three projections of an
    attention read the same input, its trace goes through to the end, and norms are modules of one input."""
    model = whole_model(era).to("meta")
    attention, config = model.model.layers[1].self_attn, model.config  # of a layer with a value embedding
    monkeypatch.setattr(AttentionInterface, "get_interface", lambda *_: lambda _, query, *__, **___: (
        recorded_attention(query), None))  # fmt: skip
    inputs = {
        "hidden_states": torch.empty(1, 8, config.hidden_size, device="meta"),
        "value_embedding": torch.empty(1, 8, config.num_key_value_heads * config.head_dim, device="meta"),
    }
    absent = {"past_key_values": None, "attention_mask": None}  # vLLM gives neither
    graph = WholeModulesTracer().trace(attention, inputs, absent)
    given = next(iter(graph.nodes))
    called = {node.target: node for node in graph.nodes if node.op == "call_module"}
    assert called.keys() == {"q_proj", "k_proj", "v_proj", "value_gate", "q_norm", "k_norm", "o_proj"}
    assert all(called[name].args == (given,) and not called[name].kwargs for name in ("q_proj", "k_proj", "v_proj"))
    assert [node.op for node in graph.nodes][-1] == "output"

    norms = [each for each in model.modules() if isinstance(each, NanoChatGPTRMSNorm)]
    assert len(norms) == 2 + 4 * config.num_hidden_layers
    for norm in norms:
        graph = WholeModulesTracer().trace(norm, {"x": inputs["hidden_states"]})
        operation, output = list(graph.nodes)[-2:]
        assert operation.target is F.rms_norm and operation.args[0].op == "placeholder"
        assert output.args == (operation,)
    assert not hasattr(model.model.norm, "weight")


def compare_ranks_with_one(folder: str) -> None:
    """Run by each of two ranks: logits, generated tokens and gradients equal those of the network in one process."""
    shared = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    assert dist.get_world_size() == 2
    alone = AutoModelForCausalLM.from_pretrained(folder)
    assert shared.model.layers[1].self_attn.q_proj.weight.to_local().shape == (128, 256)  # half of the rows
    input_ids = torch.randint(320, (2, 21), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(input_ids)
    with torch.no_grad():
        torch.testing.assert_close(shared(input_ids).logits, alone(input_ids).logits, atol=1e-4, rtol=1e-4)
    answers = [model.generate(input_ids, attention_mask=mask, max_new_tokens=8) for model in (shared, alone)]
    assert answers[0].equal(answers[1])
    for model in (shared, alone):
        model.train()(input_ids, labels=input_ids).loss.backward()
    for (name, parameter), (_, expected) in zip(shared.named_parameters(), alone.named_parameters()):
        gradient = parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        error = (gradient - expected.grad).norm() / expected.grad.norm()
        assert error < 1e-3, f"the gradient of {name} is off by {error:.1e}"


@pytest.mark.slow
def test_tensor_parallelism(tmp_path):
    folders = [str(tmp_path / era) for era in ERAS]
    for era, folder in zip(ERAS, folders):
        whole_model(era).save_pretrained(folder)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    run = subprocess.run(
        [*command, *folders], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=1200
    )
    assert run.returncode == 0, run.stdout + run.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    for checkpoint_folder in sys.argv[1:]:
        compare_ranks_with_one(checkpoint_folder)
    dist.destroy_process_group()
