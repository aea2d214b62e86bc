"""What an optimizer era is: everything in which upstream's 2026-02-01 (seed) and 2026-07-03 (head) differ, as data.

    row = optimizer_era("head")
    row.base_rates, row.groups                     -> training/optimizer/groups.py: which rate each parameter gets
    row.warmup_steps, row.momentum_peak, ...       -> `pretraining_schedules`: how rate, momentum and decay move
    row.tokens_per_parameter, row.batch_exponent, row.decay_rule -> training/scaling.py: how long, how large, how firm

No other file asks an era for its name. The network's eras are rows of their own
(`modeling_nanochat/configuration_nanochat_gpt.py`): any optimizer era trains any network. All constants are upstream's
(https://github.com/karpathy/nanochat), which found them by sweeps at the reference depth, width and batch below.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from modeling_nanochat.training.optimizer.schedules import (
    Schedule,
    cosine_to_zero,
    linear_to_zero,
    muon_momentum,
    warmup_stable_decay,
)

REFERENCE_BATCH_TOKENS = 2**19  # the batch at which the base learning rates were tuned
REFERENCE_DEPTH = 12  # the depth at which the weight decay (and, head, the batch) was tuned
REFERENCE_HIDDEN_SIZE = 768  # the width at which the rates of embeddings and head were tuned


# ---------------------------------------------------------------- what a row consists of


@dataclass(frozen=True)
class GroupRow:
    """One group of the optimizer: the parameters whose names match `pattern`, their rate and their other settings.

    `rate` names one of the base rates, which grow with the batch and here are times `times`; or it is a number, which
    nothing scales but the fraction that finetuning takes of every rate. `settings` go into the group as they are.
    """

    name: str
    pattern: str
    rate: str | float
    times: float = 1.0
    width_scaled: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


# (value at the reference, depth, batch / reference batch, reference horizon / horizon) -> Muon's weight decay
DecayRule = Callable[[float, int, float, float], float]


@dataclass(frozen=True)
class OptimizerEra:
    """One row of the table."""

    base_rates: Mapping[str, float]
    groups: tuple[GroupRow, ...]  # the first row that matches takes a parameter
    warmup_steps: float  # a number of steps; below 1 a share of them
    warmdown_ratio: float  # share of the run at its end over which the rates fall
    final_lr_frac: float  # what they fall to
    momentum_peak: float
    momentum_rise_steps: int
    momentum_end: float  # reached with the end of the warm-down
    decay_schedule: Schedule
    tokens_per_parameter: float  # compute-optimal ratio of tokens to scaling parameters (block matrices + head)
    batch_exponent: float  # best batch ~ tokens ^ exponent; 0: always the reference batch
    weight_decay: float  # Muon's, at the reference depth, batch and horizon
    decay_rule: DecayRule


def decay_by_depth(reference: float, depth: int, batch_ratio: float, horizon_ratio: float) -> float:
    """As one over the depth squared (upstream's sweep, January 2026)."""
    return reference * (REFERENCE_DEPTH / depth) ** 2


def decay_by_horizon(reference: float, depth: int, batch_ratio: float, horizon_ratio: float) -> float:
    """Keeps batch / (rate * decay * tokens) constant (arXiv 2405.13698), where the rate grows as the square root of the
    batch."""
    return reference * math.sqrt(batch_ratio) * horizon_ratio


# ---------------------------------------------------------------- the table

HEAD, TOKENS, VALUES = r"\blm_head\.weight$", r"\bembed_tokens\.weight$", r"\bvalue_embeddings\.\d+\.weight$"
RESID, X0, SMEAR_BACKOUT = r"\bresid_lambdas$", r"\bx0_lambdas$", r"\b(smear_gate\.weight|smear_lambda|backout_lambda)$"
MATRICES = r"\blayers\.\d+\..+\.weight$"  # the small gates too


def adamw(beta1: float, beta2: float, weight_decay: float = 0.0) -> dict[str, Any]:
    return {"use_muon": False, "betas": (beta1, beta2), "eps": 1e-10, "weight_decay": weight_decay}


def muon(beta2: float, **options: Any) -> dict[str, Any]:
    return {"use_muon": True, "beta2": beta2, "ns_steps": 5, **options}


OPTIMIZER_ERAS = {
    "seed": OptimizerEra(
        base_rates={"unembedding_lr": 0.004, "embedding_lr": 0.3, "scalar_lr": 0.5, "matrix_lr": 0.02},
        groups=(
            GroupRow("head", HEAD, "unembedding_lr", 1.0, True, adamw(0.8, 0.95)),
            GroupRow("token_embedding", TOKENS, "embedding_lr", 1.0, True, adamw(0.8, 0.95)),
            GroupRow("value_embeddings", VALUES, "embedding_lr", 1.0, True, adamw(0.8, 0.95)),
            GroupRow("resid_lambdas", RESID, "scalar_lr", 0.01, False, adamw(0.8, 0.95)),
            GroupRow("x0_lambdas", X0, "scalar_lr", 1.0, False, adamw(0.96, 0.95)),
            GroupRow("smear_backout", SMEAR_BACKOUT, 0.2, settings=adamw(0.8, 0.95)),  # head's, for a head network
            GroupRow("matrices", MATRICES, "matrix_lr", settings=muon(0.95)),
        ),
        warmup_steps=0,
        warmdown_ratio=0.5,
        final_lr_frac=0.0,
        momentum_peak=0.95,
        momentum_rise_steps=300,
        momentum_end=0.95,
        decay_schedule=linear_to_zero,
        tokens_per_parameter=10.5,
        batch_exponent=0.0,
        weight_decay=0.2,
        decay_rule=decay_by_depth,
    ),
    "head": OptimizerEra(
        base_rates={"unembedding_lr": 0.008, "embedding_lr": 0.3, "scalar_lr": 0.5, "matrix_lr": 0.02},
        groups=(
            GroupRow("head", HEAD, "unembedding_lr", 1.0, True, adamw(0.8, 0.96, 0.01)),
            GroupRow("token_embedding", TOKENS, "embedding_lr", 1.0, True, adamw(0.8, 0.995, 0.001)),
            GroupRow("value_embeddings", VALUES, "embedding_lr", 0.5, True, adamw(0.8, 0.995, 0.01)),
            GroupRow("resid_lambdas", RESID, "scalar_lr", 0.01, False, adamw(0.8, 0.95, 0.05)),
            GroupRow("x0_lambdas", X0, "scalar_lr", 1.0, False, adamw(0.96, 0.95)),
            GroupRow("smear_backout", SMEAR_BACKOUT, 0.2, settings=adamw(0.8, 0.95)),
            GroupRow(
                "matrices",
                MATRICES,
                "matrix_lr",
                settings=muon(0.9, row_equilibration=True, frobenius_renormalization=True),
            ),
        ),
        warmup_steps=40,
        warmdown_ratio=0.65,
        final_lr_frac=0.05,
        momentum_peak=0.97,
        momentum_rise_steps=400,
        momentum_end=0.90,
        decay_schedule=cosine_to_zero,
        tokens_per_parameter=12,
        batch_exponent=0.383,  # Power Lines, arXiv 2505.13738
        weight_decay=0.28,
        decay_rule=decay_by_horizon,
    ),
}


def optimizer_era(name: str) -> OptimizerEra:
    """The row of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in OPTIMIZER_ERAS:
        raise ValueError(f"the optimizer's era is {name!r}, expected one of {', '.join(OPTIMIZER_ERAS)}")
    return OPTIMIZER_ERAS[name]


def era_of(config: PreTrainedConfig) -> str:
    """The optimizer's era that a network is trained by unless told otherwise; a stock network has the seed's."""
    return getattr(config, "init_scheme", "seed")


def pretraining_schedules(
    era: str = "seed",
    *,
    warmup_steps: float | None = None,
    warmdown_ratio: float | None = None,
    final_lr_frac: float | None = None,
) -> dict[str, Schedule]:
    """What `GroupScheduler` takes for pretraining; the era's own where nothing else is given.

    A warm-up counted in steps may reach into the warm-down of a short run, as upstream's does: the rise then wins.

    Args:
        era: a row of `OPTIMIZER_ERAS`.
        warmup_steps: a number of steps; below 1 a share of the run.
        warmdown_ratio: share of the run at its end over which the rates fall.
        final_lr_frac: what they fall to, as a fraction of their height.

    Raises:
        ValueError: for another era, or shares that are none.
    """
    row = optimizer_era(era)
    warmup = row.warmup_steps if warmup_steps is None else warmup_steps
    warmdown = row.warmdown_ratio if warmdown_ratio is None else warmdown_ratio
    final = row.final_lr_frac if final_lr_frac is None else final_lr_frac
    if warmup < 0 or not 0 <= warmdown <= 1 or (warmup < 1 and warmup + warmdown > 1):
        raise ValueError(
            f"warmup_steps {warmup} and warmdown_ratio {warmdown}: expected a number of steps (or a share below 1) and "
            "a share of the run from 0 to 1, two shares adding up to at most 1"
        )
    return {
        "lr_schedule": partial(warmup_stable_decay, warmup_steps=warmup, warmdown_ratio=warmdown, final_fraction=final),
        "momentum_schedule": partial(
            muon_momentum,
            peak=row.momentum_peak,
            rise_steps=row.momentum_rise_steps,
            end=row.momentum_end,
            warmdown_ratio=warmdown,
        ),
        "weight_decay_schedule": row.decay_schedule,
    }
