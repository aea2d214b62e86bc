"""What makes a device wait for the host, found while it happens: on a GPU by CUDA's own debug mode, anywhere else by a
mode that sees every operation.

The mode needs no GPU. On real CPU tensors it finds the questions that code asks of a tensor (`.item()`, `nonzero`,
boolean indexing); on meta tensors, which take the paths that a GPU takes and compute nothing, it also finds copies to
and from the host and operations that mix devices. Neither sees what a fused kernel does inside.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations whose result's size or value the host must know before it can go on.
ASKS = {
    torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default, torch.ops.aten._unique2.default, torch.ops.aten.unique_dim.default,
    torch.ops.aten.unique_consecutive.default, torch.ops.aten.equal.default, torch.ops.aten.bincount.default,
}  # fmt: skip
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class WaitsForHost(AssertionError):
    """An operation inside a training step that makes the device wait."""


class FailOnHost(TorchDispatchMode):
    """Raises `WaitsForHost` at the operation, so that the traceback shows the line. `shapes` are the operations that
    went by, in order, each with the shapes of what it gave. Compiled code runs uncompiled inside: no mode sees its
    operations, and from torch 2.14 on it would be an error."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple] = []

    def __enter__(self):
        self.uncompiled = torch.compiler.set_stance("force_eager")  # acts from here on
        return super().__enter__()

    def __exit__(self, *error):
        self.uncompiled.__exit__(*error)
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation in ASKS or self._is_boolean_index(operation, args):
            raise WaitsForHost(f"{operation} asks the device")
        self._check_devices(operation, args, kwargs)
        result = operation(*args, **kwargs)
        tensors = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.shapes.append((str(operation), *(tuple(each.shape) for each in tensors)))
        return result

    @staticmethod
    def _is_boolean_index(operation, args) -> bool:
        if operation not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            return False
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])

    @staticmethod
    def _check_devices(operation, args, kwargs) -> None:
        """A number on the host (0-dim) may go into a kernel as an argument; anything else has to be on the device."""
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        devices = {each.device.type for each in tensors if each.ndim or each.device.type != "cpu"}
        if operation in COPIES:
            devices = {each.device.type for each in tensors}
            if kwargs.get("device") is not None:
                devices.add(torch.device(kwargs["device"]).type)
        if len(devices) > 1:
            raise WaitsForHost(f"{operation} mixes {' and '.join(sorted(devices))}")


@contextmanager
def no_waiting(device: torch.device) -> Iterator[FailOnHost | None]:
    """Fails where the host waits for the device or copies to it; on a GPU by CUDA's own word, with `RuntimeError`."""
    if device.type != "cuda":
        with FailOnHost() as mode:
            yield mode
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield None
    finally:
        torch.cuda.set_sync_debug_mode(before)
