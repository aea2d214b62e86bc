"""How long an optimizer step takes on GPUs that are not here, part by part: kernels and links at measured rates.

    step = step_time(config, batch_tokens=2**19, rows=16, device=DEVICES["H100"], gpus=8)
    step.seconds, step.parts["attention"]

Counted are the matrix products of the blocks and the head (a short sum over k costs the filling of its tiles), causal
attention in its windows, passes over activations and logits at the memory's rate, gradients and casts of each
micro-batch, the optimizer's own work, and the exchange of gradients and weights, laid out in time as `MuonAdamW` does:
all reductions are asked for first, each update waits for its own, gathers run behind the updates that follow. How
parameters are dealt is asked of the optimizer itself, on tensors without values.

One constant, `Device.sustained`, is fitted to one published run: upstream's first record (d24 of the seed era in
bfloat16, 16,704 steps in 10,949 s on eight H100, 2026-01-29). The rest are measurements of single kernels, and counts.
What that predicts of other published runs, `tests/training/test_step_time.py` holds. Not counted: launching kernels
from the host (networks of a few layers wait for it), loading data, evaluation, checkpoints, a slow neighbour.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from modeling_nanochat.training.architectures import is_nanochat
from modeling_nanochat.training.devices import Device
from modeling_nanochat.training.memory import SAVED_PER_LAYER, SAVED_PER_STOCK_LAYER
from modeling_nanochat.training.optimizer.eras import era_of
from modeling_nanochat.training.optimizer.groups import build_param_groups
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.optimizer.shards import AdamWTensors, MuonStack, Ranks
from modeling_nanochat.training.optimizer.sorting import attention_heads
from modeling_nanochat.training.scaling import accumulation_steps, attention_windows

# A product of 8192^3 in bfloat16 ran at 798 of an H100's 989.5 TFLOP/s, a copy at 3.0 of 3.35 TB/s (torch 2.11).
PRODUCT_SHARE, MEMORY_SHARE = 0.81, 0.9
# What filling and emptying a tile costs, in steps of k: 65536 x 1664 by 1664 x 6656 took 2.00 ms, in float8 1.45 with
# the scaling (upstream's dev/LOG.md, 2026-02-02).
TILE_FILL = 172
FLOAT8_SHARE = 0.65
# FlashAttention 3, causal, heads of 128, rows of 2,048: 521 TFLOP/s forward, 501 backward (arXiv 2407.08608).
ATTENTION_SHARE = 0.52
ATTENTION_BACKWARD = 2.5  # FLOPs, in units of the forward pass: the scores are made anew
# NCCL on eight GPUs moves about 360 of NVLink's 450 GB/s; an adapter of 400 Gbit/s for each GPU, 47 of 50 GB/s.
LINK_SHARE = 0.8
GPUS_OF_A_NODE, NETWORK_BYTES_PER_SECOND = 8, 47e9
HOP_SECONDS = 5e-6
# By `benchmarks/step_traffic.py`: values that the compiled step's own kernels read and write, forward and backward, for
# a token, a block and a unit of the width (seed 82.5, head 81.7); and bytes for each logit (both 20.0).
PASSES_PER_LAYER, LOSS_BYTES = 82, 20
MUON_BYTES = 60  # read and written for each element of a matrix beside the products, by one update


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by part."""

    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def step_time(
    config: PreTrainedConfig,
    *,
    batch_tokens: int,
    rows: int,
    device: Device,
    gpus: int,
    float8: bool = False,
    checkpointed: bool = False,
) -> StepTime:
    """Seconds of an optimizer step of `batch_tokens` on so many devices, `rows` of the context at a time on each.

    `float8` is upstream's, in which the head takes part. `checkpointed` blocks go forward twice.

    Raises:
        ValueError: the batch is no whole number of micro-batches.
    """
    length = config.max_position_embeddings
    steps = accumulation_steps(batch_tokens, rows, length, gpus)
    layout = optimizer_layout(config, batch_tokens, gpus)
    memory = device.memory_bytes_per_second * MEMORY_SHARE
    tokens = rows * length  # of a micro-batch, on one device
    matrices = multiplying_matrices(layout, config.vocab_size)
    elements = sum(m * n for m, n in matrices)
    tables = sum(parameter.numel() for part in layout for parameter in parameters_of(part)) - elements
    each = [linear_seconds(tokens, m, n, device, float8) for m, n in matrices]  # of the blocks, and last the head
    products, attention = sum(each), attention_seconds(config, rows, device)
    passes = PASSES_PER_LAYER * (1 if is_nanochat(config) else SAVED_PER_STOCK_LAYER / SAVED_PER_LAYER)
    elementwise = passes * 2 * tokens * config.num_hidden_layers * config.hidden_size
    # Casts of weights and gradients, 6 bytes each; a table's gradient begins as zeros, and both are added up.
    gradients = steps * (12 * elements + 2 * tables) + (steps - 1) * (12 * elements + 6 * tables)
    work, waiting = optimizer_seconds(layout, device, gpus)
    again = {}
    if checkpointed:  # a third of what forward and backward pass take
        forward = sum(each[:-1]) / 3 + attention / (1 + ATTENTION_BACKWARD) + elementwise / memory / 3
        again = {"forward again": steps * forward}
    return StepTime(
        {
            "matrix products": steps * products,
            "attention": steps * attention,
            "elementwise": steps * elementwise / memory,
            **again,
            "loss": steps * LOSS_BYTES * tokens * config.vocab_size / memory,
            "gradients and casts": gradients / memory,
            "optimizer": work,
            "exchange not hidden": waiting,
        }
    )


