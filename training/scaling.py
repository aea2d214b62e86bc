"""The depth dial: from a shape to parameters, FLOPs, a token horizon, batch and decay; and what a device can do.

Everything is computed by formula from the configuration, so that a plan for a model of any size costs nothing: no
weight is ever built here. The price is that the formulas repeat what the model's constructor does; a test holds them
equal to the parameters of real models. The constants are upstream nanochat's, which found them by sweeps; the batch
and decay rules of the head era rest on the papers named beside them.
"""

import math
import time
from dataclasses import dataclass

import torch

from modeling_nanochat import NanoChatGPTConfig
from modeling_nanochat.chunked_cross_entropy import CHUNK_ELEMENTS
from modeling_nanochat.training.optimizer.eras import REFERENCE_BATCH_TOKENS, REFERENCE_DEPTH, optimizer_era

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


def count_parameters(config: NanoChatGPTConfig) -> ParameterCounts:
    """Parameters by group, equal to what `NanoChatGPTForCausalLM(config)` would allocate."""
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


def flops_per_token(config: NanoChatGPTConfig, sequence_length: int | None = None) -> int:
    """Floating point operations of training on one token, forward and backward.

    6 for every parameter that multiplies, and 12 * heads * head_dim for every position a layer looks back on; a
    windowed layer counts its window, not the sequence.
    """
    length = sequence_length or config.max_position_embeddings
    seen = sum(length if window is None else min(window, length) for window in attention_windows(config))
    return 6 * multiplying_parameters(config) + 12 * config.num_attention_heads * config.head_dim * seen


def multiplying_parameters(config: NanoChatGPTConfig) -> int:
    """The scaling parameters, and the smear's gate: it multiplies tokens too, but the horizon does not count it."""
    return count_parameters(config).scaling + config.smear_channels


def attention_windows(config: NanoChatGPTConfig) -> list[int | None]:
    """For each layer, how many positions before its own a query sees; None is all of them.

    `config.sliding_window` counts the query itself, as Transformers does, upstream's FLOP formula does not.
    """
    return [config.sliding_window - 1 if "sliding" in kind else None for kind in config.layer_types]


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
    config: NanoChatGPTConfig,
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


def reference_parameters(config: NanoChatGPTConfig, aspect_ratio: int) -> int:
    """Scaling parameters of the network at which batch and decay were tuned: depth 12, otherwise like this one."""
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
    config: NanoChatGPTConfig, batch_tokens: int, *, era: str = "seed", aspect_ratio: int = 64
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


# ---------------------------------------------------------------- memory and the batch on a device


# Values, in units of the hidden size, that autograd keeps of one token in one block: counted with saved_tensors_hooks
# on the compiled network (8 of them in the MLP); the eager one keeps 22. So 32 rows of d20 fit 80 GB, as upstream's do.
SAVED_PER_LAYER = 20
LOSS_COPIES = 3  # of one chunk of logits in float32: logits, probabilities and their gradient
USABLE_MEMORY = 0.95  # what fragmentation and the libraries' own buffers leave
CPU_MICRO_BATCH_TOKENS = 4096  # on a CPU larger micro-batches are no faster (measured flat from 1024 to 8192)


def memory_per_device(
    config: NanoChatGPTConfig,
    rows: int,
    sequence_length: int,
    world_size: int,
    dtype: torch.dtype,
    device_type: str = "cuda",
) -> dict[str, int]:
    """Estimated bytes of training on each of `world_size` devices, by use; `dtype` is that of the activations.

    Master weights are float32; with bfloat16 activations the embedding tables are bfloat16 too. The optimizer's state
    is split over the devices, weights and gradients are whole on each of them.
    """
    counts, size = count_parameters(config), dtype.itemsize
    embeddings = counts.token_embedding + counts.value_embeddings
    weights = 4 * (counts.scaling + counts.scalars) + size * embeddings
    state = 4 * counts.matrices + 2 * (4 * counts.head + size * embeddings)  # momentum; two moments
    casts = size * counts.scaling if size < 4 else 0
    per_token = SAVED_PER_LAYER * config.num_hidden_layers * config.hidden_size * size
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer state": state // world_size,
        "activations": rows * sequence_length * per_token + casts,
        "loss": LOSS_COPIES * 4 * CHUNK_ELEMENTS[device_type] + 4 * counts.head,
    }


