"""How the weights of stacked experts are stored: int8 with a scale per row, or two int4 a byte with a scale per group of K.

The weight says by its dtype which it is, and a group's size by the number of its scales: [..., N, K / group].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference

__all__ = ["GROUP_SIZES", "dequantize_weight", "is_int4", "pack_int4", "quantize_weight_int4", "quantize_weight_int8", "unpack_int4"]

GROUP_SIZES = (32, 64, 128)
INT4_MIN, INT4_MAX = -8, 7
_OFFSET = 8
"""A nibble holds value + 8."""


def is_int4(weight: Tensor) -> bool:
    """Whether `weight` is packed int4 (uint8), not int8."""
    return weight.dtype == torch.uint8


def quantize_weight_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [..., N, K] -> int8 of the same shape and float32 scales [..., N, 1], symmetric."""
    scale = reference.choose_scale_symmetric(weight, [-1])
    return reference.quantize(weight, scale, None, reference.SYMMETRIC_MIN), scale


def quantize_weight_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """float [..., N, K] -> packed uint8 [..., N, K / 2] and float32 scales [..., N, K / group_size], symmetric.

    The scale is max|w| / 7.5, as torchao has it: the largest value loses half a step, as any other may.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))
    amax = groups.abs().amax(-1, keepdim=True)
    scale = torch.clamp(amax / 7.5, min=reference.SMALLEST_SCALE)
    scale = torch.where(amax < float("inf"), scale, float("nan"))
    values = reference.quantize(groups, scale, None, INT4_MIN, INT4_MAX)
    return pack_int4(values.flatten(-2)), scale.squeeze(-1)


def pack_int4(values: Tensor) -> Tensor:
    """int8 [..., K] in [-8, 7] -> uint8 [..., K / 2]: value + 8 of an even k in the low nibble, of the next k in the high one."""
    nibbles = (values + _OFFSET).to(torch.uint8)
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [..., K / 2] -> int8 [..., K] in [-8, 7]."""
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return nibbles.to(torch.int8) - _OFFSET


def dequantize_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 [..., N, K] of a weight in either layout."""
    values = unpack_int4(weight) if is_int4(weight) else weight
    groups = reference.dequantize(values.unflatten(-1, (scale.shape[-1], -1)), scale.unsqueeze(-1))
    return groups.flatten(-2)
