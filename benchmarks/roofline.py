"""The floor under a matrix product's time: its operations over the device's INT8 rate, or its bytes over the memory's, whichever is longer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ceiling:
    """Dense INT8 operations per second and bytes per second of one device, from the vendor's datasheet."""

    int8_ops: float
    bandwidth: float


CEILINGS = {
    "NVIDIA H200": Ceiling(1979e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": Ceiling(1979e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": Ceiling(624e12, 2.039e12),
    "NVIDIA L4": Ceiling(242.5e12, 0.3e12),
}
"""By the name that torch.cuda.get_device_name gives. A device that is not here has no roofline column."""


def floor_ms(device_name: str, operations: float, moved: float) -> float | None:
    """The shortest time in milliseconds, or None for a device without known ceilings."""
    ceiling = CEILINGS.get(device_name)
    return None if ceiling is None else max(operations / ceiling.int8_ops, moved / ceiling.bandwidth) * 1e3
