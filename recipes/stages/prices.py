"""What accelerators cost to rent, for plans and reports."""

from typing import Any, NamedTuple

from modeling_nanochat.training.devices import device_key


class Rent(NamedTuple):
    """Dollars an hour for one accelerator on demand, on a day, by whose price list."""

    dollars: float
    day: str
    source: str


RUNPOD = "https://www.runpod.io/pricing, Secure Cloud"

# Rent of each of `devices.DEVICES`, as others copied it from the price list on the day named. What clouds ask for the
# same GPU differs by four times and moves within a month, so these are for orientation only.
RENTS = {
    "B200": Rent(6.79, "2026-10-07", RUNPOD),
    "H200": Rent(4.59, "2026-10-07", RUNPOD),
    "H100 PCIe": Rent(2.89, "2026-11-09", RUNPOD),
    "H100": Rent(3.99, "2026-11-09", RUNPOD),  # SXM
    "A100": Rent(1.79, "2026-11-09", RUNPOD),  # 80 GB
    "MI300X": Rent(2.59, "2026-10-08", "DigitalOcean's API, list price"),
    "L40S": Rent(1.95, "2026-09-09", "https://modal.com/pricing, $0.000542 a second"),
    "RTX 5090": Rent(0.67, "2026-09-20", "https://akash.network/pricing/gpus, starting at"),
    "RTX 4090": Rent(0.74, "2026-09-09", RUNPOD),
    "RTX 3090": Rent(0.18, "2026-09-20", "https://openrelay.inc/gpu-pricing-calculator"),
}
ORIENTATION = "rents for orientation, autumn 2026"


def dollars_per_hour(machine: dict[str, Any]) -> float | None:
    """Of all accelerators of a machine as a stage records it; None if it has none, or one that is not in the table."""
    keys = [device_key(name) for name in machine["accelerators"]]
    return sum(RENTS[key].dollars for key in keys) if keys and None not in keys else None
