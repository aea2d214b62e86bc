"""Settings every test shares: no network, no telemetry, one thread per process so that two workers share two cores."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRACKIO_MODE="disabled", WANDB_MODE="disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from modeling_nanochat.training import devices

torch.set_num_threads(1)


@pytest.fixture(params=[False, True], ids=["emulated bfloat16", "native bfloat16"])
def native_bfloat16(request, monkeypatch) -> bool:
    """What the hardware is said to do, for tests of whatever depends on `auto`: either answer works on any machine, so
    both are tested on all. Bfloat16 that is emulated is slow: keep such tests small."""
    monkeypatch.setattr(devices, "native_bfloat16", lambda device: request.param)
    return request.param
