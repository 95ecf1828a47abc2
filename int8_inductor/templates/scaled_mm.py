"""How scaled_mm lowers: main loops on int8 operands, everything else in the tail; or around the product of int_mm.py,
or oneDNN's linear where the weight is frozen."""

from __future__ import annotations

import functools

from ..int_mm import exact_int_mm, way
from ..onednn.prepacked import prepacked_linear
from ..products.scaled_mm import SCALED_MM
from . import hopper_scaled_mm, persistent, tiled, vector
from .rivals import int_mm
from .types import Lowering

__all__ = ["LOWERING"]

MANY = 2**31 - 1
"""What stands for a symbolic M, which is not known to be small."""
LOWERING = Lowering(
    SCALED_MM,
    templates=(tiled, persistent, vector, hopper_scaled_mm),
    eager=functools.partial(SCALED_MM.eager, int_mm=exact_int_mm),
    eager_kernel=lambda problem, device: way(MANY if problem.static_m is None else problem.static_m, device).name,
    rival=int_mm,
    prepacked=prepacked_linear,
)