# ---------------------------------------------------------------- forward and backward


def product_seconds(m: int, n: int, k: int, device: Device, float8: bool = False) -> float:
    """(m, k) by (k, n)."""
    share = 2 * FLOAT8_SHARE if float8 else PRODUCT_SHARE
    return 2 * m * n * (k + TILE_FILL) / (device.bfloat16_flops_per_second * share * device.sustained)


def linear_seconds(tokens: int, outputs: int, inputs: int, device: Device, float8: bool) -> float:
    """Forward and both backward products of a Linear; float8 where its sides allow, with the passes that scale."""
    float8 = float8 and outputs % 16 == 0 and inputs % 16 == 0
    sides = ((tokens, outputs, inputs), (tokens, inputs, outputs), (outputs, inputs, tokens))
    seconds = sum(product_seconds(*sides_of_one, device, float8) for sides_of_one in sides)
    if float8:  # each operand read for its largest value, read and written scaled, read and written transposed
        scaled = 7 * tokens * (inputs + outputs) + 12 * inputs * outputs
        seconds += scaled / (device.memory_bytes_per_second * MEMORY_SHARE)
    return seconds


def attention_seconds(config: PreTrainedConfig, rows: int, device: Device) -> float:
    """Causal attention of all layers: a query meets the keys before it in its window, on average over a row."""
    length = config.max_position_embeddings
    keys = 0.0
    for window in attention_windows(config):
        window = length if window is None else min(window, length)
        keys += window - window * window / (2 * length)
    heads, _, head_dim = attention_heads(config)
    flops = (1 + ATTENTION_BACKWARD) * 4 * heads * head_dim * keys * rows * length
    return flops / (device.bfloat16_flops_per_second * ATTENTION_SHARE * device.sustained)


# ---------------------------------------------------------------- the optimizer and its exchange


def optimizer_layout(config: PreTrainedConfig, batch_tokens: int, gpus: int) -> list[MuonStack | AdamWTensors]:
    """How the optimizer deals the parameters, as the first rank sees it; tables in bfloat16, as on a GPU."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if is_nanochat(config):
        model.get_input_embeddings().to(torch.bfloat16)
        model.model.value_embeddings.to(torch.bfloat16)
    groups = build_param_groups(model, era=era_of(config), batch_tokens=batch_tokens, weight_decay=0.0)
    return MuonAdamW(groups, compile=False).layout(Ranks(None, 0, gpus))


def parameters_of(part: MuonStack | AdamWTensors) -> Sequence[torch.Tensor]:
    return part.parameters if isinstance(part, MuonStack) else [shard.parameter for shard in part.shards]


def multiplying_matrices(layout: Sequence[MuonStack | AdamWTensors], vocab_size: int) -> list[torch.Size]:
    """The shapes (outputs, inputs) that every token is multiplied with: Muon's matrices, and the head."""
    muon = [parameter.shape for part in layout if isinstance(part, MuonStack) for parameter in part.parameters]
    adamw = [p for part in layout if isinstance(part, AdamWTensors) for p in parameters_of(part)]
    head = [p.shape for p in adamw if p.ndim == 2 and p.shape[0] == vocab_size and p.dtype == torch.float32][:1]
    return muon + head


