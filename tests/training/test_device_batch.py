"""The micro-batch is what a device holds, found by trying; memory is made scarce here by a forward that refuses."""

import pytest
import torch

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.training.memory import rows_that_fit

CONFIG = NanoChatGPTConfig.from_depth(1, vocab_size=64, head_dim=32, max_position_embeddings=16)


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
    assert rows_that_fit(CONFIG, 16, 16, torch.device("cpu"), torch.float32, 1000) == 2
    assert scarce == [16, 8, 4, 2]


def test_says_so_if_nothing_fits(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(NanoChatGPTForCausalLM, "forward", refuse)
    with pytest.raises(ValueError, match="cpu ran out of memory with a single row of 16 tokens"):
        rows_that_fit(CONFIG, 2, 16, torch.device("cpu"), torch.float32, 0)
