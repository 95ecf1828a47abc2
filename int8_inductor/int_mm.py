"""aten._int_mm for any sizes: what KernelPreference.TORCH compiles an exact int8 product to."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["padded_int_mm"]

# cuBLASLt's int8 product wants M > 16 and N and K in multiples of 8.
_INT_MM_MIN_M = 17
_INT_MM_MULTIPLE = 8


def _cuda_padding(m: Any, n: Any, k: Any) -> tuple[Any, Any, Any]:
    """How many rows of M, rows of N and columns of K the int8 product lacks on a GPU."""
    return 0 if statically_known_true(m >= _INT_MM_MIN_M) else _INT_MM_MIN_M - 1, -n % _INT_MM_MULTIPLE, -k % _INT_MM_MULTIPLE


def _cpu_padding(m: Any, n: Any, k: Any) -> tuple[Any, Any, Any]:
    """The same on a CPU, where oneDNN leaves the result unwritten when a size is 1 and its stride is not what it expects (pytorch issue 195066)."""
    rows, columns, depth = (0 if statically_known_true(size >= 2) else 1 for size in (m, n, k))
    return rows, columns, depth


def _unexpanded(t: Tensor) -> Tensor:
    """`t` with memory of its own where a stride is 0: oneDNN computes something else then."""
    return t.clone(memory_format=torch.contiguous_format) if any(statically_known_true(stride == 0) for stride in t.stride()) else t


def _row_major(t: Tensor) -> Tensor:
    """`t` with K contiguous, as cuBLASLt wants both operands. Inductor drops a plain .contiguous() where it lays out a padded operand itself."""
    forced: Tensor = torch.ops.prims.inductor_force_stride_order.default(t.contiguous(), (t.shape[1], 1))
    return forced


def padded_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """aten._int_mm of a [M, K] and b [N, K], with a and b padded by zeros to the sizes for which it works on their device."""
    (m, k), n = a.shape, b.shape[0]
    on_cpu = a.device.type == "cpu"
    rows, columns, depth = (_cpu_padding if on_cpu else _cuda_padding)(m, n, k)
    padded_a = F.pad(a, (0, depth, 0, rows)) if rows or depth else a
    padded_b = F.pad(b, (0, depth, 0, columns)) if columns or depth else b
    if on_cpu:
        product = torch._int_mm(_unexpanded(padded_a), _unexpanded(padded_b).t())
    else:
        product = torch._int_mm(_row_major(padded_a), _row_major(padded_b).t())
    return product[:m, :n] if rows or columns else product
