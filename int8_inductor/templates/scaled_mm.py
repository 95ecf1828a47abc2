"""How scaled_mm lowers: main loops on int8 operands, everything else in the tail; or around aten._int_mm."""

from __future__ import annotations

import functools

from ..int_mm import padded_int_mm
from ..products.scaled_mm import SCALED_MM
from . import hopper_scaled_mm, persistent, tiled, vector
from .rivals import int_mm
from .types import Lowering

__all__ = ["LOWERING"]

LOWERING = Lowering(
    SCALED_MM,
    templates=(tiled, persistent, vector, hopper_scaled_mm),
    eager=functools.partial(SCALED_MM.eager, int_mm=padded_int_mm),
    eager_kernel=lambda problem: "aten._int_mm",
    rival=int_mm,
)
