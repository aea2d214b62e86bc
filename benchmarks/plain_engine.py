"""The baseline of decoding: what upstream's engine does, on the plain network of `plain_nanochat.py`.

    cache = room for the prompt; logits = network(prompt, cache)            # one row
    cache = room for prompt and answer, the prompt's states copied to every row
    for each new token:
        draw a token for every row; hand the tokens to Python, row by row
        logits = network(tokens, cache)

Keys and values are written in place into tensors (B, T, H, D) that are made once for the whole answer; a window is a
slice of them; weights are float32 and cast to the dtype of the activations for each token, tables of embeddings once.
Left out is what would make it slower and is not decoding: its state machine for the calculator, and its question to
the device where each layer's cache ends.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plain_nanochat import PlainNanoChat, rms, rotate


class Cache:
    """Keys and values (layers, 2, B, T, H, D), how far they are filled, and the last embedding (B, 1, C)."""

    def __init__(self, model: PlainNanoChat, rows: int, length: int):
        hidden, heads = model.embed.embedding_dim, model.blocks[0].heads
        self.states = torch.zeros(len(model.blocks), 2, rows, length, heads, hidden // heads, dtype=model.dtype)
        self.filled, self.last_embedding = 0, None

    def take(self, other: "Cache") -> None:
        """Every row begins as the one row of the other."""
        self.states[:, :, :, : other.filled] = other.states[:, :, :, : other.filled]
        self.filled = other.filled
        if other.last_embedding is not None:
            self.last_embedding = other.last_embedding.expand(self.states.shape[2], -1, -1)


class PlainEngine:
    def __init__(self, model: PlainNanoChat):
        self.model = model
        model.embed.to(model.dtype)
        model.value_embeddings.to(model.dtype)

    def forward(self, ids: Tensor, cache: Cache) -> Tensor:
        """Float32 logits (B, T, V) of the ids (B, T), which come behind what the cache holds."""
        model, era, start = self.model, self.model.era, cache.filled
        end = start + ids.shape[1]
        cos, sin = model.cos[start:end], model.sin[start:end]
        x = rms(model.embed(ids))
        if era.smear_channels:
            x = self.smear(x, cache)
        first = x
        for i, block in enumerate(model.blocks):
            x = model.resid_lambdas[i].to(x.dtype) * x + model.x0_lambdas[i].to(x.dtype) * first
            table = model.value_embeddings[str(i)](ids) if str(i) in model.value_embeddings else None
            x = x + self.attention(block, rms(x), table, cos, sin, cache.states[i], start)
            x = x + block.down(F.relu(block.up(rms(x))).square())
            if i == len(model.blocks) // 2:
                middle = x
        if era.has_backout:
            x = x - model.backout_lambda.to(x.dtype) * middle
        cache.filled = end
        return 15 * torch.tanh(model.head(rms(x)).float() / 15)

    def smear(self, x: Tensor, cache: Cache) -> Tensor:
        """A share of the embedding before, which the cache keeps; the first token of all has none."""
        model, last = self.model, cache.last_embedding
        cache.last_embedding = x[:, -1:]
        if last is None:
            before, new = x[:, :-1], x[:, 1:]
        else:
            before, new = torch.cat((last, x[:, :-1]), dim=1), x
        gate = model.smear_lambda.to(x.dtype) * model.smear_gate(new[..., : model.era.smear_channels]).sigmoid()
        new = new + gate * before
        return torch.cat((x[:, :1], new), dim=1) if last is None else new

    def attention(self, block, x, table, cos, sin, states, start) -> Tensor:
        rows, length, hidden = x.shape
        era, end = self.model.era, start + length
        q, k, v = (part(x).view(rows, length, block.heads, -1) for part in (block.q, block.k, block.v))
        if block.gate is not None:
            gate = era.gate_scale * torch.sigmoid(block.gate(x[..., : era.gate_channels]))
            v = v + gate.unsqueeze(-1) * table.view_as(v)
        q, k = (era.query_key_scale * rms(rotate(part, cos, sin)) for part in (q, k))
        keys, values = states
        keys[:, start:end], values[:, start:end] = k, v
        seen = max(0, end - 1 - block.window) if length == 1 and block.window else 0
        q, k, v = (part.transpose(1, 2) for part in (q, keys[:, seen:end], values[:, seen:end]))
        if length == 1:
            y = F.scaled_dot_product_attention(q, k, v)
        elif start == 0 and (not block.window or block.window >= length):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = self.model.mask[start:end, :end] if block.window else self.model.mask.new_ones(length, end).tril()
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return block.o(y.transpose(1, 2).reshape(rows, length, hidden))

    def generate(self, prompt: list[int], rows: int, new_tokens: int, temperature: float = 1.0) -> list[list[int]]:
        """Answers of `rows` rows to one prompt; temperature 0 takes the likeliest token."""
        read = Cache(self.model, 1, len(prompt))
        logits = self.forward(torch.tensor([prompt]), read)[:, -1].expand(rows, -1)
        cache = Cache(self.model, rows, len(prompt) + new_tokens)
        cache.take(read)
        answers: list[list[int]] = [[] for _ in range(rows)]
        while True:
            if temperature:
                drawn = torch.multinomial(F.softmax(logits / temperature, dim=-1), num_samples=1)
            else:
                drawn = logits.argmax(dim=-1, keepdim=True)
            column = drawn[:, 0].tolist()
            for answer, token in zip(answers, column):
                answer.append(token)
            if len(answers[0]) == new_tokens:
                return answers
            logits = self.forward(torch.tensor(column).unsqueeze(1), cache)[:, -1]
