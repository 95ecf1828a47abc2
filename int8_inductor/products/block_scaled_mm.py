"""Block-scaled W8A8: int8 a [M, K] times int8 b [N, K] transposed, a with a scale for each 1 x B block, b with one for each B x B block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from .. import reference
from ..granularity import SQUARE_BLOCKS
from .types import Product, agree

__all__ = ["BLOCK_SCALED_MM"]

_NAME = "block_scaled_mm"


def check(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, scale_block: int = 128) -> tuple[Any, Any]:
    """(M, N) of int8 a [M, K] and b [N, K], float32 a_scale [M, ceil(K / B)] and b_scale [ceil(N / B), ceil(K / B)], B = scale_block."""
    for name, t, dtype in (("a", a, torch.int8), ("b", b, torch.int8), ("a_scale", a_scale, torch.float32), ("b_scale", b_scale, torch.float32)):
        if t.dtype != dtype:
            raise TypeError(f"{_NAME}: {name} must be {dtype}, got {t.dtype}")
        if t.ndim != 2:
            raise ValueError(f"{_NAME}: {name} must be a matrix, got shape {list(t.shape)}")
        if t.device != a.device:
            raise ValueError(f"{_NAME}: {name} must be on {a.device}, the device of a, got {t.device}")
    if scale_block not in SQUARE_BLOCKS:
        raise ValueError(f"{_NAME}: scale_block must be one of {', '.join(map(str, SQUARE_BLOCKS))}, got {scale_block}")
    (m, k), n = a.shape, b.shape[0]
    if not agree(_NAME, b.shape[1], k):
        raise ValueError(f"{_NAME}: a [M, K] and b [N, K] must agree in K, got {list(a.shape)} and {list(b.shape)}")
    if guard_or_false(k == 0) or guard_or_false(n == 0):
        raise ValueError(f"{_NAME}: N and K must be positive, got a {list(a.shape)} and b {list(b.shape)}")
    k_blocks, n_blocks = -(-k // scale_block), -(-n // scale_block)
    for name, t, rows in (("a_scale", a_scale, m), ("b_scale", b_scale, n_blocks)):
        if not (agree(_NAME, t.shape[0], rows) and agree(_NAME, t.shape[1], k_blocks)):
            raise ValueError(f"{_NAME}: {name} must have shape [{rows}, {k_blocks}] for blocks of {scale_block}, got {list(t.shape)}")
    return m, n


BLOCK_SCALED_MM = Product(
    _NAME,
    "Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, int scale_block=128",
    check,
    reference.block_scaled_mm,
)
