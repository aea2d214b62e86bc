"""The metrics for the library `evaluate`: loaded from their folders, offline, and equal to our own numbers."""

from pathlib import Path

import evaluate
import pytest
import torch

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.eval.bits_per_byte import TextLoss, documents_loss
from modeling_nanochat.eval.intervals import summarize_passes
from modeling_nanochat.recipes.stages.folder import save_checkpoint
from tests.toys import digit_tokenizer

METRICS = Path(__file__).parents[2] / "eval" / "metrics"


def test_pass_at_k_is_ours():
    metric = evaluate.load(str(METRICS / "pass_at_k"))
    found = metric.compute(predictions=[[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]], k=[1, 2, 4])
    expected = summarize_passes([2, 1, 0], 4, (1, 2, 4))
    assert found == {name: vars(interval) for name, interval in expected.items()}
    with pytest.raises(ValueError, match="same number for each"):
        metric.compute(predictions=[[1, 0], [1]], k=[1])
    with pytest.raises(ValueError, match=r"k is \[3\]"):
        metric.compute(predictions=[[1, 0], [1, 1]], k=[3])


def test_bits_per_byte_is_ours(tmp_path):
    tokenizer = digit_tokenizer()
    torch.manual_seed(0)
    config = NanoChatGPTConfig.from_depth(1, vocab_size=320, head_dim=32, max_position_embeddings=32)
    model = NanoChatGPTForCausalLM(config).eval()
    save_checkpoint(model, tokenizer, str(tmp_path / "model"))
    texts = ["a text of some length, longer than the context", "é"]
    found = evaluate.load(str(METRICS / "bits_per_byte")).compute(predictions=texts, model=str(tmp_path / "model"))
    loss = TextLoss.total(documents_loss(model, tokenizer, texts))
    assert found == {"bits_per_byte": pytest.approx(loss.bits_per_byte), "bytes": sum(len(t.encode()) for t in texts)}
