"""How block_scaled_mm lowers: main loops that apply the scales themselves, a block of K at a time; or a float32 product of dequantized operands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import reference
from ..products.block_scaled_mm import BLOCK_SCALED_MM
from . import block_persistent, block_tiled, hopper_blocks
from .types import Lowering

__all__ = ["LOWERING"]


def _groups(operands: Mapping[str, Any]) -> tuple[int, ...]:
    return (operands["scale_block"],)


def _eager(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, scale_block: int = 128) -> Tensor:
    """float32 [M, N], rounded as float32 products are. One product: aten._int_mm takes as long for K = 128 as for 2000 (256 x 4096 on a CPU).

    In whole blocks, as block_linear.py says why.
    """
    wide_a = reference.dequantize_blocks(reference.whole_blocks(a, scale_block), a_scale, scale_block)
    wide_b = reference.dequantize_blocks(reference.whole_blocks(b, scale_block), b_scale, (scale_block, scale_block))
    return wide_a @ wide_b.t()


LOWERING = Lowering(
    BLOCK_SCALED_MM,
    templates=(block_tiled, block_persistent, hopper_blocks.BLOCK_SCALED_MM),
    eager=_eager,
    eager_kernel=lambda problem, device: "aten.mm of dequantized blocks",
    loop=("a_scale", "b_scale"),
    groups=_groups,
)
