"""What one call of oneDNN's kernel computes of a product whose constants are known.

With a static scale of the activation: scales, bias, activation and, where it provably stores what the eager definition does, requantization. With a
dynamic one: the sums alone, as floats.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .. import reference
from ..epilogues import EPILOGUES
from .calls import NOTHING, Linear, Store
from .constants import frozen, named, number
from .forms import Form, is_exact

__all__ = ["Kernel", "Reached", "kernel_of"]

SMALLEST, LARGEST = 2.0**-126, 2.0**96
"""Products of both scales that oneDNN may have as one float32: normal numbers, and small enough that no sum of int8 products overflows (2^31)."""
STEPS = 100
"""A requantized step is so many times the error of a post-op, at least."""


class Reached(enum.Enum):
    """How far oneDNN's kernel computes. SUMS: int8 products alone, as float32; ACTIVATED: up to the activation, as float32; STORED: all of it."""

    SUMS = "sums"
    ACTIVATED = "activated"
    STORED = "stored"


@dataclass(frozen=True)
class Kernel:
    """What one call of oneDNN's kernel computes for a linear."""

    linear: Linear
    store: Store
    reached: Reached

    def suits(self, other: Kernel) -> bool:
        """Whether one call can compute both, of the same activation."""
        one, two = ((each.linear.scale, each.linear.zero_point, each.linear.post_op, each.store, each.reached) for each in (self, other))
        return one == two

    @property
    def may_add(self) -> bool:
        """Whether the kernel can add its result to a float32 matrix instead of storing it."""
        return self.reached is Reached.STORED and self.store.dtype == torch.float32 and self.linear.post_op == NOTHING


def kernel_of(node: Node, form: Form) -> Kernel | None:
    """What oneDNN computes of the scaled_mm `node`, or None."""
    given = named(node)
    if given["b_zero_point"] is not None or (weight := frozen(given["b"])) is None:
        return None
    if weight.shape[1] > reference.MAX_K_ZERO_POINT:
        return None  # sums of unsigned values could overflow
    linear = _static(weight, given)
    if linear is not None:
        store = _store(linear, given, form)
        kernel = Kernel(linear, Store(), Reached.ACTIVATED) if store is None else Kernel(linear, store, Reached.STORED)
    elif given["a_zero_point"] is not None:
        return None  # it would be corrected in int32, which sums in float32 are not above 2^24
    else:
        kernel = Kernel(Linear(weight, torch.ones(weight.shape[0])), Store(), Reached.SUMS)
    return kernel if is_exact(form, weight, kernel.linear.zero_point) else None


def _static(weight: Tensor, given: dict[str, Any]) -> Linear | None:
    """The linear of a product whose scales and bias are all constants that oneDNN's kernel takes, or None."""
    rows, post_op = weight.shape[0], EPILOGUES[given["activation"]].onednn
    scale, weight_scale = number(frozen(given["a_scale"])), frozen(given["b_scale"])
    if scale is None or weight_scale is None or post_op is None:
        return None
    zero_point = 0.0 if given["a_zero_point"] is None else number(frozen(given["a_zero_point"]))
    bias = torch.zeros(rows) if given["bias"] is None else frozen(given["bias"])
    if zero_point is None or bias is None:
        return None
    weight_scale, bias = weight_scale.reshape(-1).float().expand(rows).contiguous(), bias.reshape(-1).float().contiguous()
    products = weight_scale * scale
    if not bool(((products >= SMALLEST) & (products <= LARGEST)).all() and bias.isfinite().all()):
        return None
    return Linear(weight, weight_scale, scale, int(zero_point), bias, post_op)


def _store(linear: Linear, given: dict[str, Any], form: Form) -> Store | None:
    """How the kernel stores what the eager definition does, where it can: as float32 or bfloat16, or as 8 bits by a constant scale that is coarse
    beside the post-op's error, and where nothing would be stored below the smallest value that is allowed.
    """
    if "block_size" in given:
        return None
    if given["out_scale"] is None:
        dtype = given["out_dtype"] or torch.float32
        return Store(dtype) if dtype in (torch.float32, torch.bfloat16) else None
    scale = number(frozen(given["out_scale"]))
    zero_point = 0.0 if given["out_zero_point"] is None else number(frozen(given["out_zero_point"]))
    if scale is None or zero_point is None or not max(SMALLEST, STEPS * linear.post_op.error) <= scale <= LARGEST:
        return None
    least = linear.post_op.least / scale + zero_point
    if given["out_quant_min"] != reference.INT8_MIN and not least > reference.SYMMETRIC_MIN:
        return None
    return Store(form.dtype, scale, int(zero_point))
