"""What the hardware is said to multiply decides what `auto` is, in one place for everybody."""

import pytest
import torch

from modeling_nanochat.training import devices
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW


def test_known_devices_and_measured_ones():
    assert devices.known_device("NVIDIA H100 80GB HBM3").bfloat16_flops_per_second == 989.5e12
    assert devices.known_device("NVIDIA H100 PCIe").bfloat16_flops_per_second == 756e12
    assert devices.known_device("Unheard-of 1") is None
    assert devices.native_bfloat16("cpu") in (True, False)
    assert devices.matmul_flops_per_second("cpu", torch.float32, seconds=0.05) > 1e8


def test_auto_is_what_the_hardware_multiplies(native_bfloat16):
    expected = torch.bfloat16 if native_bfloat16 else torch.float32
    assert devices.choose_dtype("auto", "cpu") == expected
    for wanted in ("float32", torch.float32):
        assert devices.choose_dtype(wanted, "cpu") == torch.float32
    for wanted in ("float16", torch.float64, None):
        with pytest.raises(ValueError, match=r"polar_dtype is .*, expected auto, bfloat16 or float32"):
            devices.choose_dtype(wanted, "cpu", "polar_dtype")


def test_orthogonalization_in_auto_is_that_of_the_dtype_by_name_and_as_such(native_bfloat16):
    dtype = torch.bfloat16 if native_bfloat16 else torch.float32
    weights = []
    for polar_dtype in ("auto", str(dtype).removeprefix("torch."), dtype):
        matrix = torch.nn.Parameter(torch.ones(8, 4))
        matrix.grad = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
        MuonAdamW([{"params": [matrix], "use_muon": True, "lr": 0.1, "polar_dtype": polar_dtype}]).step()
        weights.append(matrix.detach())
    assert weights[0].equal(weights[1]) and weights[0].equal(weights[2])
