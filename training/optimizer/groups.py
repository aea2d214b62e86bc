"""Named parameters of a nanochat network to the optimizer's groups, by a table for each era.

A row says by pattern which parameters it takes, which of the four base rates is theirs and times what, whether their
rate falls with the width of the network, and their other settings. The first row that matches takes the parameter, and
one that no row takes is an error: nothing trains by accident, or not at all.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from modeling_nanochat.training import scaling

REFERENCE_HIDDEN_SIZE = 768  # the width at which upstream tuned the rates of embeddings and head
ERAS = ("seed", "head")


@dataclass(frozen=True)
class GroupRow:
    """One row of the table; `settings` go into the group as they are."""

    name: str
    pattern: str
    rate: str
    times: float = 1.0
    width_scaled: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


# Base rates and settings: upstream, 2026-02-01 (seed) and 2026-07-03 (head).
BASE_RATES = {
    "seed": {"unembedding_lr": 0.004, "embedding_lr": 0.3, "scalar_lr": 0.5, "matrix_lr": 0.02},
    "head": {"unembedding_lr": 0.008, "embedding_lr": 0.3, "scalar_lr": 0.5, "matrix_lr": 0.02},
}
HEAD, TOKENS, VALUES = r"\blm_head\.weight$", r"\bembed_tokens\.weight$", r"\bvalue_embeddings\.\d+\.weight$"
RESID, X0, SMEAR_BACKOUT = r"\bresid_lambdas$", r"\bx0_lambdas$", r"\b(smear_gate\.weight|smear_lambda|backout_lambda)$"
MATRICES = r"\blayers\.\d+\..+\.weight$"  # the small gates too


def adamw(beta1: float, beta2: float, weight_decay: float = 0.0) -> dict[str, Any]:
    return {"use_muon": False, "betas": (beta1, beta2), "eps": 1e-10, "weight_decay": weight_decay}


def muon(beta2: float, **options: Any) -> dict[str, Any]:
    return {"use_muon": True, "beta2": beta2, "ns_steps": 5, **options}


TABLES = {
    "seed": (
        GroupRow("head", HEAD, "unembedding_lr", 1.0, True, adamw(0.8, 0.95)),
        GroupRow("token_embedding", TOKENS, "embedding_lr", 1.0, True, adamw(0.8, 0.95)),
        GroupRow("value_embeddings", VALUES, "embedding_lr", 1.0, True, adamw(0.8, 0.95)),
        GroupRow("resid_lambdas", RESID, "scalar_lr", 0.01, False, adamw(0.8, 0.95)),
        GroupRow("x0_lambdas", X0, "scalar_lr", 1.0, False, adamw(0.96, 0.95)),
        GroupRow("smear_backout", SMEAR_BACKOUT, "scalar_lr", 0.4, False, adamw(0.8, 0.95)),  # a head-era network
        GroupRow("matrices", MATRICES, "matrix_lr", 1.0, False, muon(0.95)),
    ),
    "head": (
        GroupRow("head", HEAD, "unembedding_lr", 1.0, True, adamw(0.8, 0.96, 0.01)),
        GroupRow("token_embedding", TOKENS, "embedding_lr", 1.0, True, adamw(0.8, 0.995, 0.001)),
        GroupRow("value_embeddings", VALUES, "embedding_lr", 0.5, True, adamw(0.8, 0.995, 0.01)),
        GroupRow("resid_lambdas", RESID, "scalar_lr", 0.01, False, adamw(0.8, 0.95, 0.05)),
        GroupRow("x0_lambdas", X0, "scalar_lr", 1.0, False, adamw(0.96, 0.95)),
        GroupRow("smear_backout", SMEAR_BACKOUT, "scalar_lr", 0.4, False, adamw(0.8, 0.95)),  # 0.2
        GroupRow(
            "matrices",
            MATRICES,
            "matrix_lr",
            1.0,
            False,
            muon(0.9, row_equilibration=True, frobenius_renormalization=True),
        ),
    ),
}


def build_param_groups(
    model: nn.Module,
    *,
    era: str = "seed",
    batch_tokens: int,
    weight_decay: float | None = None,
    init_lr_frac: float = 1.0,
    polar_dtype: str = "auto",
    **base_rates: float,
) -> list[dict[str, Any]]:
    """The groups of `MuonAdamW` for a network; parameters that need no gradient are left out.

    Args:
        model: a `NanoChatGPTForCausalLM`, of any era, or its base.
        era: whose rates, betas, decay and Muon options: "seed" or "head".
        batch_tokens: tokens of one optimizer step over all devices; rates grow with its square root.
        weight_decay: Muon's at the first step, as it is; by default upstream's for the depth of the network (seed) or
            for the reference batch and horizon (head).
        init_lr_frac: all rates times this, for finetuning.
        polar_dtype: precision of Muon's orthogonalisation: "bfloat16", "float32" or "auto".
        base_rates: in the place of the era's `unembedding_lr`, `embedding_lr`, `scalar_lr`, `matrix_lr`.

    Raises:
        ValueError: for an unknown era or rate, or a parameter that no row of the table takes.
    """
    if era not in ERAS:
        raise ValueError(f"the optimizer's era is {era!r}, expected one of {', '.join(ERAS)}")
    if unknown := sorted(set(base_rates) - set(BASE_RATES[era])):
        raise ValueError(f"no such base rate: {', '.join(unknown)}; expected {', '.join(BASE_RATES[era])}")
    if weight_decay is None:
        depth = model.config.num_hidden_layers
        weight_decay = scaling.HEAD_WEIGHT_DECAY if era == "head" else scaling.seed_weight_decay(depth)
    rates = BASE_RATES[era] | base_rates
    every = init_lr_frac * scaling.learning_rate_scale(batch_tokens)
    width = math.sqrt(REFERENCE_HIDDEN_SIZE / model.config.hidden_size)
    groups = []
    for row, parameters in assign_rows(model, TABLES[era]):
        lr = rates[row.rate] * row.times * every * (width if row.width_scaled else 1.0)
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
