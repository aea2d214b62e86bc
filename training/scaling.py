"""The depth dial: from a shape to parameters, FLOPs, a token horizon, batch and decay.

Everything is computed from the configuration, so that a plan for a model of any size costs nothing: by formula for
nanochat's own networks, and for stock ones from a network without values. No weight is ever built here. The price is
that the formulas repeat what the model's constructor does; a test holds them equal to real models. The constants are
upstream nanochat's, which found them by sweeps; the batch and decay rules of the head era rest on the papers named
beside them.
"""

import json
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from modeling_nanochat import NanoChatGPTConfig
from modeling_nanochat.training.architectures import is_nanochat, stock_config
from modeling_nanochat.training.optimizer.eras import REFERENCE_BATCH_TOKENS, REFERENCE_DEPTH, optimizer_era
from modeling_nanochat.training.optimizer.sorting import attention_heads, sort_parameters

# ---------------------------------------------------------------- parameters and FLOPs


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters each group of the optimizer holds."""

    token_embedding: int
    value_embeddings: int
    head: int
    matrices: int
    scalars: int

    @property
    def total(self) -> int:
        return self.token_embedding + self.value_embeddings + self.head + self.matrices + self.scalars

    @property
    def scaling(self) -> int:
        """The parameters that the token horizon is proportional to: they multiply every token."""
        return self.matrices + self.head


def count_parameters(config: PreTrainedConfig) -> ParameterCounts:
    """Parameters by group, equal to what a network of this configuration would allocate."""
    if not is_nanochat(config):
        return count_by_kind(config.to_json_string(use_diff=False), type(config))
    hidden, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    query_width = config.num_attention_heads * config.head_dim
    value_width = config.num_key_value_heads * config.head_dim
    value_layers = sum(config.has_value_embedding(layer) for layer in range(layers))
    gates = value_layers * config.num_key_value_heads * config.value_gate_channels
    attention = 2 * hidden * query_width + 2 * hidden * value_width  # q and o, k and v
    mlp = 2 * hidden * config.intermediate_size
    scalars = 2 * layers if config.use_residual_scalars else 0
    scalars += config.smear_channels + 1 if config.smear_channels else 0  # the smear's gate and its lambda
    scalars += int(config.use_backout)
    return ParameterCounts(
        token_embedding=vocabulary * hidden,
        value_embeddings=value_layers * vocabulary * value_width,
        head=vocabulary * hidden,
        matrices=layers * (attention + mlp) + gates,
        scalars=scalars,
    )


@lru_cache
def count_by_kind(config_json: str, config_class: type[PreTrainedConfig]) -> ParameterCounts:
    """The same for a stock network; an embedding that is the head too counts as that, as it multiplies every token."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_class.from_dict(json.loads(config_json)))
    counts = dict.fromkeys(("embedding", "head", "vector", "matrices"), 0)
    for each in sort_parameters(model):
        kind = "head" if each.kind == "tied" else each.kind
        counts[kind if kind in counts else "matrices"] += each.parameter.numel()
    return ParameterCounts(counts["embedding"], 0, counts["head"], counts["matrices"], counts["vector"])


def flops_per_token(config: PreTrainedConfig, sequence_length: int | None = None) -> int:
    """Floating point operations of training on one token, forward and backward.

    6 for every parameter that multiplies, and 12 * heads * head_dim for every position a layer looks back on; a
    windowed layer counts its window, not the sequence.
    """
    length = sequence_length or config.max_position_embeddings
    seen = sum(length if window is None else min(window, length) for window in attention_windows(config))
    heads, _, head_dim = attention_heads(config)
    return 6 * multiplying_parameters(config) + 12 * heads * head_dim * seen


def multiplying_parameters(config: PreTrainedConfig) -> int:
    """The scaling parameters, and the smear's gate: it multiplies tokens too, but the horizon does not count it."""
    return count_parameters(config).scaling + getattr(config, "smear_channels", 0)


