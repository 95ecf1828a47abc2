"""W4A8: int8 a [M, K] times int4 b, uint8 [N, K / 2] (int4.py), transposed; exact in int32 within a group of K, groups are summed in float32.

int8_int4_mm         a has one scale, or one for each row
int8_int4_group_mm   a has a scale for each row and group too
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..int4 import dequantize_groups, unpack_int4
from .types import Product, check_vector
from .weight_only import check_groups, check_matrices

__all__ = ["INT8_INT4_GROUP_MM", "INT8_INT4_MM"]


def _check(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, group_size: int) -> tuple[Any, Any]:
    name = "int8_int4_mm"
    m, n, k = check_matrices(name, a, b, (torch.int8,), torch.uint8)
    check_vector(name, "a_scale", a_scale, m, column=True, dtypes=(torch.float32,), device=a.device)
    check_groups(name, "b_scale", b_scale, n, k, group_size, a.device)
    return m, n


def _eager(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, group_size: int) -> Tensor:
    weight = dequantize_groups(unpack_int4(b), b_scale)
    return a.float() @ weight.t() * a_scale.reshape(-1, 1)


def _check_groups(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, group_size: int) -> tuple[Any, Any]:
    name = "int8_int4_group_mm"
    m, n, k = check_matrices(name, a, b, (torch.int8,), torch.uint8)
    check_groups(name, "a_scale", a_scale, m, k, group_size, a.device)
    check_groups(name, "b_scale", b_scale, n, k, group_size, a.device)
    return m, n


def _eager_groups(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, group_size: int) -> Tensor:
    activation = reference.dequantize(a.unflatten(1, (-1, group_size)), a_scale.unsqueeze(-1)).flatten(1)
    return activation @ dequantize_groups(unpack_int4(b), b_scale).t()


_OPERANDS = "Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, int group_size"
INT8_INT4_MM = Product("int8_int4_mm", _OPERANDS, _check, _eager)
INT8_INT4_GROUP_MM = Product("int8_int4_group_mm", _OPERANDS, _check_groups, _eager_groups)
