"""What accelerators cost to rent, for plans and reports."""

from typing import Any

from modeling_nanochat.training.devices import device_key

# Rent of each of `devices.DEVICES` on demand. What clouds ask for the same GPU differs by four times, so these are for
# orientation only. The first five: https://www.runpod.io/pricing, Secure Cloud, as copied by others on the day named.
# The others are from memory, of the beginning of 2026: no copy of a price list was found that has them.
DOLLARS_PER_HOUR = {
    "B200": 6.79,  # 2026-10-07
    "H200": 4.59,  # 2026-10-07
    "H100 PCIe": 2.89,  # 2026-11-09
    "H100": 3.99,  # 2026-11-09, SXM
    "A100": 1.79,  # 2026-11-09, 80 GB
    "MI300X": 2.49,
    "L40S": 0.86,
    "RTX 5090": 0.89,
    "RTX 4090": 0.69,
    "RTX 3090": 0.46,
}
RENTS = "rents for orientation, autumn 2026"


def dollars_per_hour(machine: dict[str, Any]) -> float | None:
    """Of all accelerators of a machine as a stage records it; None if it has none, or one that is not in the table."""
    keys = [device_key(name) for name in machine["accelerators"]]
    return sum(DOLLARS_PER_HOUR[key] for key in keys) if keys and None not in keys else None
