"""A short prompt, and then one more token for every row of the batch: the step that all decoding repeats, made lean.

    step = step_for(network, head, ...)     # None where only the modules will do
    logits = step(input_ids, attention_mask, position_ids)

The modules compute the same for any number of tokens, but of few tokens of a small network most of the time goes to
calls, checks and masks, and to products that bring their weights into another order every time. Here a layer is some
thirty operations on (B, T, C), and the weights are at hand as each product likes them (`Product`). The network's
`forward` comes here by itself on a CPU, so chat, servers, `generate` and rollouts all do. The prices: the arithmetic of
a layer stands in a second place (tests hold the two equal), and the weights lie in memory once more: as long as the
network if none of them is trained, else as long as the cache, in which time they must not change.
"""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from .block_attention import BLOCK_ATTENTION
from .decoder_layer import CastLinear, MarkedEmbedding, NanoChatGPTAttention, NanoChatGPTDecoderLayer, NanoChatGPTMLP
from .growing_cache import GROWING, grow_in_place

# A bfloat16 product costs some 20 microseconds before it begins. Up to so many weights and rows a float32 one on a copy
# of the weights, which gives the same bfloat16 numbers, has ended by then (measured: docs/performance.md).
FEW_WEIGHTS, FEW_ROWS = 2**19, 4
LONGEST_PROMPT = 1024  # tokens; the lean way is ahead so far (docs/performance.md); its masks grow with the square


