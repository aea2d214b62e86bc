"""A tiny chat model that knows three conversations by heart, one of them with the calculator."""

from pathlib import Path

import torch

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM, render_conversation
from modeling_nanochat.recipes.stages.folder import save_checkpoint
from modeling_nanochat.training.tokenizer import tokenizer_from_ranks

CONTEXT = 256
SUM, SUM_ANSWER = "What is 12 + 30?", "It is [12+30 = 42], I think."
COUNT, COUNT_ANSWER = "Count!", " ".join(f"{number:02}" for number in range(50))
HELLO, HELLO_ANSWER = "Hello", "Grüße, 日本 👍!"
CALL = [
    {"type": "text", "text": "It is "},
    {"type": "python", "text": "12+30"},
    {"type": "python_output", "text": "42"},
    {"type": "text", "text": ", I think."},
]


def make_tokenizer():
    """Bytes, and pairs of digits: 320 tokens."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    pairs = [f"{number:02}".encode() for number in range(55)]
    return tokenizer_from_ranks(ranks | {pair: 256 + i for i, pair in enumerate(pairs)})


def save_toy(folder: Path, depth: int = 2) -> Path:
    """Trains it (seconds) and writes its checkpoint."""
    tokenizer = make_tokenizer()
    conversations = [(SUM, CALL), (COUNT, COUNT_ANSWER), (HELLO, HELLO_ANSWER)]
    rows = [
        render_conversation(tokenizer, [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}])
        for asked, answer in conversations
    ]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in rows])
    mask = torch.tensor([row + [0] * (longest - len(row)) for _, row in rows])
    torch.manual_seed(0)
    config = NanoChatGPTConfig.from_depth(
        depth, head_dim=32, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT
    )
    model = NanoChatGPTForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(400):
        loss = model(ids, labels=ids.masked_fill(mask == 0, -100)).loss
        if loss < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02, f"the toy did not learn its conversations: loss {loss:.3f}"
    save_checkpoint(model, tokenizer, str(folder))
    return folder
