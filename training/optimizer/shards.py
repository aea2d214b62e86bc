"""How the parameters of an optimizer are dealt to the ranks, and how gradients and results travel (ZeRO-2).

A part of the layout is either the matrices of one shape (whole matrices dealt to ranks) or the AdamW tensors of one
group (blocks of rows dealt to ranks, tiny tensors stepped everywhere). Each goes through the same three phases, which
the optimizer runs for all parts in turn so that communication hides behind compute: `launch_reduction`, `update`,
`finish`. With one rank, and for tensors that FSDP2 has sharded, nothing is sent. The price is memory for the exchange:
the padded stacks of gradients live until their reduction, the gathered results until `finish`.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from modeling_nanochat.training.devices import choose_dtype
from modeling_nanochat.training.optimizer.matrices import WHOLE, Split
from modeling_nanochat.training.optimizer.updates import adamw_update, muon_update, orthogonalize

REPLICATED_BELOW = 1024  # elements; smaller AdamW tensors are stepped on every rank (upstream's threshold)


class Ranks(NamedTuple):
    """The processes that share the work, and this one's place among them."""

    group: dist.ProcessGroup | None
    rank: int
    size: int


ALONE = Ranks(None, 0, 1)


def find_ranks(process_group: dist.ProcessGroup | None) -> Ranks:
    """The ranks of a process group, by default of all processes there are."""
    if not dist.is_initialized():
        return ALONE
    return Ranks(process_group, dist.get_rank(process_group), dist.get_world_size(process_group))


def block_of(count: int, ranks: Ranks) -> tuple[int, int, int]:
    """Equal blocks of `count` rows, the last ones short or empty: (rows in a block, own start, own end)."""
    block = -(-count // ranks.size)
    start = min(ranks.rank * block, count)
    return block, start, min(start + block, count)


def gradient_of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class Exchange:
    """A tensor that a collective operation is filling."""

    def __init__(self, result: Tensor, work: dist.Work | None = None):
        self.result, self.work = result, work

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.result


def reduce_scatter(padded: Tensor, ranks: Ranks) -> Exchange:
    """Average (size * block, ...) over the ranks; each receives its own (block, ...)."""
    if ranks.size == 1:
        return Exchange(padded)
    own = padded.new_empty(padded.size(0) // ranks.size, *padded.shape[1:])
    work = dist.reduce_scatter_tensor(own, padded, op=dist.ReduceOp.AVG, group=ranks.group, async_op=True)
    return Exchange(own, work)


def all_reduce(x: Tensor, ranks: Ranks) -> Exchange:
    """Average a tensor over the ranks, the same result everywhere; x itself stays as it is."""
    if ranks.size == 1:
        return Exchange(x)
    mean = x.clone(memory_format=torch.contiguous_format)
    return Exchange(mean, dist.all_reduce(mean, op=dist.ReduceOp.AVG, group=ranks.group, async_op=True))


def all_gather(own: Tensor, ranks: Ranks, into: Tensor | None = None) -> Exchange:
    """Collect every rank's (block, ...) into (size * block, ...)."""
    if ranks.size == 1:
        return Exchange(own)
    whole = own.new_empty(ranks.size * own.size(0), *own.shape[1:]) if into is None else into
    return Exchange(whole, dist.all_gather_into_tensor(whole, own, group=ranks.group, async_op=True))


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """(n, ...) with zeros below, up to `rows`; x itself if it has them and lies in one piece."""
    if x.size(0) == rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(rows - x.size(0), *x.shape[1:])])