def attention_windows(config: PreTrainedConfig) -> list[int | None]:
    """For each layer, how many positions before its own a query sees; None is all of them.

    `config.sliding_window` counts the query itself, as Transformers does, upstream's FLOP formula does not.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window - 1 if "sliding" in kind else None for kind in kinds]


# ---------------------------------------------------------------- how long, how large a batch, how much decay


@dataclass(frozen=True)
class TrainingPlan:
    """What a run is going to be. `batch_tokens` is the whole batch of one optimizer step, over all devices."""

    parameters: ParameterCounts
    flops_per_token: int
    batch_tokens: int
    steps: int
    weight_decay: float

    @property
    def tokens(self) -> int:
        return self.batch_tokens * self.steps

    @property
    def flops(self) -> int:
        return self.flops_per_token * self.tokens


def plan_training(
    config: PreTrainedConfig,
    *,
    era: str = "seed",
    aspect_ratio: int = 64,
    sequence_length: int | None = None,
    batch_tokens: int | None = None,
    max_steps: int | None = None,
    target_flops: float | None = None,
    tokens_per_parameter: float | None = None,
) -> TrainingPlan:
    """Set a run from a model's shape.

    The horizon is `max_steps` if given, else `target_flops` if given, else `tokens_per_parameter` tokens for each
    scaling parameter. The batch is `batch_tokens` if given, else the era's for the horizon of that ratio; the decay is
    always that of the ratio's horizon, however many steps are made.

    Args:
        config: the network.
        era: a row of `OPTIMIZER_ERAS`.
        aspect_ratio: what `config` was made with; the reference network is made with the same.
        tokens_per_parameter: by default the era's.

    Raises:
        ValueError: a horizon of less than one optimizer step.
    """
    parameters, flops = count_parameters(config), flops_per_token(config, sequence_length)
    ratio = optimizer_era(era).tokens_per_parameter if tokens_per_parameter is None else tokens_per_parameter
    if not ratio > 0:
        raise ValueError(f"tokens_per_parameter is {ratio}, expected more than 0")
    horizon_ratio = reference_parameters(config, aspect_ratio) / parameters.scaling
    if batch_tokens is None:
        batch_tokens = best_batch_tokens(horizon_ratio, era)
    tokens = int(ratio * parameters.scaling) if target_flops is None else target_flops / flops
    if max_steps is not None:
        tokens = max_steps * batch_tokens
    # Upstream rounds a FLOP budget to the nearest step and a token ratio down.
    steps = round(tokens / batch_tokens) if target_flops is not None else int(tokens // batch_tokens)
    if steps < 1:
        raise ValueError(
            f"the horizon of {tokens:,.0f} tokens is shorter than one batch of {batch_tokens:,} tokens; expected at "
            "least one optimizer step: lower the batch or lengthen the horizon"
        )
    weight_decay = scaled_weight_decay(config, batch_tokens, era=era, aspect_ratio=aspect_ratio)
    return TrainingPlan(parameters, flops, batch_tokens, steps, weight_decay)


def reference_parameters(config: PreTrainedConfig, aspect_ratio: int) -> int:
    """Scaling parameters of the network at which batch and decay were tuned: depth 12, otherwise like this one."""
    if not is_nanochat(config):
        shape = {"vocab_size": config.vocab_size, "head_dim": attention_heads(config)[2], "aspect_ratio": aspect_ratio}
        return count_parameters(stock_config(config.model_type, REFERENCE_DEPTH, **shape)).scaling
    reference = NanoChatGPTConfig.from_depth(
        REFERENCE_DEPTH,
        vocab_size=config.vocab_size,
        head_dim=config.head_dim,
        aspect_ratio=aspect_ratio,
        use_value_embeddings=config.use_value_embeddings,
        value_gate_channels=config.value_gate_channels,
    )
    return count_parameters(reference).scaling


def best_batch_tokens(horizon_ratio: float, era: str) -> int:
    """The era's batch for a horizon, of which the reference's is `horizon_ratio` times: it grows with a power of the
    tokens, rounded to a power of two."""
    best = REFERENCE_BATCH_TOKENS * horizon_ratio ** -optimizer_era(era).batch_exponent
    return 2 ** round(math.log2(best))


def learning_rate_scale(batch_tokens: int) -> float:
    """What all base learning rates are multiplied by: the square root of the batch over the reference batch."""
    return math.sqrt(batch_tokens / REFERENCE_BATCH_TOKENS)


def scaled_weight_decay(
    config: PreTrainedConfig, batch_tokens: int, *, era: str = "seed", aspect_ratio: int = 64
) -> float:
    """Muon's weight decay at the first step, by the era's rule for the horizon of its ratio."""
    row = optimizer_era(era)
    horizon_ratio = reference_parameters(config, aspect_ratio) / count_parameters(config).scaling
    batch_ratio = batch_tokens / REFERENCE_BATCH_TOKENS
    return row.decay_rule(row.weight_decay, config.num_hidden_layers, batch_ratio, horizon_ratio)


def accumulation_steps(batch_tokens: int, device_batch_size: int, sequence_length: int, world_size: int) -> int:
    """How many micro-batches each device runs before an optimizer step.

    Raises:
        ValueError: the batch is no whole number of micro-batches over all devices; the message says what would be.
    """
    micro_batch = device_batch_size * sequence_length * world_size
    if batch_tokens % micro_batch:
        nearest = max(1, round(batch_tokens / micro_batch)) * micro_batch
        raise ValueError(
            f"a batch of {batch_tokens:,} tokens cannot be made of {device_batch_size} rows x {sequence_length} tokens"
            f" x {world_size} devices = {micro_batch:,} tokens at a time; expected a multiple, such as {nearest:,}"
        )
    return batch_tokens // micro_batch
