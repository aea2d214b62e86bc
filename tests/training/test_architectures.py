"""Stock architectures from the depth dial: shapes, counts, groups, and a training step equal to the class's own."""

import pytest
import torch
from torch.nn import functional as F

from modeling_nanochat import NanoChatGPTConfig
from modeling_nanochat.training import memory, scaling
from modeling_nanochat.training.architectures import ARCHITECTURES, fresh_network, run_activations_in, stock_config
from modeling_nanochat.training.optimizer.groups import build_param_groups
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.trainers.reinforce import ReinforceTrainer
from modeling_nanochat.training.trainers.sft import NanoChatSFTConfig, NanoChatSFTTrainer
from tests.training.test_sft import LENGTH, conversations, make_tokenizer

TINY = {"vocab_size": 320, "head_dim": 16, "aspect_ratio": 16, "max_position_embeddings": 64}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_counts_equal_the_real_model(architecture):
    config = stock_config(architecture, 2, **TINY)
    sizes = {name: parameter.numel() for name, parameter in fresh_network(config).named_parameters()}
    counts = scaling.count_parameters(config)
    assert counts.total == sum(sizes.values())
    assert counts.token_embedding == counts.head == 320 * 32
    assert counts.matrices == sum(size for name, size in sizes.items() if ".layers." in name and "norm" not in name)
    assert scaling.flops_per_token(config) == 6 * counts.scaling + 12 * 32 * 2 * 64


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_dial_means_the_same_as_for_nanochat(architecture):
    stock, ours = stock_config(architecture, 12, vocab_size=32768), NanoChatGPTConfig.from_depth(12)
    assert (stock.hidden_size, stock.num_hidden_layers, stock.num_attention_heads) == (768, 12, 6)
    counts = [scaling.count_parameters(config) for config in (stock, ours)]
    assert counts[0].matrices == pytest.approx(counts[1].matrices, rel=0.01)
    plans = [scaling.plan_training(config) for config in (stock, ours)]
    assert plans[0].weight_decay == pytest.approx(0.2) == plans[1].weight_decay
    assert plans[0].steps == pytest.approx(plans[1].steps, rel=0.01)


@pytest.mark.parametrize("era", ["seed", "head"])
def test_groups_of_a_stock_network(era):
    model = fresh_network(stock_config("qwen3", 2, **TINY))
    groups = build_param_groups(model, era=era, batch_tokens=2**19, weight_decay=0.3, polar_dtype="float32")
    taken = [parameter for group in groups for parameter in group["params"]]
    assert len(taken) == len(set(taken)) == len(list(model.parameters()))
    named = {group["name"]: group for group in groups}
    assert named["matrix"]["use_muon"] and named["matrix"]["lr"] == 0.02 and named["matrix"]["weight_decay"] == 0.3
    assert len(named["matrix"]["params"]) == 2 * 7
    width = (32 / 768) ** -0.5
    assert named["embedding"]["lr"] == pytest.approx(0.3 * width * 0.02)
    assert named["head"]["lr"] == pytest.approx({"seed": 0.004, "head": 0.008}[era] * width)
    assert named["vector"]["lr"] == pytest.approx(0.5 * 0.01)
    MuonAdamW(groups)


def test_what_there_is_not_is_named():
    with pytest.raises(ValueError, match="architecture is 'gpt5', expected nanochat or one of llama, qwen3"):
        stock_config("gpt5", 2, vocab_size=64)
    with pytest.raises(ValueError, match="depth is 0"):
        stock_config("llama", 0, vocab_size=64)


def test_memory_counts_the_logits_that_a_stock_network_makes():
    small, large = (stock_config("llama", 2, **(TINY | {"vocab_size": size})) for size in (320, 3200))
    needed = [memory.memory_per_device(config, 4, 64, 1, torch.float32)["loss"] for config in (small, large)]
    assert needed[0] == 3 * 4 * 4 * 64 * 320 + 4 * 320 * 32 and needed[1] == 10 * needed[0]  # of a GPU


def test_activations_in_bfloat16_over_float32_weights():
    """Under autocast, for training and evaluation alike."""
    model = fresh_network(stock_config("qwen3", 1, **TINY))
    ids = torch.arange(16)[None]
    expected = model(ids).logits
    run_activations_in(model, torch.bfloat16, torch.device("cpu"))
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16 and model.lm_head.weight.grad.dtype == torch.float32
    assert 0 < (outputs.logits - expected).norm() < 0.02 * expected.norm()
    assert outputs.loss.item() == pytest.approx(F.cross_entropy(expected[0, :-1], ids[0, 1:]).item(), rel=1e-2)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_stock_network_is_fine_tuned_on_conversations(tmp_path, lora_rank):
    """With the same rendering, packing and optimizer; the loss is the mean over the tokens that carry it."""
    tokenizer = make_tokenizer()
    model = fresh_network(stock_config("qwen3", 2, **(TINY | {"max_position_embeddings": LENGTH})))
    config = NanoChatSFTConfig(
        str(tmp_path), per_device_train_batch_size=4, max_steps=6, use_cpu=True, disable_tqdm=True, lora_rank=lora_rank,
        activation_dtype="float32", polar_dtype="float32", lora_lr=0.02,
    )  # fmt: skip
    rows = [{"messages": messages} for messages in conversations(64)]
    trainer = NanoChatSFTTrainer(model, config, rows, rows[:8], processing_class=tokenizer)
    before = trainer.evaluate()["eval_loss"]
    ids, labels = (torch.tensor(trainer.eval_dataset[:][name]) for name in ("input_ids", "labels"))
    assert trainer.model(ids, labels=labels).loss.item() == pytest.approx(before)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1


def test_reinforcement_says_that_it_needs_a_nanochat_network():
    with pytest.raises(ValueError, match="reinforcement got a network of type 'qwen3', expected nanochat's own"):
        ReinforceTrainer(
            fresh_network(stock_config("qwen3", 1, **TINY)), None, [], rewards={}, summarize=None, processing_class=None
        )
