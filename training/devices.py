"""What a device can do: whether it multiplies bfloat16 itself, which dtype `auto` is, how fast it is.

Speeds of known GPUs are their makers' data sheets, others are measured; a measurement takes a fifth of a second and
says what this machine does now, beside whatever else runs on it. Nothing but torch is imported here.
"""

import ctypes
import math
import sys
import time
from dataclasses import dataclass

import torch

# ---------------------------------------------------------------- memory of a CPU

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of glibc's malloc.h


def keep_freed_memory() -> None:
    """From now on this process keeps the memory of tensors that are freed, for the next ones.

    glibc hands large pieces back to the kernel, which clears every page anew when they are wanted again: up to a fifth
    of a training step (docs/performance.md). The peak stays what it was, but between the steps nothing is given back.
    Other C libraries, and allocators that stand before glibc's, do as they like.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ---------------------------------------------------------------- the dtype of activations and of orthogonalisation

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def native_bfloat16(device: torch.device | str) -> bool:
    """Whether the hardware multiplies bfloat16 itself. Where it does not, bfloat16 is emulated and slower than float32
    (50 times, on an AVX2 processor)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Older versions of torch cannot tell: float32 is then the safe answer.
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def native_float8(device: torch.device | str) -> bool:
    """Whether the hardware multiplies float8_e4m3fn itself: from Ada and Hopper on, compute capability 8.9."""
    device = torch.device(device)
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def parse_dtype(wanted: str | torch.dtype, setting: str = "dtype") -> torch.dtype | None:
    """The dtype that a setting names, or None for `auto`.

    Raises:
        ValueError: it names something else; the message calls it `setting`.
    """
    if wanted == "auto":
        return None
    dtype = DTYPES.get(wanted, wanted)
    if dtype not in DTYPES.values():
        raise ValueError(f"{setting} is {wanted!r}, expected auto, {' or '.join(DTYPES)}")
    return dtype


def choose_dtype(wanted: str | torch.dtype, device: torch.device | str, setting: str = "dtype") -> torch.dtype:
    """The dtype that a setting names; `auto` is bfloat16 where the hardware multiplies it, else float32.

    Raises:
        ValueError: it names something else.
    """
    dtype = parse_dtype(wanted, setting)
    if dtype is not None:
        return dtype
    return torch.bfloat16 if native_bfloat16(device) else torch.float32


# ---------------------------------------------------------------- speed


@dataclass(frozen=True)
class Device:
    """An accelerator by its data sheet: dense bfloat16 FLOP/s, memory in bytes, bytes/s of that memory, bytes/s one way
    of the link to its neighbours in a node, and whether it multiplies float8 (e4m3fn and e5m2) at twice the rate.

    `sustained` is not from there: of the rate that single products reach on an H100, as a share of the data sheet, how
    much is left through a whole step, under its power and heat (`training/step_time.py`). It is fitted to one run of
    upstream's code: on H100 to its first record, on A100 to 0.992 s for a step of the launch's d20 on eight of them
    (its pull request 147). Elsewhere it is the H100's, for want of a run.
    """

    bfloat16_flops_per_second: float
    memory_bytes: int
    memory_bytes_per_second: float
    link_bytes_per_second: float
    float8: bool
    sustained: float = 0.91


# The makers' data sheets, dense, for the part named; links: NVLink, Infinity Fabric, or 16 lanes of PCI Express.
# Keys are looked for in the name that torch reports, in this order.
DEVICES = {
    "B200": Device(2250e12, 180 * 10**9, 8e12, 900e9, True),
    "H200": Device(989.5e12, 141 * 10**9, 4.8e12, 450e9, True),
    "H100 PCIe": Device(756e12, 80 * 10**9, 2.0e12, 64e9, True),
    "H100": Device(989.5e12, 80 * 10**9, 3.35e12, 450e9, True),
    "A100": Device(312e12, 80 * 10**9, 2.039e12, 300e9, False, sustained=1.21),
    "MI300X": Device(1307.4e12, 192 * 10**9, 5.3e12, 448e9, False),  # its float8 is another one (fnuz)
    "L40S": Device(362e12, 48 * 10**9, 0.864e12, 32e9, True),
    "RTX 5090": Device(209.5e12, 32 * 10**9, 1.792e12, 64e9, True),
    "RTX 4090": Device(165.2e12, 24 * 10**9, 1.008e12, 32e9, True),
    "RTX 3090": Device(71e12, 24 * 10**9, 0.936e12, 32e9, False),
}

# Share of `peak_flops_per_second` that training is expected to reach, for the announced time. Upstream's d24 took 3.04
# hours on eight H100 (2026-01-29), 0.50 of the data sheet by this count; two CPU cores gave 0.65 of a float32 product,
# and of a native bfloat16 one, which leaves everything else behind, 0.14 (the demo) to 0.55.
EXPECTED_UTILISATION = {"cuda": 0.4, "cpu": 0.6}
EXPECTED_OF_NATIVE_BFLOAT16 = 0.2  # on a CPU


def device_key(name: str) -> str | None:
    """The key of `DEVICES` for a name such as torch reports ("NVIDIA H100 80GB HBM3"), or None."""
    return next((key for key in DEVICES if key.lower() in name.lower()), None)


def known_device(name: str) -> Device | None:
    """The table's entry for such a name, or None."""
    key = device_key(name)
    return None if key is None else DEVICES[key]


def matmul_flops_per_second(device: torch.device | str, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """The rate of a large square matrix product, the best of what fits into about `seconds`: a run's upper limit."""
    device = torch.device(device)
    size = 1024 if device.type == "cpu" else 8192
    x = torch.randn(size, size, device=device).to(dtype)  # (size, size)
    torch.mm(x, x)  # the first product pays for setting up threads and kernels
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < seconds:
        synchronize(device)
        begin = time.perf_counter()
        torch.mm(x, x)
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def peak_flops_per_second(device: torch.device | str, dtype: torch.dtype) -> float:
    """What utilisation (MFU) is measured against: the data sheet of a known GPU in bfloat16, else a measurement."""
    device = torch.device(device)
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = known_device(torch.cuda.get_device_name(device))
        if known is not None:
            return known.bfloat16_flops_per_second
    return matmul_flops_per_second(device, dtype)


def expected_seconds(
    flops: float, device: torch.device | str, dtype: torch.dtype, world_size: int, peak: float | None = None
) -> float:
    """About how long the work takes on so many devices like this one, at the utilisation that training reaches; `peak`
    is the rate of them all, if it is known."""
    device = torch.device(device)
    utilisation = EXPECTED_UTILISATION[device.type]
    if device.type == "cpu" and dtype == torch.bfloat16:
        utilisation = EXPECTED_OF_NATIVE_BFLOAT16
    return flops / ((peak or peak_flops_per_second(device, dtype) * world_size) * utilisation)


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