class MuonStack:
    """Matrices of one shape and one group, updated in stacks of (K, m, n). A rank owns whole parameters.

    Parameters of several matrices (`split`) are taken apart for the update. Those that FSDP2 has cut are first made
    whole on every rank, and so is their state; but a stack of experts is cut between experts, each of which is whole.
    """

    def __init__(
        self,
        group_index: int,
        parameters: list[Tensor],
        ranks: Ranks,
        compiled: bool = False,
        split: Split = WHOLE,
    ):
        self.group_index, self.parameters, self.split = group_index, parameters, split
        is_cut = isinstance(parameters[0], DTensor)
        self.is_exchanged = is_cut and split.is_whole and parameters[0].ndim == 2
        self.ranks, self.compiled = ALONE if is_cut else ranks, compiled and not self.is_exchanged
        self.orthogonalize = orthogonalize_exchanged if self.is_exchanged else orthogonalize
        self.block, start, end = block_of(len(parameters), self.ranks)
        self.owned = parameters[start:end]

    def whole(self, x: Tensor) -> Tensor:
        """The matrices of a parameter or its gradient, as this rank steps them."""
        x = x.detach()
        if self.is_exchanged or not isinstance(x, DTensor):
            return x
        return x.to_local() if x.ndim == 3 else x.full_tensor()

    def owned_rows(self) -> list[tuple[Tensor, slice]]:
        """The parameters whose state is kept here, with the rows of them that it is for."""
        return [(parameter, slice(None)) for parameter in self.owned]

    def take_state(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Copy the state there is into stacks, zeros where there is none, and leave views of them in its place."""
        if not self.owned:
            return
        stack = torch.stack([self.whole(parameter) for parameter in self.owned])  # (k, m, n) or (k, E, m, n)
        self.buffers = []
        views: list[dict[str, Tensor]] = [{} for _ in self.owned]
        matrices = self.split.take_apart(stack)
        for number, part in enumerate(matrices):  # (k * E, rows, columns)
            rows, columns = part.shape[-2:]
            second_moment = part[:, :, :1] if rows >= columns else part[:, :1, :]
            pair = {
                "momentum_buffer": torch.zeros_like(part, memory_format=torch.contiguous_format),
                "second_moment": torch.zeros_like(second_moment, memory_format=torch.contiguous_format),
            }
            self.buffers.append(pair)
            for name, buffer in pair.items():
                of_parameters = buffer.unflatten(0, stack.shape[:-2]) if stack.ndim == 4 else buffer
                for i, view in enumerate(of_parameters):
                    views[i][name if len(matrices) == 1 else f"{name}_{number}"] = view
        for parameter, own in zip(self.owned, views):
            for name, value in state[parameter].items():
                own[name].copy_(value if self.is_exchanged else local_of(value))
            state[parameter] = {name: self.as_placed(view, parameter) for name, view in own.items()}

    def as_placed(self, view: Tensor, parameter: Tensor) -> Tensor:
        """A view of the state, which for experts that FSDP2 has dealt out says which of them it is for."""
        if self.is_exchanged or not isinstance(parameter, DTensor) or parameter.ndim == 2:
            return view
        shape = torch.Size((parameter.size(0), *view.shape[1:]))
        stride = (shape[1] * shape[2], shape[2], 1)
        return DTensor.from_local(
            view, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
        )

    def launch_reduction(self) -> None:
        grads = [self.whole(gradient_of(parameter)) for parameter in self.parameters]
        padding = [torch.zeros_like(grads[0])] * (self.ranks.size * self.block - len(grads))
        self.grads = reduce_scatter(torch.stack(grads + padding), self.ranks)  # (size * block, m, n)

    def update(self, group: dict[str, Any]) -> None:
        grads = self.grads.wait()  # (block, m, n), of which the first k are matrices
        del self.grads
        k = len(self.owned)
        padding = [torch.zeros_like(self.whole(self.parameters[0]))] * (self.block - k)
        stack = torch.stack([self.whole(parameter) for parameter in self.owned] + padding)  # (block, m, n)
        if k and stack.numel():
            update = compiled_muon_update() if self.compiled else muon_update
            settings = self._settings(group, grads)
            matrices = self.split.take_apart(stack[:k])
            for part, grad, buffers in zip(matrices, self.split.take_apart(grads[:k]), self.buffers):
                update(part, grad, *buffers.values(), self.orthogonalize, **settings)
            if not self.split.is_whole:
                stack[:k] = self.split.put_together(matrices, stack.shape[1:])
        self.results = all_gather(stack, self.ranks)

    def _settings(self, group: dict[str, Any], grads: Tensor) -> dict[str, Any]:
        """What `muon_update` takes from the group; for compiled code 0-dim tensors of what schedules change."""
        settings = {name: group[name] for name in ("lr", "weight_decay", "momentum", "beta2")}
        if self.compiled:
            dtypes = (torch.float32, torch.float32, grads.dtype, grads.dtype)
            settings = {name: torch.tensor(settings[name], dtype=dtype) for name, dtype in zip(settings, dtypes)}
        options = {name: group[name] for name in ("ns_steps", "row_equilibration", "frobenius_renormalization")}
        return settings | options | {"polar_dtype": choose_dtype(group["polar_dtype"], grads.device)}

    def finish(self) -> None:
        results = self.results.wait()  # (size * block, m, n)
        del self.results
        for parameter, result in zip(self.parameters, results.unbind(0)):
            if self.is_exchanged or not isinstance(parameter, DTensor):
                parameter.copy_(result)
            elif parameter.ndim == 3:
                parameter.to_local().copy_(result)
            else:  # all ranks have computed all of it: each keeps its rows
                whole = DTensor.from_local(result, parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim)
                parameter.copy_(whole.redistribute(placements=parameter.placements))


def orthogonalize_exchanged(x: DTensor, *settings: Any) -> DTensor:
    """`orthogonalize` of (K, m, n) that FSDP2 has cut: the matrices are exchanged so that each rank has whole ones, a
    share of K, and go back to their placement afterwards."""
    whole = [Shard(0) if placement.is_shard() else placement for placement in x.placements]
    exchanged = x.redistribute(placements=whole)
    result = orthogonalize(exchanged.to_local(), *settings)
    result = DTensor.from_local(result, x.device_mesh, whole, run_check=False, shape=x.shape, stride=exchanged.stride())
    return result.redistribute(placements=x.placements)


class AdamWTensors:
    """The AdamW tensors of one group, any shapes. A rank owns a block of rows of each; tiny ones are everybody's."""

    def __init__(self, group_index: int, parameters: list[Tensor], ranks: Ranks):
        self.group_index = group_index
        self.shards = [RowShard(parameter, ranks) for parameter in parameters]

    def owned_rows(self) -> list[tuple[Tensor, slice]]:
        """The parameters whose state is kept here, with the rows of them that it is for."""
        return [(shard.parameter, shard.rows) for shard in self.shards if shard.own().numel()]

    def take_state(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Take over the state there is, zeros where there is none."""
        for shard in self.shards:
            if shard.own().numel():
                shard.state = shard.zero_state()
                for name, value in state[shard.parameter].items():
                    shard.state[name].copy_(value)
                state[shard.parameter] = shard.state

    def launch_reduction(self) -> None:
        for shard in self.shards:
            shard.launch_reduction()

    def update(self, group: dict[str, Any]) -> None:
        arguments = [shard.arguments() for shard in self.shards if shard.own().numel()]
        if arguments:
            settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            adamw_update(*map(list, zip(*arguments)), **settings)
        for shard in self.shards:
            shard.launch_gather()

    def finish(self) -> None:
        for shard in self.shards:
            shard.finish()


class RowShard:
    """One AdamW tensor and the rows of it that this rank steps: a block, or all of them if it is tiny, if there is one
    rank, or if FSDP2 has cut it (then the rows this rank has)."""

    def __init__(self, parameter: Tensor, ranks: Ranks):
        self.parameter = parameter
        self.ranks = ALONE if isinstance(parameter, DTensor) else ranks
        self.is_split = self.ranks.size > 1 and parameter.numel() >= REPLICATED_BELOW
        self.rows = slice(None)
        if self.is_split:
            self.block, start, end = block_of(parameter.size(0), ranks)
            self.rows = slice(start, end)

    def local(self) -> Tensor:
        return local_of(self.parameter.detach())

    def own(self) -> Tensor:
        """The rows to step: a view into the parameter."""
        return self.local()[self.rows] if self.is_split else self.local()

    def zero_state(self) -> dict[str, Tensor]:
        like = self.parameter.detach() if isinstance(self.parameter, DTensor) else self.own()
        step = torch.zeros((), dtype=torch.float32, device=like.device)
        return {"step": step, "exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}

    def launch_reduction(self) -> None:
        grad = local_of(gradient_of(self.parameter))
        if self.is_split:
            self.grad = reduce_scatter(pad_rows(grad, self.ranks.size * self.block), self.ranks)
        else:
            self.grad = all_reduce(grad, self.ranks)

    def arguments(self) -> tuple[Tensor, ...]:
        """Parameter, gradient and state of the own rows, as `adamw_update` takes them."""
        own, grad = self.own(), self.grad.wait()
        if self.is_split:
            grad = grad[: own.size(0)]
        return own, grad, local_of(self.state["exp_avg"]), local_of(self.state["exp_avg_sq"]), self.state["step"]

    def launch_gather(self) -> None:
        self.grad.wait()  # also where there are no own rows
        del self.grad
        if self.is_split:
            whole, padded_rows = self.local(), self.ranks.size * self.block
            in_place = whole.size(0) == padded_rows and whole.is_contiguous()
            self.whole = all_gather(pad_rows(self.own(), self.block), self.ranks, into=whole if in_place else None)

    def finish(self) -> None:
        if self.is_split:
            whole = self.whole.wait()
            del self.whole
            if whole.data_ptr() != self.local().data_ptr():
                self.local().copy_(whole[: self.parameter.size(0)])


def local_of(x: Tensor) -> Tensor:
    """What this rank has of a tensor that FSDP2 has cut; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


# ---------------------------------------------------------------- compilation


@cache
def compiled_muon_update() -> Callable[..., None]:
    """`muon_update` compiled: once for each shape, whatever the hyperparameters."""
    return torch.compile(muon_update, dynamic=False, fullgraph=True)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds what it builds kernels with: a C++ compiler, and for GPUs Triton."""
    compilers = (os.environ.get("CXX"), "g++", "clang++", "cl")
    has_compiler = any(compiler and shutil.which(compiler) for compiler in compilers)
    return has_compiler and (device.type == "cpu" or find_spec("triton") is not None)
