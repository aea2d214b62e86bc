"""The baseline of the benchmarks: upstream's network of the seed and head eras as a plain PyTorch module.

It is what a reader would write from the paper, and what upstream runs on a CPU: masked SDPA for the windows, float32
logits of the whole batch, an eager or compiled forward. No library, no cache tricks, no chunks. It computes the same
function as `NanoChatGPTForCausalLM` (a test says so), hence every speed ratio against it is a ratio on equal work.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM


@dataclass(frozen=True)
class Era:
    """What differs between the networks; `window` is how far back a short layer sees, of the context's length."""

    window: Callable[[int], int]
    gate_channels: int
    gate_scale: float
    query_key_scale: float
    theta: float
    rounds_angles: bool
    smear_channels: int
    has_backout: bool


ERAS = {
    "seed": Era(lambda context: context // 2, 32, 2, 1, 10_000, True, 0, False),
    "head": Era(lambda context: -(-context // 512) * 128, 12, 3, 1.2, 100_000, False, 24, True),
}


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
    def __init__(self, hidden: int, heads: int, window: int | None, has_value_embedding: bool, era: Era):
        super().__init__()
        self.heads, self.window, self.era = heads, window, era
        self.q, self.k, self.v, self.o = (linear(hidden, hidden) for _ in range(4))
        self.gate = linear(heads, era.gate_channels) if has_value_embedding else None
        self.up, self.down = linear(4 * hidden, hidden), linear(hidden, 4 * hidden)

    def attention(self, x: Tensor, value_embedding: Tensor | None, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = (part(x).view(batch, length, self.heads, -1) for part in (self.q, self.k, self.v))
        if self.gate is not None:
            gate = self.era.gate_scale * torch.sigmoid(self.gate(x[..., : self.era.gate_channels]))  # (B, T, H)
            v = v + gate.unsqueeze(-1) * value_embedding.view_as(v)
        q, k = (self.era.query_key_scale * rms(rotate(part, cos, sin)) for part in (q, k))
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
    """The network of an era. `forward(ids, targets)` is the mean loss of (B, T) targets, `forward(ids)` gives logits.

    Args:
        depth: number of layers.
        hidden, heads: width and number of attention heads (no grouped queries).
        vocabulary: rows of the embedding and of the head.
        context: longest sequence.
        dtype: of the activations; weights stay float32.
        era: a row of `ERAS`.
        pattern: short (S) and long (L) layers, tiled; the last layer is always long.
    """

    def __init__(
        self,
        depth: int,
        hidden: int,
        heads: int,
        vocabulary: int,
        context: int,
        dtype=torch.float32,
        era="seed",
        pattern="SSSL",
    ):
        super().__init__()
        self.dtype, self.era = dtype, ERAS[era]
        window = self.era.window(context)
        self.embed = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList()
        self.value_embeddings = nn.ModuleDict()
        for i in range(depth):
            full = i == depth - 1 or pattern[i % len(pattern)] == "L"
            has_value_embedding = i % 2 == (depth - 1) % 2
            self.blocks.append(Block(hidden, heads, None if full else window, has_value_embedding, self.era))
            if has_value_embedding:
                self.value_embeddings[str(i)] = nn.Embedding(vocabulary, hidden)
        self.resid_lambdas = nn.Parameter(torch.ones(depth))
        self.x0_lambdas = nn.Parameter(torch.full((depth,), 0.1))
        if self.era.smear_channels:
            self.smear_gate = linear(1, self.era.smear_channels)
            self.smear_lambda, self.backout_lambda = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.full((1,), 0.2))
        self.head = linear(vocabulary, hidden)
        self.initialise()

        size = hidden // heads
        angles = torch.outer(torch.arange(context), self.era.theta ** (-torch.arange(0, size, 2) / size))  # (T, D/2)
        rounded = torch.bfloat16 if self.era.rounds_angles else torch.float32
        self.register_buffer("cos", angles.cos().to(rounded).to(dtype)[:, None], persistent=False)
        self.register_buffer("sin", angles.sin().to(rounded).to(dtype)[:, None], persistent=False)
        distance = torch.arange(context)[:, None] - torch.arange(context)
        self.register_buffer("mask", (distance >= 0) & (distance <= window), persistent=False)

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
        x = rms(self.embed(ids).to(self.dtype))  # (B, T, C)
        if self.era.smear_channels:
            gate = self.smear_lambda.to(self.dtype) * self.smear_gate(x[:, 1:, : self.era.smear_channels]).sigmoid()
            x = torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), dim=1)
        first = x
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i].to(self.dtype) * x + self.x0_lambdas[i].to(self.dtype) * first
            table = self.value_embeddings[str(i)](ids).to(self.dtype) if str(i) in self.value_embeddings else None
            x = block(x, table, cos, sin, mask)
            if i == len(self.blocks) // 2:
                middle = x
        if self.era.has_backout:
            x = x - self.backout_lambda.to(self.dtype) * middle
        logits = 15 * torch.tanh(self.head(rms(x)).float() / 15)  # (B, T, V), the whole batch in float32
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def same_weights(plain: PlainNanoChat, config: NanoChatGPTConfig) -> NanoChatGPTForCausalLM:
    """Our network with the weights of the plain one."""
    model = NanoChatGPTForCausalLM(config).eval()
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
    names |= {"gate": "self_attn.value_gate", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    state = {"model.embed_tokens.weight": plain.embed.weight, "lm_head.weight": plain.head.weight}
    for name, tensor in plain.state_dict().items():
        if "lambda" in name:
            state[f"model.residual_scalars.{name}"] = tensor
        elif name.startswith("smear_gate."):
            state[f"model.{name}"] = tensor
        elif name.startswith("blocks."):
            _, index, part, _ = name.split(".")
            state[f"model.layers.{index}.{names[part]}.weight"] = tensor
        elif name.startswith("value_embeddings."):
            state[f"model.{name}"] = tensor
    model.load_state_dict(state)
    return model