def bytes_exchanged(part: MuonStack | AdamWTensors) -> dict[str, int]:
    """What a part hands to the collectives in one step: bytes of the whole tensors, by collective."""
    if isinstance(part, MuonStack):
        padded = part.ranks.size * part.block * part.parameters[0].nbytes
        return {"reduce_scatter": padded, "all_gather": padded, "all_reduce": 0}
    total = {"reduce_scatter": 0, "all_gather": 0, "all_reduce": 0}
    for shard in part.shards:
        if shard.is_split:
            padded = shard.ranks.size * shard.block * shard.parameter[0].nbytes
            total["reduce_scatter"] += padded
            total["all_gather"] += padded
        else:
            total["all_reduce"] += shard.parameter.nbytes
    return total


def exchange_seconds(collective: str, size: int, device: Device, gpus: int) -> float:
    """A ring over all devices, a `size` of bytes in all; between nodes as many rings as a node has adapters."""
    if gpus == 1 or not size:
        return 0.0
    bandwidth = device.link_bytes_per_second * LINK_SHARE
    if gpus > GPUS_OF_A_NODE:
        bandwidth = min(bandwidth, GPUS_OF_A_NODE * NETWORK_BYTES_PER_SECOND)
    times = 2 if collective == "all_reduce" else 1
    return times * (gpus - 1) * (size / gpus / bandwidth + HOP_SECONDS)


def optimizer_seconds(layout: Sequence[MuonStack | AdamWTensors], device: Device, gpus: int) -> tuple[float, float]:
    """Seconds of `MuonAdamW.step` that the first rank works, and that it waits: its three phases on a clock, with the
    links as a queue beside it."""
    memory = device.memory_bytes_per_second * MEMORY_SHARE
    clock = work = links = 0.0
    arrived = []
    for part in layout:  # launch_reduction: gradients are stacked
        work += copy_seconds(part, memory)
        clock += copy_seconds(part, memory)
        sizes = bytes_exchanged(part)
        reductions = [exchange_seconds(name, sizes[name], device, gpus) for name in ("reduce_scatter", "all_reduce")]
        links = max(links, clock) + sum(reductions)
        arrived.append(links)
    for index, part in enumerate(layout):  # update, when the part's gradients are there
        seconds = update_seconds(part, device, memory)
        work += seconds
        clock = max(clock, arrived[index]) + seconds
        links = max(links, clock) + exchange_seconds("all_gather", bytes_exchanged(part)["all_gather"], device, gpus)
        arrived[index] = links
    for part, ready in zip(layout, arrived):  # finish: results are copied back
        work += copy_seconds(part, memory)
        clock = max(clock, ready) + copy_seconds(part, memory)
    return work, clock - work


def copy_seconds(part: MuonStack | AdamWTensors, memory: float) -> float:
    """Into a stack or out of it; AdamW's tensors lie as they are sent."""
    return 2 * sum(p.nbytes for p in part.parameters) / memory if isinstance(part, MuonStack) else 0.0


def update_seconds(part: MuonStack | AdamWTensors, device: Device, memory: float) -> float:
    """One update of what the first rank owns: it has as much as any."""
    if isinstance(part, AdamWTensors):  # parameter, gradient and two moments are read, three of them written
        return 7 * sum(shard.own().nbytes for shard in part.shards) / memory
    *_, m, n = part.parameters[0].shape
    small, large = min(m, n), max(m, n)
    iteration = product_seconds(small, small, large, device) + product_seconds(small, small, small, device)
    iteration += product_seconds(small, large, small, device)
    passes = MUON_BYTES * m * n + 5 * (8 * m * n + 10 * small * small)
    return len(part.owned) * (5 * iteration + passes / memory)
