"""MuonAdamW: Muon for the matrices inside the blocks, AdamW for the rest, in one optimizer for one or many ranks.

Several ranks share the work and the state (ZeRO-2): every rank holds all parameters and its own gradients; `step`
averages the gradients, updates what the rank owns, and gathers the results. So no DDP is needed. All reductions are
launched first, and gathers run behind the updates that follow. Parameters that FSDP2 has sharded stay sharded: their
gradients are reduced already, and only the orthogonalisation exchanges matrices. The price of owning the communication:
every rank must call `step` together, and a parameter without a gradient counts as one with a gradient of zeros.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modeling_nanochat.training.devices import parse_dtype
from modeling_nanochat.training.optimizer.matrices import Split
from modeling_nanochat.training.optimizer.shards import (
    ALONE,
    AdamWTensors,
    MuonStack,
    Ranks,
    can_compile,
    find_ranks,
)
from modeling_nanochat.training.optimizer.updates import POLAR_EXPRESS_COEFFICIENTS

MUON_DEFAULTS: dict[str, Any] = {
    "momentum": 0.95,
    "beta2": 0.95,
    "weight_decay": 0.0,
    "ns_steps": 5,
    "polar_dtype": "auto",
    "row_equilibration": False,
    "frobenius_renormalization": False,
    "transposed": False,
    "repeats": 1,
    "parts": None,
}
ADAMW_DEFAULTS: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW by groups, for one rank or many, with 1/N of the state on each of N ranks.

    A group is a dict with `params`, `lr` and `use_muon`. True takes matrices and `momentum`, `beta2`, `weight_decay`,
    `ns_steps`, `polar_dtype` (a torch dtype or its name, or "auto": bfloat16 where the hardware multiplies it),
    `row_equilibration` and `frobenius_renormalization`, and for fused matrices `transposed`, `repeats`, `parts`
    (`matrices.py`); False takes `betas`, `eps`, `weight_decay`. Rates, betas, momentum and decay may change from step
    to step, without recompilation.

    `state[parameter]` holds what this rank owns: for Muon `momentum_buffer` (m, n) and `second_moment` (m, 1) or (1, n)
    of whole matrices (of fused ones a numbered pair for each part), for AdamW `step`, `exp_avg`, `exp_avg_sq` of a
    block of rows. So `state_dict()` is this rank's own part; `merge_state_dicts` makes the whole of all parts, and
    `load_state_dict` takes either.

    Args:
        param_groups: the groups.
        process_group: the ranks that share the work; all of torch.distributed if it is initialised.
        compile: whether Muon's update is compiled. By default it is on GPUs, where a compiler is found; on a CPU the
            products take most of the time, and compiling takes longer than it saves in a short run.
        shared: whether ranks share the work. False: every rank has the whole state and does everything, for gradients
            that are averaged already, as DDP leaves them, and trainers that save rank 0's state for all.

    Raises:
        ValueError: for a group that is not like this.
    """

    _layout: "list[MuonStack | AdamWTensors] | None" = None  # built at the first step, when the parameters are final

    def __init__(
        self,
        param_groups: Iterable[dict[str, Any]],
        process_group: dist.ProcessGroup | None = None,
        compile: bool | None = None,
        shared: bool = True,
    ):
        self.process_group, self.compile, self.shared = process_group, compile, shared
        super().__init__(param_groups, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_group(param_group)
        defaults = MUON_DEFAULTS if param_group["use_muon"] else ADAMW_DEFAULTS
        super().add_param_group(defaults | param_group)
        self._layout = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update all parameters by their gradients, averaged over the ranks; all ranks call this together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._layout is None:
            self._layout = self.layout(self._ranks())
            for part in self._layout:
                part.take_state(self.state)
        for part in self._layout:
            part.launch_reduction()
        for part in self._layout:
            part.update(self.param_groups[part.group_index])
        for part in self._layout:
            part.finish()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state over: this rank's own part, or the whole of all ranks, of which this rank's part is kept.

        Raises:
            ValueError: if what this rank owns is not in it.
        """
        super().load_state_dict(self._own_part(state_dict))
        self._layout = None

    def merge_state_dicts(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The whole state, as one rank alone would have it, from the `state_dict()` of every rank in their order.

        So a run may go on with another number of ranks. Raises ValueError if the parts do not make a whole.
        """
        state = {}
        for key, parameter in zip(parameters_of(parts[0]["param_groups"]), parameters_of(self.param_groups)):
            entries = [part["state"][key] for part in parts if key in part["state"]]
            if entries:
                state[key] = merge_entries(entries, parameter)
        return {"state": state, "param_groups": parts[0]["param_groups"]}

    def _own_part(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        keys, parameters = parameters_of(state_dict["param_groups"]), parameters_of(self.param_groups)
        if not state_dict["state"] or len(keys) != len(parameters):
            return state_dict  # nothing to cut, or something that the parent class refuses
        key_of = dict(zip(parameters, keys))
        own = {}
        for part in self.layout(self._ranks()):
            for parameter, rows in part.owned_rows():
                key = key_of[parameter]
                if key not in state_dict["state"]:
                    raise ValueError(
                        f"the optimizer state has nothing for parameter {key} of shape {tuple(parameter.shape)}, which "
                        "this rank owns; was it saved by another number of ranks? Merge all parts first"
                    )
                own[key] = cut_entry(state_dict["state"][key], parameter, rows)
        return state_dict | {"state": own}

    def _ranks(self) -> Ranks:
        return find_ranks(self.process_group) if self.shared else ALONE

    def layout(self, ranks: Ranks) -> "list[MuonStack | AdamWTensors]":
        """Deal the parameters to the ranks: a part for each shape of Muon matrices, and for each AdamW group."""
        layout: list[MuonStack | AdamWTensors] = []
        for index, group in enumerate(self.param_groups):
            if not group["use_muon"]:
                layout.append(AdamWTensors(index, group["params"], ranks))
                continue
            stacks = defaultdict(list)
            for parameter in group["params"]:
                placements = getattr(parameter, "placements", None)  # of FSDP2
                stacks[(parameter.shape, parameter.dtype, parameter.device, placements)].append(parameter)
            split = Split(group["transposed"], group["repeats"], group["parts"])
            layout += [
                MuonStack(index, stack, ranks, self._compiles(stack[0].device), split) for stack in stacks.values()
            ]
        return layout

    def _compiles(self, device: torch.device) -> bool:
        wanted = device.type != "cpu" if self.compile is None else self.compile
        return wanted and can_compile(device)


def check_group(group: dict[str, Any]) -> None:
    """Say what is wrong with a parameter group.

    Raises:
        ValueError: if something is.
    """
    use_muon = group.get("use_muon")
    if use_muon not in (True, False):
        raise ValueError(f"use_muon of a parameter group is {use_muon!r}, expected True (Muon) or False (AdamW)")
    if "lr" not in group:
        raise ValueError(f"a parameter group has no lr; it has {sorted(group)}")
    if not use_muon:
        return
    settings = MUON_DEFAULTS | group
    split = Split(settings["transposed"], settings["repeats"], settings["parts"])
    for parameter in group["params"]:
        if parameter.ndim not in (2, 3):
            raise ValueError(f"Muon steps matrices only, got a parameter of shape {tuple(parameter.shape)}")
        split.check(parameter.shape)
    most = len(POLAR_EXPRESS_COEFFICIENTS)
    if not 1 <= settings["ns_steps"] <= most:
        raise ValueError(f"ns_steps is {settings['ns_steps']}, expected 1 to {most}, the coefficients there are")
    parse_dtype(settings["polar_dtype"], "polar_dtype")


def parameters_of(groups: list[dict[str, Any]]) -> list[Any]:
    """All parameters of an optimizer's groups, or what stands for them in those of a state dict."""
    return [parameter for group in groups for parameter in group["params"]]


def merge_entries(entries: list[dict[str, Tensor]], parameter: Tensor) -> dict[str, Tensor]:
    """The whole state of one parameter from that of all ranks that have any, in their order: Muon's is on one rank,
    that of tiny tensors the same on all, the rest in blocks of rows."""
    first = entries[0]
    if "exp_avg" not in first or first["exp_avg"].shape == parameter.shape:
        return first
    whole = {name: torch.cat([entry[name] for entry in entries]) for name in ("exp_avg", "exp_avg_sq")}
    if whole["exp_avg"].shape != parameter.shape:
        raise ValueError(
            f"the parts of an optimizer state make {tuple(whole['exp_avg'].shape)} for a parameter of shape "
            f"{tuple(parameter.shape)}; expected the parts of all ranks, each once"
        )
    return {"step": first["step"]} | whole


def cut_entry(entry: dict[str, Tensor], parameter: Tensor, rows: slice) -> dict[str, Tensor]:
    """The own rows of one parameter's state, which may be whole or cut already."""
    if "exp_avg" not in entry:
        return entry
    start, end, _ = rows.indices(parameter.size(0)) if parameter.ndim else (0, 1, 1)
    cut = {}
    for name, value in entry.items():
        if name != "step" and value.shape == parameter.shape and parameter.ndim:
            value = value[rows]
        if name != "step" and parameter.ndim and value.size(0) != end - start:
            raise ValueError(
                f"{name} in the optimizer state has shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(parameter.shape)} of which this rank owns rows {start} to {end}; was it saved by another "
                "number of ranks? Merge all parts first"
            )
        cut[name] = value
    return cut
