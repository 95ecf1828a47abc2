"""W8A8: int8 a [M, K] times int8 b [N, K] transposed, exact in int32, with scales and zero points per tensor or per row of each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from .. import reference
from .types import Product, agree, check_vector

__all__ = ["SCALED_MM", "ZERO_POINT_DTYPES"]

ZERO_POINT_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)
_K_LIMITS = (
    (reference.MAX_K, ""),
    (reference.MAX_K_ZERO_POINT, " with a zero point"),
    (reference.MAX_K_ZERO_POINTS, " with two zero points"),
)


def check(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> tuple[Any, Any]:
    """(M, N) of int8 a [M, K] and b [N, K]; scales and zero points have one element or one for each row of their matrix."""
    for name, t in (("a", a), ("b", b)):
        if t.dtype != torch.int8:
            raise TypeError(f"scaled_mm: {name} must be torch.int8, got {t.dtype}")
        if t.ndim != 2:
            raise ValueError(f"scaled_mm: {name} must be a matrix, got shape {list(t.shape)}")
    (m, k), n = a.shape, b.shape[0]
    if not agree("scaled_mm", b.shape[1], k):
        raise ValueError(f"scaled_mm: a [M, K] and b [N, K] must agree in K, got {list(a.shape)} and {list(b.shape)}")
    if guard_or_false(k == 0) or guard_or_false(n == 0):
        raise ValueError(f"scaled_mm: N and K must be positive, got a {list(a.shape)} and b {list(b.shape)}")
    limit, case = _K_LIMITS[(a_zero_point is not None) + (b_zero_point is not None)]
    if k > limit:
        raise ValueError(f"scaled_mm: K must be at most {limit}{case}, or int32 could overflow; got {k}")
    if b.device != a.device:
        raise ValueError(f"scaled_mm: b must be on {a.device}, the device of a, got {b.device}")
    check_column = functools.partial(check_vector, "scaled_mm", column=True, device=a.device)
    check_column("a_scale", a_scale, m, dtypes=(torch.float32,))
    check_column("b_scale", b_scale, n, dtypes=(torch.float32,))
    check_column("a_zero_point", a_zero_point, m, dtypes=ZERO_POINT_DTYPES)
    check_column("b_zero_point", b_zero_point, n, dtypes=ZERO_POINT_DTYPES)
    return m, n


def eager(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    *,
    int_mm: Callable[[Tensor, Tensor], Tensor] = reference.int_mm,
) -> Tensor:
    """scale(a @ b.T) in float32 [M, N]; `int_mm` is the exact int8 product that it is built on."""
    a_shift = None if a_zero_point is None else a_zero_point.reshape(-1, 1)
    b_shift = None if b_zero_point is None else b_zero_point.reshape(-1)
    return reference.scale_accumulator(int_mm(a, b), a, b, a_scale.reshape(-1, 1), b_scale.reshape(-1), a_shift, b_shift)


SCALED_MM = Product(
    "scaled_mm",
    "Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? a_zero_point=None, Tensor? b_zero_point=None",
    check,
    eager,
)