def largest_device_batch(
    config: NanoChatGPTConfig,
    *,
    batch_tokens: int,
    sequence_length: int,
    world_size: int,
    memory_bytes: int,
    dtype: torch.dtype,
    device_type: str = "cuda",
) -> int:
    """Rows of a micro-batch: the largest power of two that fits the device's memory and divides the global batch.

    Raises:
        ValueError: not even one row fits, or the global batch is no whole number of rows on every device.
    """
    accumulation_steps(batch_tokens, 1, sequence_length, world_size)  # explains a batch that cannot be divided
    rows = batch_tokens // (sequence_length * world_size)
    rows &= -rows  # the largest power of two that divides it
    while True:
        memory = memory_per_device(config, rows, sequence_length, world_size, dtype, device_type)
        if sum(memory.values()) <= memory_bytes:
            return rows
        if rows == 1:
            raise ValueError(
                f"one row of {sequence_length} tokens needs about {sum(memory.values()) / 1e9:.1f} GB of a device's "
                f"{memory_bytes / 1e9:.1f} GB usable; expected a smaller depth, more devices, or FSDP"
            )
        rows //= 2


# ---------------------------------------------------------------- devices


@dataclass(frozen=True)
class Device:
    """An accelerator: dense bfloat16 FLOP/s of its data sheet, memory in bytes, rent in dollars per hour."""

    bfloat16_flops_per_second: float
    memory_bytes: int
    dollars_per_hour: float


# FLOP/s and memory: the makers' data sheets, dense, for the part named. Rent: about what GPU clouds asked on demand
# at the beginning of 2026, written down from memory and not looked up: for orientation only.
# The key is looked for in the name that torch reports, in this order.
DEVICES = {
    "B200": Device(2250e12, 180 * 10**9, 4.99),
    "H200": Device(989.5e12, 141 * 10**9, 3.59),
    "H100 PCIe": Device(756e12, 80 * 10**9, 2.49),
    "H100": Device(989.5e12, 80 * 10**9, 2.99),
    "A100": Device(312e12, 80 * 10**9, 1.79),
    "MI300X": Device(1307.4e12, 192 * 10**9, 2.49),
    "L40S": Device(362e12, 48 * 10**9, 0.86),
    "RTX 5090": Device(209.5e12, 32 * 10**9, 0.89),
    "RTX 4090": Device(165.2e12, 24 * 10**9, 0.69),
    "RTX 3090": Device(71e12, 24 * 10**9, 0.46),
}


def known_device(name: str) -> Device | None:
    """The table's entry for a name such as torch reports ("NVIDIA H100 80GB HBM3"), or None."""
    return next((device for key, device in DEVICES.items() if key.lower() in name.lower()), None)


# Share of `peak_flops_per_second` that training is expected to reach, for the announced time. Upstream's d24 took 3.04
# hours on eight H100 (2026-02-01), 0.42 of the data sheet by this count; two CPU cores gave 0.65 of a float32 product.
EXPECTED_UTILISATION = {"cuda": 0.4, "cpu": 0.6}


def native_bfloat16(device: torch.device | str) -> bool:
    """Whether the hardware multiplies bfloat16 itself. Where it does not, bfloat16 is emulated and slower than float32
    (50 times, on an AVX2 processor)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Older versions of torch cannot tell: float32 is then the safe answer.
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def matmul_flops_per_second(device: torch.device | str, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """The rate of a large square matrix product, the best of what fits into about `seconds`: a run's upper limit."""
    device = torch.device(device)
    size = 1024 if device.type == "cpu" else 8192
    x = torch.randn(size, size, device=device).to(dtype)  # (size, size)
    torch.mm(x, x)  # the first product pays for setting up threads and kernels
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < seconds:
        synchronize(device)
        begin = time.perf_counter()
        torch.mm(x, x)
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def peak_flops_per_second(device: torch.device | str, dtype: torch.dtype) -> float:
    """What utilisation (MFU) is measured against: the data sheet of a known GPU in bfloat16, else a measurement."""
    device = torch.device(device)
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = known_device(torch.cuda.get_device_name(device))
        if known is not None:
            return known.bfloat16_flops_per_second
    return matmul_flops_per_second(device, dtype)


def expected_seconds(flops: float, device: torch.device | str, dtype: torch.dtype, world_size: int) -> float:
    """About how long the work takes on so many devices like this one, at the utilisation that training reaches."""
    device = torch.device(device)
    return flops / (peak_flops_per_second(device, dtype) * world_size * EXPECTED_UTILISATION[device.type])


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
