"""Weight-only products: float a [M, K] times an int8 or int4 weight b of N rows, transposed.

weight_int8_mm         b int8 [N, K], one scale for the weight or for each row
weight_int8_group_mm   b int8 [N, K], a scale for each group of `group_size` values of a row
weight_int4_mm         b uint8 [N, K / 2], two values a byte (int4.py), scales in groups too
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from .. import reference
from ..int4 import GROUP_SIZES, dequantize_groups, unpack_int4
from .types import Product, agree, check_vector

__all__ = ["WEIGHT_INT4_MM", "WEIGHT_INT8_GROUP_MM", "WEIGHT_INT8_MM", "check_groups", "check_matrices"]


def check_matrices(name: str, a: Tensor, b: Tensor, a_dtypes: tuple[torch.dtype, ...], b_dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """(M, N, K) of a [M, K] and b, [N, K] or, of uint8, [N, K / 2]."""
    if a.dtype not in a_dtypes:
        raise TypeError(f"{name}: a must be one of {', '.join(map(str, a_dtypes))}, got {a.dtype}")
    if b.dtype != b_dtype:
        raise TypeError(f"{name}: b must be {b_dtype}, got {b.dtype}")
    for which, t in (("a", a), ("b", b)):
        if t.ndim != 2:
            raise ValueError(f"{name}: {which} must be a matrix, got shape {list(t.shape)}")
    (m, k), n = a.shape, b.shape[0]
    per_byte = 2 if b_dtype == torch.uint8 else 1
    if not agree(name, per_byte * b.shape[1], k):
        columns = "K / 2" if per_byte == 2 else "K"
        raise ValueError(f"{name}: a [M, K] and b [N, {columns}] must agree in K, got {list(a.shape)} and {list(b.shape)}")
    if guard_or_false(k == 0) or guard_or_false(n == 0):
        raise ValueError(f"{name}: N and K must be positive, got a {list(a.shape)} and b {list(b.shape)}")
    if b.device != a.device:
        raise ValueError(f"{name}: b must be on {a.device}, the device of a, got {b.device}")
    return m, n, k


def check_groups(name: str, which: str, scale: Tensor, rows: Any, k: Any, group_size: int, device: torch.device) -> None:
    """Raise unless `scale` is float32 [rows, K / group_size], for a K of whole groups of an allowed size."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"{name}: group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {group_size}")
    if not agree(name, k % group_size, 0):
        raise ValueError(f"{name}: K must be a multiple of group_size {group_size}, got {k}")
    if scale.dtype != torch.float32:
        raise TypeError(f"{name}: {which} must be torch.float32, got {scale.dtype}")
    if scale.device != device:
        raise ValueError(f"{name}: {which} must be on {device}, the device of a, got {scale.device}")
    if scale.ndim != 2 or not agree(name, scale.shape[0], rows) or not agree(name, scale.shape[1], k // group_size):
        raise ValueError(f"{name}: {which} must have shape [{rows}, {k // group_size}], got {list(scale.shape)}")


def _check_int8(a: Tensor, b: Tensor, b_scale: Tensor) -> tuple[Any, Any]:
    name = "weight_int8_mm"
    m, n, _ = check_matrices(name, a, b, reference.OUT_DTYPES, torch.int8)
    check_vector(name, "b_scale", b_scale, n, column=True, dtypes=(torch.float32,), device=a.device)
    return m, n


def _eager_int8(a: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    return a.float() @ b.float().t() * b_scale.reshape(-1)


def _check_int8_groups(a: Tensor, b: Tensor, b_scale: Tensor, group_size: int) -> tuple[Any, Any]:
    name = "weight_int8_group_mm"
    m, n, k = check_matrices(name, a, b, reference.OUT_DTYPES, torch.int8)
    check_groups(name, "b_scale", b_scale, n, k, group_size, a.device)
    return m, n


def _eager_int8_groups(a: Tensor, b: Tensor, b_scale: Tensor, group_size: int) -> Tensor:
    return a.float() @ dequantize_groups(b, b_scale).t()


def _check_int4(a: Tensor, b: Tensor, b_scale: Tensor, group_size: int) -> tuple[Any, Any]:
    name = "weight_int4_mm"
    m, n, k = check_matrices(name, a, b, reference.OUT_DTYPES, torch.uint8)
    check_groups(name, "b_scale", b_scale, n, k, group_size, a.device)
    return m, n


def _eager_int4(a: Tensor, b: Tensor, b_scale: Tensor, group_size: int) -> Tensor:
    return a.float() @ dequantize_groups(unpack_int4(b), b_scale).t()


WEIGHT_INT8_MM = Product("weight_int8_mm", "Tensor a, Tensor b, Tensor b_scale", _check_int8, _eager_int8)
WEIGHT_INT8_GROUP_MM = Product("weight_int8_group_mm", "Tensor a, Tensor b, Tensor b_scale, int group_size", _check_int8_groups, _eager_int8_groups)
WEIGHT_INT4_MM = Product("weight_int4_mm", "Tensor a, Tensor b, Tensor b_scale, int group_size", _check_int4, _eager_int4)
