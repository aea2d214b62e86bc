"""The micro-batch is what a device holds, by formula and by trying; memory is made scarce by a forward that refuses."""

from dataclasses import fields

import pytest
import torch
from transformers import TrainingArguments

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.block_attention import block_attention
from modeling_nanochat.training.memory import (
    is_checkpointed,
    kept_probabilities,
    memory_per_device,
    planned_rows,
    rows_that_fit,
    rows_that_run,
)

CONFIG = NanoChatGPTConfig.from_depth(1, vocab_size=64, head_dim=32, max_position_embeddings=16)


def test_planned_rows_are_the_most_that_fit():
    config = NanoChatGPTConfig.from_depth(20)
    run = {"batch_tokens": 2**19, "sequence_length": 2048, "world_size": 8, "dtype": torch.bfloat16}
    assert planned_rows(config, memory_bytes=76 * 10**9, **run) == 32  # upstream's for 80 GB
    assert planned_rows(config, memory_bytes=40 * 10**9, **run) == 8
    assert planned_rows(config, memory_bytes=10**15, **run) == 32  # no accumulation left
    with pytest.raises(ValueError, match=r"one row of 2048 tokens needs about 10\.5 GB of a device's 2\.0 GB"):
        planned_rows(config, memory_bytes=2 * 10**9, **run)
    one, eight = (memory_per_device(config, 8, 2048, ranks, torch.bfloat16) for ranks in (1, 8))
    assert eight.pop("optimizer state") == one.pop("optimizer state") // 8
    assert one == eight


def test_checkpointing_leaves_room_for_more_rows():
    """Of 24 layers the inputs and one whole layer are kept: upstream's depth with four times its context."""
    config = NanoChatGPTConfig.from_depth(24, max_position_embeddings=8192)
    run = {"batch_tokens": 2**20, "sequence_length": 8192, "world_size": 8, "memory_bytes": 76 * 10**9}
    rows = [planned_rows(config, dtype=torch.bfloat16, checkpointed=each, **run) for each in (False, True)]
    assert rows == [4, 16]
    needed = [memory_per_device(config, 4, 8192, 8, torch.bfloat16, checkpointed=each) for each in (False, True)]
    kept, inputs = (each["activations"] for each in needed)
    assert kept / 10 < inputs < kept / 4
    with pytest.raises(ValueError, match=r"expected a smaller depth, more devices, checkpointing \(--activation_ch"):
        planned_rows(config, dtype=torch.bfloat16, **run | {"memory_bytes": 2 * 10**9})


@pytest.mark.parametrize(
    "name",
    sorted({"activation_checkpointing", "gradient_checkpointing"} & {each.name for each in fields(TrainingArguments)}),
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
def test_settings_that_checkpoint(name, tmp_path):
    def of(**settings):
        return is_checkpointed(TrainingArguments(str(tmp_path), **settings))

    assert not of() and of(**{name: True})
    assert not of(**{name: True, f"{name}_kwargs": {"every_n_layers": 2}})  # the others keep all of theirs


@pytest.mark.parametrize("pattern", ["L", "SSSL"])
@pytest.mark.parametrize("length", [512, 1024])
def test_kept_probabilities_are_those_that_block_attention_keeps(pattern, length):
    config = NanoChatGPTConfig.from_depth(
        4, vocab_size=64, head_dim=32, max_position_embeddings=length, window_pattern=pattern
    )
    kept = 0
    for kind in config.layer_types:
        window = config.sliding_window if "sliding" in kind else length
        query = torch.zeros(1, config.num_attention_heads, length, config.head_dim)
        kept += block_attention(query, query, query, window, True)[1].numel()
    assert kept_probabilities(config, length) * length == pytest.approx(kept, rel=0.25)  # it keeps whole blocks


def test_full_layers_of_long_rows_keep_none():
    config = NanoChatGPTConfig.from_depth(4, vocab_size=64, head_dim=32, max_position_embeddings=8, window_pattern="L")
    assert kept_probabilities(config, 2048) > 0 == kept_probabilities(config, 4096)


def test_a_cpu_counts_the_whole_process():
    config = NanoChatGPTConfig.from_depth(4, vocab_size=8192, head_dim=64, max_position_embeddings=512)
    cpu, gpu = (memory_per_device(config, 8, 512, 1, torch.float32, device) for device in ("cpu", "cuda"))
    assert cpu["libraries"] > 5e8 and not gpu["libraries"]
    assert cpu["weights"] == gpu["weights"] and cpu["activations"] > 1.8 * gpu["activations"]
    # 1,231 to 1,365 MiB at peak were measured for this shape (benchmarks/memory.py)
    assert 1231 / 1.2 < sum(cpu.values()) / 2**20 < 1.2 * 1365


def test_rows_on_a_cpu_are_no_more_than_make_it_faster():
    run = {"batch_tokens": 2**19, "world_size": 1, "device": torch.device("cpu"), "dtype": torch.float32}
    rows = {length: rows_that_fit(CONFIG, sequence_length=length, **run) for length in (16, 1024, 2**14)}
    assert rows == {16: 256, 1024: 4, 2**14: 1}


@pytest.fixture
def scarce(monkeypatch):
    """A device that holds three rows; gives the list of rows that were tried, negative if with checkpointing."""
    tried, forward = [], NanoChatGPTForCausalLM.forward

    def refuse(self, input_ids, **kwargs):
        tried.append(
            -len(input_ids) if any(layer.gradient_checkpointing for layer in self.model.layers) else len(input_ids)
        )
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(NanoChatGPTForCausalLM, "forward", refuse)
    return tried


def test_halves_until_it_fits(scarce):
    assert rows_that_run(CONFIG, 16, 16, torch.device("cpu"), torch.float32, 1000) == 2
    assert scarce == [16, 8, 4, 2]
    assert rows_that_run(CONFIG, 4, 16, torch.device("cpu"), torch.float32, 1000, checkpointed=True) == 2
    assert scarce[4:] == [-4, -2]


def test_says_so_if_nothing_fits(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(NanoChatGPTForCausalLM, "forward", refuse)
    with pytest.raises(ValueError, match="cpu ran out of memory with a single row of 16 tokens"):
        rows_that_run(CONFIG, 2, 16, torch.device("cpu"), torch.float32, 0)
