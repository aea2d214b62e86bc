"""The parameters of a network to the optimizer's groups, by the table of an era (`eras.py`).

A row says by pattern which parameters it takes, which of the four base rates is theirs and times what (or a rate that
nothing scales), whether their rate falls with the width of the network, and their other settings. The first row that
matches takes the parameter, and one that no row takes is an error: nothing trains by accident, or not at all.

The parameters of a stock network are sorted by what they are (`sorting.py`), and each kind has the row of what is most
like it in nanochat. Its embedding begins smaller (`initializer_range`, not 1), so it has that much of the rate.
"""

import re
from dataclasses import replace
from typing import Any

from torch import nn

from modeling_nanochat.training.architectures import is_nanochat
from modeling_nanochat.training.optimizer.eras import REFERENCE_HIDDEN_SIZE, GroupRow, optimizer_era
from modeling_nanochat.training.optimizer.sorting import KINDS, MATRIX, sort_parameters
from modeling_nanochat.training.scaling import learning_rate_scale

# The row of nanochat's table for each kind of a stock network's parameters: norms begin at 1, as the residual weights.
ROWS_OF_KINDS = dict.fromkeys(KINDS, "head") | {
    MATRIX: "matrices",
    "embedding": "token_embedding",
    "vector": "resid_lambdas",
}


def build_param_groups(
    model: nn.Module,
    *,
    era: str = "seed",
    batch_tokens: int,
    weight_decay: float,
    init_lr_frac: float = 1.0,
    polar_dtype: str = "auto",
    **base_rates: float,
) -> list[dict[str, Any]]:
    """The groups of `MuonAdamW` for a network; parameters that need no gradient are left out.

    Args:
        model: a `NanoChatGPTForCausalLM`, of any era, or its base; or a stock network.
        era: whose rates, betas and Muon options: a row of `OPTIMIZER_ERAS`.
        batch_tokens: tokens of one optimizer step over all devices; base rates grow with its square root.
        weight_decay: Muon's at the first step, as it is.
        init_lr_frac: all rates times this, the unscaled ones too, as in upstream's finetuning.
        polar_dtype: precision of Muon's orthogonalisation: "bfloat16", "float32" or "auto".
        base_rates: in the place of the era's `unembedding_lr`, `embedding_lr`, `scalar_lr`, `matrix_lr`.

    Raises:
        ValueError: for an unknown era or rate, or a parameter that no row of the table takes.
    """
    row_of_era = optimizer_era(era)
    if unknown := sorted(set(base_rates) - set(row_of_era.base_rates)):
        raise ValueError(f"no such base rate: {', '.join(unknown)}; expected {', '.join(row_of_era.base_rates)}")
    rates = row_of_era.base_rates | base_rates
    batch, width = learning_rate_scale(batch_tokens), (model.config.hidden_size / REFERENCE_HIDDEN_SIZE) ** -0.5
    groups = []
    assign = assign_rows if is_nanochat(model.config) else assign_kinds
    for row, parameters in assign(model, row_of_era.groups):
        # Upstream's order of products: rates are its rates to the last digit.
        lr = rates[row.rate] * batch if isinstance(row.rate, str) else row.rate
        lr = lr * (width if row.width_scaled else 1.0) * row.times * init_lr_frac
        group = {"name": row.name, "params": parameters, "lr": lr, **row.settings}
        if row.settings["use_muon"]:
            group |= {"weight_decay": weight_decay, "polar_dtype": polar_dtype}
        groups.append(group)
    return groups


def assign_rows(model: nn.Module, table: tuple[GroupRow, ...]) -> list[tuple[GroupRow, list[nn.Parameter]]]:
    """Every trainable parameter to the first row that matches its name; rows without any are left out."""
    taken = {row.name: [] for row in table}
    homeless = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        row = next((row for row in table if re.search(row.pattern, name)), None)
        if row is None:
            homeless.append(name)
        else:
            taken[row.name].append(parameter)
    if homeless:
        raise ValueError(
            f"no group of the optimizer takes {', '.join(homeless)}; expected parameters of a nanochat network"
        )
    return [(row, taken[row.name]) for row in table if taken[row.name]]


def assign_kinds(model: nn.Module, table: tuple[GroupRow, ...]) -> list[tuple[GroupRow, list[nn.Parameter]]]:
    """The same for a stock network: a row for each kind, and for each way of splitting matrices."""
    rows = {row.name: row for row in table}
    taken: dict[Any, list[nn.Parameter]] = {}
    for each in sort_parameters(model):
        taken.setdefault((each.kind, each.split), []).append(each.parameter)
    assigned = []
    for (kind, split), parameters in taken.items():
        row = rows[ROWS_OF_KINDS[kind]]
        if kind == "embedding":
            row = replace(row, times=row.times * getattr(model.config, "initializer_range", 1.0))
        settings = row.settings | (split._asdict() if kind == MATRIX else {})
        assigned.append((replace(row, name=f"{kind} {split.parts or ''}".strip(), settings=settings), parameters))
    return assigned
