"""The benchmarks' baseline is the same function as our network: else its ratios would compare different work."""

import pytest
import torch

from benchmarks.plain_nanochat import PlainNanoChat, same_weights
from modeling_nanochat import NanoChatGPTConfig


@pytest.mark.parametrize("era", ["seed", "head"])
def test_plain_network_equals_ours(era):
    depth, vocabulary, context = 4, 96, 256
    config = NanoChatGPTConfig.from_depth(
        depth, vocab_size=vocabulary, head_dim=32, aspect_ratio=16, max_position_embeddings=context, era=era
    )
    torch.manual_seed(0)
    plain = PlainNanoChat(depth, config.hidden_size, config.num_attention_heads, vocabulary, context, era=era)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(vocabulary, (2, context + 1))
    ours = same_weights(plain, config).train()
    loss, expected = ours(ids[:, :-1], shift_labels=ids[:, 1:]).loss, plain(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(loss, ours.model.embed_tokens.weight)[0]]
    grads.append(torch.autograd.grad(expected, plain.embed.weight)[0])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)
