"""INT4 weights as they are stored: two symmetric values a byte, low nibble first, each as value + 8; a float32 scale for each group along K.

One layout for all uses: weight-only, with int8 activations, one row or thousands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

__all__ = ["GROUP_SIZES", "OFFSET", "dequantize_groups", "pack_int4", "quantize_int4", "unpack_int4"]

GROUP_SIZES = (32, 64, 128)
"""How many values along K may share a scale."""
INT4_MIN, INT4_MAX = -8, 7
OFFSET = 8
"""A nibble holds value + OFFSET."""


def pack_int4(values: Tensor) -> Tensor:
    """int8 [..., K] in [-8, 7] -> uint8 [..., K / 2]: of each pair along K the first value in the low nibble."""
    nibbles = (values + OFFSET).to(torch.uint8)
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [..., K / 2] -> int8 [..., K] in [-8, 7]."""
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return nibbles.to(torch.int8) - OFFSET


def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """float [..., N, K] -> packed uint8 [..., N, K / 2] and float32 scales [..., N, K / group_size]; a group that is not finite has scale NaN.

    The scale is max|w| / 7.5, as torchao has it: the largest value loses half a step, as any other may.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))
    amax = groups.abs().amax(-1, keepdim=True)
    scale = torch.where(amax < float("inf"), torch.clamp(amax / 7.5, min=reference.SMALLEST_SCALE), float("nan"))
    return pack_int4(reference.quantize(groups, scale, None, INT4_MIN, INT4_MAX).flatten(-2)), scale.squeeze(-1)


def dequantize_groups(values: Tensor, scale: Tensor) -> Tensor:
    """int8 values [..., N, K] times float32 scales [..., N, K / group] -> float32 [..., N, K]."""
    groups = values.unflatten(-1, (scale.shape[-1], -1))
    return reference.dequantize(groups, scale.unsqueeze(-1)).flatten(-2)
