"""How the weights of stacked experts are stored: int8 with a scale per row, or two int4 a byte (int4.py) with a scale per group of K.

The weight says by its dtype which it is, and a group's size by the number of its scales: [..., N, K / group].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..int4 import GROUP_SIZES, dequantize_groups, pack_int4, unpack_int4
from ..int4 import quantize_int4 as quantize_weight_int4

__all__ = ["GROUP_SIZES", "dequantize_weight", "is_int4", "pack_int4", "quantize_weight_int4", "quantize_weight_int8", "unpack_int4"]


def is_int4(weight: Tensor) -> bool:
    """Whether `weight` is packed int4 (uint8), not int8."""
    return weight.dtype == torch.uint8


def quantize_weight_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [..., N, K] -> int8 of the same shape and float32 scales [..., N, 1], symmetric."""
    scale = reference.choose_scale_symmetric(weight, [-1])
    return reference.quantize(weight, scale, None, reference.SYMMETRIC_MIN), scale


def dequantize_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 [..., N, K] of a weight in either layout."""
    return dequantize_groups(unpack_int4(weight) if is_int4(weight) else weight, scale)
