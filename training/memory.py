"""The micro-batch that a device holds: bytes by formula, and one search for the rows that fit.

A plan for a device that is not there asks the formula, which counts what a compiled step keeps. On the device itself
the search goes on from the formula's answer, because kernels, fragmentation and other processes are not in it: one
eager forward and backward pass runs on a throw-away network, with as much memory set aside as the optimizer will need,
and the rows are halved while it does not fit. The price is some seconds before the run, and rows that only a compiled
step holds.

On a CPU the estimate is that of the whole process: the libraries, the attention's kept probabilities, and what the C
library's allocator holds beyond the tensors, are in it. `docs/performance.md` compares it with measured peaks.
"""

from collections.abc import Callable
from functools import partial

import psutil
import torch
from accelerate.utils import gather_object
from transformers import PreTrainedConfig, TrainingArguments

from modeling_nanochat.block_attention import LONGEST_FULL_ATTENTION
from modeling_nanochat.chunked_cross_entropy import CHUNK_ELEMENTS
from modeling_nanochat.training.architectures import fresh_network, is_nanochat, run_activations_in
from modeling_nanochat.training.scaling import accumulation_steps, count_parameters

# Values, in units of the hidden size, that autograd keeps of one token in one block: counted with saved_tensors_hooks
# on the compiled network (8 of them in the MLP); the eager one keeps 22. So 32 rows of d20 fit 80 GB, as upstream's do.
SAVED_PER_LAYER = 20
SAVED_PER_LAYER_ON_CPU = 18  # by torch.profiler's allocations of an eager step, without the probabilities
LIBRARIES_ON_CPU = 560 * 10**6  # resident before the first step, weights aside: Python, torch, the libraries, a shard
# glibc keeps freed blocks that it does not give out again as they are (aligned ones need room beside them): resident
# memory over that of the tensors that come and go, measured 1.4 to 2.9 at depths 2 to 6. Blocks mapped one by one would
# not do so, but cost a sixth of a step in page faults.
ALLOCATOR_SLACK = 2
# Of a checkpointed block: the stream before it and, in every second one, the value embeddings; measured beside them are
# what lies outside the blocks, and the block that is worked out anew.
SAVED_PER_CHECKPOINT = 2
SAVED_PER_STOCK_LAYER = 25  # of a stock block, counted so on eager Qwen3 and OLMo 2; 21 on Llama and Mistral
LOSS_COPIES = 3  # of a chunk of logits in float32 (a stock network: of all): logits, probabilities, their gradient
USABLE_MEMORY = 0.95  # what fragmentation and the libraries' own buffers leave
CPU_MICRO_BATCH_TOKENS = 4096  # on a CPU larger micro-batches are no faster (measured flat from 1024 to 8192)


def memory_per_device(
    config: PreTrainedConfig,
    rows: int,
    sequence_length: int,
    world_size: int,
    dtype: torch.dtype,
    device_type: str = "cuda",
    checkpointed: bool = False,
) -> dict[str, int]:
    """Estimated bytes of training on each of `world_size` devices, by use; `dtype` is that of the activations.

    Master weights are float32; with bfloat16 activations the embedding tables are bfloat16 too. The optimizer's state
    is split over the devices, weights and gradients are whole on each of them. `checkpointed` networks keep what goes
    into their blocks, and all of one block at a time.
    """
    counts, size = count_parameters(config), dtype.itemsize
    embeddings = counts.token_embedding + counts.value_embeddings
    weights = 4 * (counts.scaling + counts.scalars) + size * embeddings
    state = 4 * counts.matrices + 2 * (4 * counts.head + size * embeddings)  # momentum; two moments
    casts = size * counts.scaling if size < 4 else 0
    stock, on_cpu = not is_nanochat(config), device_type == "cpu"
    per_layer = SAVED_PER_STOCK_LAYER if stock else SAVED_PER_LAYER_ON_CPU if on_cpu else SAVED_PER_LAYER
    logits = rows * sequence_length * config.vocab_size if stock else CHUNK_ELEMENTS[device_type]
    per_token = per_layer * config.num_hidden_layers * config.hidden_size
    if on_cpu and not stock:  # SDPA, which stock networks have, keeps none
        per_token += kept_probabilities(config, sequence_length)
    if checkpointed:
        per_token = per_token // config.num_hidden_layers
        per_token += SAVED_PER_CHECKPOINT * config.num_hidden_layers * config.hidden_size
    slack = ALLOCATOR_SLACK if on_cpu else 1
    return {
        "libraries": LIBRARIES_ON_CPU if device_type == "cpu" else 0,
        "weights": weights,
        "gradients": weights,
        "optimizer state": state // world_size,
        "activations": slack * (rows * sequence_length * size * per_token + casts),
        "loss": slack * (LOSS_COPIES * 4 * logits + 4 * counts.head),
    }


def is_checkpointed(arguments: TrainingArguments) -> bool:
    """Whether every block keeps only what goes into it; before Transformers 5.23 the settings had other names."""
    wanted = getattr(arguments, "activation_checkpointing", None) or arguments.gradient_checkpointing
    how = getattr(arguments, "activation_checkpointing_kwargs", None) or arguments.gradient_checkpointing_kwargs
    return bool(wanted) and (how or {}).get("every_n_layers", 1) == 1


