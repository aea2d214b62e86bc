"""Networks of upstream's eras with what its own code computed of them (tests/golden/model)."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "golden" / "model"
ERA_OF_CASE = {
    "2025_10_launch": "launch",
    "2026_01_seed": "seed",
    "2026_03_autoresearch1": "autoresearch1",
    "2026_07_head": "head",
}


def upstream_weights(case: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / case / "weights.safetensors")


def expected(case: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / case / "expected.safetensors")


def report(case: str) -> dict:
    return json.loads((FOLDER / case / "case.json").read_text())