class Product:
    """x (B, T, in) -> (B, T, out) in the dtype of x, by the weights (out, in) of some Linears, one under another."""

    def __init__(self, linears: tuple[nn.Linear, ...], dtype: torch.dtype):
        self.sources, self.dtype = [linear.weight.detach() for linear in linears], dtype
        self.packs = dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()  # a Mac's build has none of it
        self.packs = self.packs and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.is_small = sum(source.numel() for source in self.sources) <= FEW_WEIGHTS
        self.forms: dict[str, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if not self.packs:
            return F.linear(x, self.form("plain"))
        if self.is_small and x.shape[0] * x.shape[1] <= FEW_ROWS:
            return F.linear(x.float(), self.form("float32")).to(x.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.form("packed"), None, "none", [], "")

    def form(self, name: str) -> Tensor:
        """The weights as they are wanted, made when they first are."""
        if name not in self.forms:
            weights = [source.to(self.dtype) for source in self.sources]
            weight = torch.cat(weights) if len(weights) > 1 else weights[0]
            if name == "float32":
                weight = weight.float()
            elif name == "packed":
                weight = torch.ops.mkldnn._reorder_linear_weight(weight)
            self.forms[name] = weight
        return self.forms[name]


class LayerWeights:
    """What a layer multiplies with, and the table and gate of its value embeddings, if it has any."""

    def __init__(self, layer: NanoChatGPTDecoderLayer, table: nn.Embedding | None, dtype: torch.dtype):
        attention, mlp = layer.self_attn, layer.mlp
        self.query_key_value = Product((attention.q_proj, attention.k_proj, attention.v_proj), dtype)
        self.output = Product((attention.o_proj,), dtype)
        self.up, self.down = Product((mlp.up_proj,), dtype), Product((mlp.down_proj,), dtype)
        self.table = self.gate = None
        if table is not None:
            self.table, self.gate = table.weight.detach(), attention.value_gate.weight.detach().to(dtype)


class Weights:
    """Of a network (without its head) and its head."""

    def __init__(self, network: nn.Module, head: nn.Linear):
        self.embedding = network.embed_tokens.weight.detach()
        self.dtype = network.activation_dtype or self.embedding.dtype
        tables = dict(network.value_embeddings.items())  # of layers that have one
        self.layers = [LayerWeights(layer, tables.get(str(i)), self.dtype) for i, layer in enumerate(network.layers)]
        self.head = Product((head,), self.dtype)


class Sight:
    """Which keys the tokens of one call see, by layer; masks are made once for each window."""

    def __init__(self, tokens: int, attention_mask: Tensor | None):
        self.tokens, self.real = tokens, None
        self.masks: dict[int | None, Tensor | None] = {}
        if attention_mask is not None:
            self.real = attention_mask.bool()[:, None, None]  # (B, 1, 1, all so far)

    def of(self, states, keys: int) -> tuple[Tensor | None, bool]:
        """A mask (B or 1, 1, T or 1, keys), True where a key is seen, and whether all is seen but what comes later."""
        if self.tokens == 1:
            return None if self.real is None else self.real[..., -keys:], False
        window = states.sliding_window if states.is_sliding and states.sliding_window < self.tokens else None
        if window is None and self.real is None:
            return None, True
        if window not in self.masks:
            place = torch.arange(self.tokens)
            back = place[:, None] - place  # (T, T)
            seen = (back >= 0) & (back < (window or self.tokens))
            if self.real is not None:
                seen = seen & (self.real | (back == 0))  # padding sees itself: a softmax of nothing is no number
            self.masks[window] = seen
        return self.masks[window], False


class DecodeStep:
    """The step of a network and its head, for one cache."""

    def __init__(self, network: nn.Module, cache: Cache, weights: Weights):
        self.network, self.cache, self.weights = network, weakref.ref(cache), weights
        config = network.config
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.query_key_scale = config.head_dim, config.query_key_scale
        self.eps, self.softcap = config.rms_norm_eps, config.final_logit_softcapping
        self.has_smear = bool(config.smear_channels)
        self.gate_channels, self.gate_scale = config.value_gate_channels, config.value_gate_scale
        self.middle = config.num_hidden_layers // 2 if config.use_backout else None

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, logits_to_keep: int = 0
    ) -> Tensor:
        """Float32 logits (B, kept, V) of what follows the last so many of the tokens (B, T), 0 for all. More than one
        token are a prompt, whose cache is empty; the mask (B, all so far) is 0 where a row is padded."""
        network, weights, cache = self.network, self.weights, self.cache()
        if attention_mask is not None and attention_mask.all():
            attention_mask = None
        if position_ids is None:
            position_ids = network._positions(input_ids, attention_mask, cache)
        sight = Sight(input_ids.shape[1], attention_mask)
        x = self.norm(F.embedding(input_ids, weights.embedding).to(weights.dtype))  # (B, T, C)
        if self.has_smear:
            x = network._smear(x, position_ids, cache)
        cos, sin = network.rotary_emb(x, position_ids)  # (B or 1, T, 1, D/2)
        angles = torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)
        residual, first_shares = self.residual_weights(x)
        for i, (layer, states) in enumerate(zip(weights.layers, cache.layers)):
            if first_shares:
                x = (residual[i] * x).add_(first_shares[i])
            x = x + self.attend(layer, states, self.norm(x), input_ids, angles, sight)
            x += layer.down(layer.up(self.norm(x)).relu_().square_())
            if i == self.middle:
                middle = x
        if self.middle is not None:
            x = x - network.residual_scalars.backout_lambda.to(x.dtype) * middle
        return weights.head(self.norm(x[:, -logits_to_keep:])).float().div_(self.softcap).tanh_().mul_(self.softcap)

    def attend(self, layer: LayerWeights, states, x, input_ids, angles, sight) -> Tensor:
        """What a layer's attention adds (B, T, C); the tokens' keys and values go into its states."""
        heads, key_value_heads, dim, shape = self.heads, self.key_value_heads, self.head_dim, x.shape[:2]
        turned = heads + key_value_heads  # queries and keys
        projected = layer.query_key_value(x).view(*shape, turned + key_value_heads, dim)
        both, value = projected[:, :, :turned], projected[:, :, turned:]
        if layer.gate is not None:
            gate = F.linear(x[..., : self.gate_channels], layer.gate).sigmoid_().mul_(self.gate_scale)  # (B, T, H_kv)
            looked_up = F.embedding(input_ids, layer.table).to(x.dtype).view_as(value)
            value = value + gate.unsqueeze(-1) * looked_up
        swapped = both.unflatten(-1, (2, dim // 2)).flip(-2).flatten(-2)
        both = self.norm((both * angles[0]).add_(swapped.mul_(angles[1]))).mul_(self.query_key_scale)
        query, key = both[:, :, :heads].transpose(1, 2), both[:, :, heads:].transpose(1, 2)
        keys, values = states.update(key, value.transpose(1, 2))  # (B, H_kv, keys, D)
        seen, is_causal = sight.of(states, keys.shape[2])
        grouped = heads != key_value_heads
        mixed = F.scaled_dot_product_attention(query, keys, values, seen, is_causal=is_causal, enable_gqa=grouped)
        return layer.output(mixed.transpose(1, 2).reshape(*shape, heads * dim))

    def norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def residual_weights(self, first: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Of each layer the weight of the stream, and what it adds of the first embedding."""
        if not self.network.config.use_residual_scalars:
            return (), ()
        scalars = self.network.residual_scalars
        shares = (scalars.x0_lambdas.view(-1, 1, 1, 1) * first).to(first.dtype)  # (layers, B, 1, C)
        return scalars.resid_lambdas.unbind(), shares.unbind()


STEPS: weakref.WeakKeyDictionary[Cache, DecodeStep] = weakref.WeakKeyDictionary()
FROZEN: weakref.WeakKeyDictionary[nn.Module, tuple[list, Weights]] = weakref.WeakKeyDictionary()


def step_for(
    network: nn.Module, head: nn.Module, input_ids: Tensor | None, attention_mask, cache: Cache | None, others: dict
) -> DecodeStep | None:
    """The step for this call of a network with its head; None where the modules have to do it.

    That is: tokens that are neither one more nor a short prompt, a foreign cache, gradients, another device than the
    CPU, a request for anything but logits (`others`), another attention, modules that are not the network's own
    (adapters, quantised weights) or that somebody listens to (hooks), and a prompt for weights that are trained: each
    cache would pack them.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return None
    if cache is None or input_ids is None or input_ids.device.type != "cpu":
        return None
    if any(value is not None and value is not False for value in others.values()):
        return None
    tokens, before = input_ids.shape[1], cache.get_seq_length()
    if (before == 0 and not 1 < tokens <= LONGEST_PROMPT) or (before > 0 and tokens != 1):
        return None
    if attention_mask is not None:
        whole = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        if not whole or attention_mask.shape[1] != before + tokens:
            return None
    step = STEPS.get(cache)
    if step is None or step.network is not network:
        if not is_plain(network, head):
            return None
        trained = is_trained(network, head)
        if trained and before == 0:
            return None
        grow_in_place(cache)
        known = [type(layer) in GROWING.values() for layer in cache.layers]  # a cache may make them as they come
        if len(known) != len(network.layers) or not all(known):
            return None
        weights = Weights(network, head) if trained else kept_weights(network, head)
        step = STEPS[cache] = DecodeStep(network, cache, weights)
    return step


def kept_weights(network: nn.Module, head: nn.Linear) -> Weights:
    """Those of last time, or new ones if the network's have changed since; of a network that is not trained."""
    sources = [module.weight for module in weighted_modules(network, head)]
    state = [network.activation_dtype, *((source.data_ptr(), source._version) for source in sources)]
    kept_state, weights = FROZEN.get(network, (None, None))
    if kept_state != state:
        weights = Weights(network, head)
        FROZEN[network] = state, weights
    return weights


def is_trained(network: nn.Module, head: nn.Linear) -> bool:
    """Whether the weights may change without a trace: those that are trained, and those that inference mode made."""
    weights = (module.weight for module in weighted_modules(network, head))
    return any(weight.requires_grad or weight.is_inference() for weight in weights)


def is_plain(network: nn.Module, head: nn.Module) -> bool:
    config = network.config
    if config._attn_implementation not in (BLOCK_ATTENTION, "sdpa"):
        return False
    if config.output_hidden_states or config.output_attentions:
        return False
    for module in (*network.modules(), head):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
    blocks = ((NanoChatGPTDecoderLayer, NanoChatGPTAttention, NanoChatGPTMLP),) * len(network.layers)
    if tuple((type(layer), type(layer.self_attn), type(layer.mlp)) for layer in network.layers) != blocks:
        return False
    return all(
        type(module) in (nn.Linear, CastLinear, MarkedEmbedding)
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
        for module in weighted_modules(network, head)
    )


def weighted_modules(network: nn.Module, head: nn.Module) -> Iterator[nn.Module]:
    """Whatever the step multiplies with or looks up in."""
    yield from (head, network.embed_tokens, *network.value_embeddings.values())
    for layer in network.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.up_proj, mlp.down_proj)
        if hasattr(attention, "value_gate"):
            yield attention.value_gate