def kept_probabilities(config: PreTrainedConfig, length: int) -> int:
    """Of one token of a row: the probabilities that block attention keeps for the backward pass, all layers and heads;
    a query meets the keys before it in its window, on average over the row."""
    keys = 0
    for kind in config.layer_types:
        window = min(config.sliding_window if "sliding" in kind else length, length)
        if window < length or length <= LONGEST_FULL_ATTENTION:  # SDPA keeps none
            keys += window - window * window // (2 * length)
    return keys * config.num_attention_heads


def search_rows(most: int, fits: Callable[[int], bool]) -> int:
    """The largest power of two that divides `most` and fits; 0 if not even one row does."""
    rows = most & -most
    while rows and not fits(rows):
        rows //= 2
    return rows


def planned_rows(
    config: PreTrainedConfig,
    *,
    batch_tokens: int,
    sequence_length: int,
    world_size: int,
    memory_bytes: int,
    dtype: torch.dtype,
    device_type: str = "cuda",
    checkpointed: bool = False,
) -> int:
    """Rows of a micro-batch by formula: as many as fit `memory_bytes` and divide the global batch.

    Raises:
        ValueError: not even one row fits, or the global batch is no whole number of rows on every device.
    """
    accumulation_steps(batch_tokens, 1, sequence_length, world_size)  # explains a batch that cannot be divided

    def needed(rows: int) -> int:
        shape = (rows, sequence_length, world_size, dtype, device_type, checkpointed)
        return sum(memory_per_device(config, *shape).values())

    rows = search_rows(batch_tokens // (sequence_length * world_size), lambda rows: needed(rows) <= memory_bytes)
    if not rows:
        raise ValueError(
            f"one row of {sequence_length} tokens needs about {needed(1) / 1e9:.1f} GB of a device's "
            f"{memory_bytes / 1e9:.1f} GB usable; expected a smaller depth, more devices, "
            f"{'' if checkpointed else 'checkpointing (--activation_checkpointing true), '}or FSDP"
        )
    return rows


def rows_that_fit(
    config: PreTrainedConfig,
    *,
    batch_tokens: int,
    sequence_length: int,
    world_size: int,
    device: torch.device,
    dtype: torch.dtype,
    checkpointed: bool = False,
) -> int:
    """Rows of a micro-batch on this machine, the same on all ranks, which call this together: on an accelerator as many
    as it holds, on a CPU no more than make it faster.

    Raises:
        ValueError: not even one row fits, or the global batch is no whole number of rows on every device.
    """
    rows = planned_rows(
        config,
        batch_tokens=batch_tokens,
        sequence_length=sequence_length,
        world_size=world_size,
        memory_bytes=usable_memory(device, world_size),
        dtype=dtype,
        device_type=device.type,
        checkpointed=checkpointed,
    )
    if device.type == "cpu":
        rows = search_rows(rows, lambda rows: rows == 1 or rows * sequence_length <= CPU_MICRO_BATCH_TOKENS)
    else:
        reserved = memory_per_device(config, rows, sequence_length, world_size, dtype)["optimizer state"]
        rows = rows_that_run(config, rows, sequence_length, device, dtype, reserved, checkpointed)
    return min(gather_object([rows]))


def usable_memory(device: torch.device, world_size: int) -> int:
    """Bytes of a device that a run may take; the processes of a run on CPUs share what is free."""
    if device.type == "cuda":
        return int(USABLE_MEMORY * torch.cuda.get_device_properties(device).total_memory)
    return psutil.virtual_memory().available // world_size + LIBRARIES_ON_CPU  # which this process has already


def rows_that_run(
    config: PreTrainedConfig,
    most: int,
    sequence_length: int,
    device: torch.device,
    dtype: torch.dtype,
    reserved_bytes: int,
    checkpointed: bool = False,
) -> int:
    """At most `most` rows, of which a training step really runs on the device; `ValueError` if not even one does."""
    step = partial(run_one_step, config, sequence_length, device, dtype, reserved_bytes, checkpointed)
    rows = search_rows(most, lambda rows: one_step_fits(partial(step, rows), device))
    if not rows:
        raise ValueError(
            f"{device} ran out of memory with a single row of {sequence_length} tokens of this network; "
            "expected a smaller depth, a shorter sequence_length, more devices, or nothing else running there"
        )
    return rows


def one_step_fits(step: Callable[[], None], device: torch.device) -> bool:
    """Whether the device has the memory for a step."""
    try:
        step()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:  # the step's tensors are gone with its frame; give their memory back
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_one_step(
    config: PreTrainedConfig,
    sequence_length: int,
    device: torch.device,
    dtype: torch.dtype,
    reserved_bytes: int,
    checkpointed: bool,
    rows: int,
) -> None:
    """Forward and backward of a fresh network on zeros, beside `reserved_bytes` for the optimizer's state."""
    with device:
        model = fresh_network(config).train()
        reserved = torch.empty(reserved_bytes, dtype=torch.uint8)
        ids = torch.zeros(rows, sequence_length, dtype=torch.int64)  # (B, T)
    run_activations_in(model, dtype, device)
    if checkpointed:  # by its name before Transformers 5.23, if it has no other
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    labels = {} if is_nanochat(config) else {"labels": ids}
    model(input_ids=ids, shift_labels=ids, use_cache=False, **labels).loss.backward()
    del reserved
