"""The baseline of the benchmarks: the seed-era network as a plain PyTorch module, the obvious way.

It is what a reader would write from the paper: masked SDPA for the windows, float32 logits of the whole batch, an eager
or compiled forward. No library, no cache tricks, no chunks. It computes the same function as `NanoChatGPTForCausalLM`
(a test says so), hence every speed ratio against it is a ratio on equal work.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CastLinear(nn.Linear):
    """A linear layer without bias that keeps float32 weights and multiplies in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def linear(rows: int, columns: int) -> CastLinear:
    return CastLinear(columns, rows, bias=False)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)  # (B, T, H, D/2) each
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, window: int | None, has_value_embedding: bool):
        super().__init__()
        self.heads, self.window = heads, window
        self.q, self.k, self.v, self.o = (linear(hidden, hidden) for _ in range(4))
        self.gate = linear(heads, 32) if has_value_embedding else None
        self.up, self.down = linear(4 * hidden, hidden), linear(hidden, 4 * hidden)

    def attention(self, x: Tensor, value_embedding: Tensor | None, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = (part(x).view(batch, length, self.heads, -1) for part in (self.q, self.k, self.v))
        if self.gate is not None:
            gate = 2 * torch.sigmoid(self.gate(x[..., :32]))  # (B, T, H)
            v = v + gate.unsqueeze(-1) * value_embedding.view_as(v)
        q, k = rms(rotate(q, cos, sin)), rms(rotate(k, cos, sin))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        if self.window is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(y.transpose(1, 2).reshape(batch, length, hidden))

    def forward(self, x: Tensor, value_embedding: Tensor | None, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(rms(x), value_embedding, cos, sin, mask)
        return x + self.down(F.relu(self.up(rms(x))).square())


class PlainNanoChat(nn.Module):
    """Seed-era network. `forward(ids, targets)` gives the mean loss of (B, T) targets; `forward(ids)` gives logits.

    Args:
        depth: number of layers; the last layer and every fourth (`SSSL`) attend to the full context.
        hidden, heads: width and number of attention heads (no grouped queries).
        vocabulary: rows of the embedding and of the head.
        context: longest sequence; a window spans half of it.
        dtype: of the activations; weights stay float32.
    """

    def __init__(self, depth: int, hidden: int, heads: int, vocabulary: int, context: int, dtype=torch.float32):
        super().__init__()
        self.dtype = dtype
        self.embed = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList()
        self.value_embeddings = nn.ModuleDict()
        for i in range(depth):
            full = i == depth - 1 or i % 4 == 3
            has_value_embedding = i % 2 == (depth - 1) % 2
            self.blocks.append(Block(hidden, heads, None if full else context // 2, has_value_embedding))
            if has_value_embedding:
                self.value_embeddings[str(i)] = nn.Embedding(vocabulary, hidden)
        self.resid_lambdas = nn.Parameter(torch.ones(depth))
        self.x0_lambdas = nn.Parameter(torch.full((depth,), 0.1))
        self.head = linear(vocabulary, hidden)
        self.initialise()

        size = hidden // heads
        angles = torch.outer(torch.arange(context), 10000 ** (-torch.arange(0, size, 2) / size))  # (T, D/2)
        self.register_buffer("cos", angles.cos().bfloat16().to(dtype)[:, None], persistent=False)
        self.register_buffer("sin", angles.sin().bfloat16().to(dtype)[:, None], persistent=False)
        distance = torch.arange(context)[:, None] - torch.arange(context)
        self.register_buffer("mask", (distance >= 0) & (distance <= context // 2), persistent=False)

    @torch.no_grad()
    def initialise(self) -> None:
        bound = (3 / self.embed.embedding_dim) ** 0.5
        self.embed.weight.normal_()
        self.head.weight.normal_(std=0.001)
        for table in self.value_embeddings.values():
            table.weight.uniform_(-bound, bound)
        for block in self.blocks:
            for part in (block.q, block.k, block.v, block.up):
                part.weight.uniform_(-bound, bound)
            for part in (block.o, block.down, block.gate):
                if part is not None:
                    part.weight.zero_()

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        length = ids.size(1)
        cos, sin, mask = self.cos[:length], self.sin[:length], self.mask[:length, :length]
        x = first = rms(self.embed(ids).to(self.dtype))  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i].to(self.dtype) * x + self.x0_lambdas[i].to(self.dtype) * first
            table = self.value_embeddings[str(i)](ids).to(self.dtype) if str(i) in self.value_embeddings else None
            x = block(x, table, cos, sin, mask)
        logits = 15 * torch.tanh(self.head(rms(x)).float() / 15)  # (B, T, V), the whole batch in float32
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
