"""One block of the nanochat network and the leaves it is made of: attention, MLP, rotary angles, casting Linears.

Nothing here knows of the whole network: a block gets the stream, the first embedding, its residual weights and its
value embedding as arguments, so that it can be checkpointed, offloaded or split over devices by itself.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, eager_attention_forward

from .configuration_nanochat_gpt import NanoChatGPTConfig


def marked_linear(in_features: int, out_features: int, init_rule: str) -> nn.Linear:
    """A Linear without bias that knows how it is drawn; no subclass, as bitsandbytes replaces nn.Linear itself only."""
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.init_rule = init_rule
    return linear


class CastLinear(nn.Linear):
    """What `set_activation_dtype` turns every Linear into: its weight follows the dtype of its input. While
    the weights stay as they are, `weights_cast_once` keeps the cast one here."""

    cast_weight: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.cast_weight is None else self.cast_weight
        return F.linear(x, weight.to(x.dtype))


class MarkedEmbedding(nn.Embedding):
    """An Embedding that knows how it is drawn."""

    def __init__(self, num_embeddings: int, embedding_dim: int, init_rule: str):
        super().__init__(num_embeddings, embedding_dim)
        self.init_rule = init_rule


class NanoChatGPTRotaryEmbedding(LlamaRotaryEmbedding):
    """Cosines and sines of the rotary angles, each half a head wide."""

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)  # (B or 1, T, D/2)
        tables = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        if self.config.bfloat16_rotary_tables:
            tables = tuple(table.to(torch.bfloat16) for table in tables)
        cos, sin = (table.to(x.dtype).unsqueeze(-2) for table in tables)  # (B or 1, T, 1, D/2)
        return cos, sin


class NanoChatGPTRMSNorm(nn.Module):
    """Divides by the root mean square of the last dimension, without a weight; eps None is the machine epsilon of the
    dtype. A module of one input, as vLLM replaces those by its own kernel."""

    def __init__(self, eps: float | None):
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=self.eps)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (x1, x2) of the two halves of a head by minus the angle. (B, T, H, D)"""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def heads_of_this_rank(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The heads (B, T, num_heads, D) that this rank computes, where tensor parallelism shares them out, of all heads.

    Ranks of one tensor-parallel group are numbered one after another, in Transformers as in vLLM.
    """
    ranks = x.shape[2] // num_heads
    return x if ranks == 1 else x.chunk(ranks, dim=2)[torch.distributed.get_rank() % ranks]


class NanoChatGPTAttention(nn.Module):
    """Grouped-query attention: rotary turn first, then norm of queries and keys, gated value embeddings."""

    def __init__(self, config: NanoChatGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.sliding_window = config.sliding_window if "sliding" in config.layer_types[layer_idx] else None
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = marked_linear(config.hidden_size, config.num_attention_heads * config.head_dim, "input")
        self.k_proj = marked_linear(config.hidden_size, key_value_size, "input")
        self.v_proj = marked_linear(config.hidden_size, key_value_size, "input")
        self.o_proj = marked_linear(config.num_attention_heads * config.head_dim, config.hidden_size, "zero")
        self.q_norm, self.k_norm = (NanoChatGPTRMSNorm(config.rms_norm_eps) for _ in range(2))
        if config.has_value_embedding(layer_idx):
            self.value_gate = marked_linear(config.value_gate_channels, config.num_key_value_heads, "gate")

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        value_embedding: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]  # (B, T)
        heads_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads_shape)  # (B, T, H, D)
        key = self.k_proj(hidden_states).view(heads_shape)  # (B, T, H_kv, D)
        value = self.v_proj(hidden_states).view(heads_shape)
        if value_embedding is not None:
            gate = torch.sigmoid(self.value_gate(hidden_states[..., : self.config.value_gate_channels]))  # (B, T, H_kv)
            looked_up = heads_of_this_rank(value_embedding.view(heads_shape), value.shape[2])
            value = value + self.config.value_gate_scale * gate.unsqueeze(-1) * looked_up

        cos, sin = position_embeddings
        query = self.q_norm(rotate(query, cos, sin)) * self.config.query_key_scale
        key = self.k_norm(rotate(key, cos, sin)) * self.config.query_key_scale
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, H, T, D)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1)), weights


class NanoChatGPTMLP(nn.Module):
    """Up, squared ReLU, down."""

    def __init__(self, config: NanoChatGPTConfig):
        super().__init__()
        self.up_proj = marked_linear(config.hidden_size, config.intermediate_size, "up")
        self.down_proj = marked_linear(config.intermediate_size, config.hidden_size, "zero")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class NanoChatGPTDecoderLayer(GradientCheckpointingLayer):
    """One block: the stream mixed with the first embedding, attention, MLP."""

    def __init__(self, config: NanoChatGPTConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = NanoChatGPTRMSNorm(config.rms_norm_eps)
        self.post_attention_layernorm = NanoChatGPTRMSNorm(config.rms_norm_eps)
        self.self_attn = NanoChatGPTAttention(config, layer_idx)
        self.mlp = NanoChatGPTMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        first_embedding: torch.Tensor,
        residual_weights: tuple[torch.Tensor, torch.Tensor] | None,
        value_embedding: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        if residual_weights is not None:
            resid_lambda, x0_lambda = residual_weights
            hidden_states = resid_lambda * hidden_states + x0_lambda * first_embedding
        attention_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings,
            value_embedding=value_embedding,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
