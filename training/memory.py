"""The largest micro-batch that a GPU really holds: the estimate, tried out, and halved while it does not fit.

The estimate (`training/scaling.py`) counts what a compiled step keeps; kernels, fragmentation and other processes on
the device are not in it. So one eager forward and backward pass runs on a throw-away network, with as much memory set
aside as the optimizer will need. The price is some seconds before the run, and rows that only a compiled step holds.
"""

import torch

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM


def rows_that_fit(
    config: NanoChatGPTConfig,
    rows: int,
    sequence_length: int,
    device: torch.device,
    dtype: torch.dtype,
    reserved_bytes: int,
) -> int:
    """At most `rows`, halved until a training step of so many rows fits the device.

    Args:
        config: the network.
        rows: the estimate, a power of two.
        sequence_length: T.
        device, dtype: where, and in which precision of activations.
        reserved_bytes: what must stay free beside weights, gradients and activations: the optimizer's state.

    Raises:
        ValueError: not even one row fits.
    """
    while True:
        try:
            run_one_step(config, rows, sequence_length, device, dtype, reserved_bytes)
            return rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise ValueError(
                    f"{device} ran out of memory with a single row of {sequence_length} tokens of this network; "
                    "expected a smaller depth, a shorter sequence_length, more devices, or nothing else running there"
                ) from None
            rows //= 2
        finally:  # the step's tensors are gone with its frame; give their memory back
            if device.type == "cuda":
                torch.cuda.empty_cache()


def run_one_step(
    config: NanoChatGPTConfig,
    rows: int,
    sequence_length: int,
    device: torch.device,
    dtype: torch.dtype,
    reserved_bytes: int,
) -> None:
    """Forward and backward of a fresh network on zeros, beside an allocation of `reserved_bytes`."""
    with device:
        model = NanoChatGPTForCausalLM(config).train()
        reserved = torch.empty(reserved_bytes, dtype=torch.uint8)
        ids = torch.zeros(rows, sequence_length, dtype=torch.int64)  # (B, T)
    model.set_activation_dtype(dtype)
    model(input_ids=ids, shift_labels=ids).loss.backward()
    del reserved
