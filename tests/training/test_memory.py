"""The micro-batch is what a device holds, by formula and by trying; memory is made scarce by a forward that refuses."""

import pytest
import torch

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.training.memory import memory_per_device, planned_rows, rows_that_fit, rows_that_run

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


def test_rows_on_a_cpu_are_no_more_than_make_it_faster():
    run = {"batch_tokens": 2**19, "world_size": 1, "device": torch.device("cpu"), "dtype": torch.float32}
    rows = {length: rows_that_fit(CONFIG, sequence_length=length, **run) for length in (16, 1024, 2**14)}
    assert rows == {16: 256, 1024: 4, 2**14: 1}


@pytest.fixture
def scarce(monkeypatch):
    """A device that holds three rows; gives the list of rows that were tried."""
    tried, forward = [], NanoChatGPTForCausalLM.forward

    def refuse(self, input_ids, **kwargs):
        tried.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(NanoChatGPTForCausalLM, "forward", refuse)
    return tried


def test_halves_until_it_fits(scarce):
    assert rows_that_run(CONFIG, 16, 16, torch.device("cpu"), torch.float32, 1000) == 2
    assert scarce == [16, 8, 4, 2]


def test_says_so_if_nothing_fits(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(NanoChatGPTForCausalLM, "forward", refuse)
    with pytest.raises(ValueError, match="cpu ran out of memory with a single row of 16 tokens"):
        rows_that_run(CONFIG, 2, 16, torch.device("cpu"), torch.float32, 0)
