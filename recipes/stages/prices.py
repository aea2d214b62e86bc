"""What accelerators cost to rent, for plans and reports."""

from typing import Any

from modeling_nanochat.training.devices import device_key

# Rent of each of `devices.DEVICES`: about what GPU clouds asked on demand at the beginning of 2026, written down from
# memory and not looked up: for orientation only.
DOLLARS_PER_HOUR = {
    "B200": 4.99,
    "H200": 3.59,
    "H100 PCIe": 2.49,
    "H100": 2.99,
    "A100": 1.79,
    "MI300X": 2.49,
    "L40S": 0.86,
    "RTX 5090": 0.89,
    "RTX 4090": 0.69,
    "RTX 3090": 0.46,
}
RENTS = "rents for orientation, early 2026"


def dollars_per_hour(machine: dict[str, Any]) -> float | None:
    """Of all accelerators of a machine as a stage records it; None if it has none, or one that is not in the table."""
    keys = [device_key(name) for name in machine["accelerators"]]
    return sum(DOLLARS_PER_HOUR[key] for key in keys) if keys and None not in keys else None
