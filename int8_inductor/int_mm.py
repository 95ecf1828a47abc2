"""Exact int8 products for any sizes: what KernelPreference.TORCH compiles to. aten._int_mm, or, on a CPU that has no fast one, AVX2's (avx2.py), or
float32 products.

oneDNN has kernels for int8 from AVX512 on. Before (AVX2 alone), aten._int_mm takes 36 times as long as a float32 product of the same sizes (4096 x
1536 x 384 on two cores of an AMD EPYC: 1004 ms, 28 in float32), and the product of u8 and s8 in stock Inductor's INT8 path, which is fast, saturates
sums of two products at 16 bits: 255 * 127 * 384 comes out as half. float32 holds sums of 1024 products of int8 exactly.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import avx2, reference
from ._compat import without_modes, writes_python

__all__ = ["WAYS", "IntMM", "exact_int_mm", "float_int_mm", "is_slow_on_this_cpu", "least_seconds", "of_this_cpu", "padded_int_mm", "way"]

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


EXACT_DEPTH = 1024
"""K of products of int8 whose sums float32 holds: 1024 * 128 * 128 = 2^24."""


def float_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] of int8 a [M, K] times b [N, K] transposed by float32 products, exactly, whatever precision those are allowed: bfloat16 and TF32
    hold an int8 too, and sums are in float32.
    """
    parts = [slice(first, first + EXACT_DEPTH) for first in range(0, a.shape[1], EXACT_DEPTH)]
    return functools.reduce(torch.add, (reference.small_int_mm(a[:, k], b[:, k]) for k in parts))


_ROWS, _SIDE, _TRIES = 64, 256, 5
"""Sizes of what is timed once a process, and how often: 2 ms where int8 is slow."""
SLOWER = 1.5
"""So many times as long as a float32 product, a product of int8 is not worth its fewer bytes."""


def least_seconds(run: Callable[[], Any], tries: int = _TRIES) -> float:
    """What `run` takes, the least of a few times."""
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def is_slow_on_this_cpu() -> bool:
    """Whether aten._int_mm takes longer than float32 products on this machine: measured, as oneDNN's kernels depend on more than a CPU's name."""
    with without_modes(), torch.no_grad():
        a, b = (torch.full((rows, _SIDE), 3, dtype=torch.int8, device="cpu") for rows in (_ROWS, _SIDE))
        x, y = a.float(), b.float()
        return least_seconds(lambda: torch._int_mm(a, b.t())) > SLOWER * least_seconds(lambda: torch.mm(x, y.t()))


FEW_ROWS = 2
"""Up to so many rows a weight is not worth turning to float32, which moves nine bytes for each of its own (1 x 14336 x 4096: 88 ms, _int_mm 58)."""


@dataclass(frozen=True)
class IntMM:
    """A way to compute int32 [M, N] of int8 a [M, K] times b [N, K] transposed. name: for reports. suits: (M, device) -> whether it may be taken."""

    name: str
    suits: Callable[[Any, torch.device], bool]
    compute: Callable[[Tensor, Tensor], Tensor]


def _is_slow(device: torch.device) -> bool:
    return device.type == "cpu" and is_slow_on_this_cpu()


def _in_cpp(rows: Any, device: torch.device) -> bool:
    # Its operator is Python's, which C++ cannot call.
    return _is_slow(device) and avx2.has_kernel() and writes_python()


def _in_floats(rows: Any, device: torch.device) -> bool:
    return _is_slow(device) and not statically_known_true(rows <= FEW_ROWS)


WAYS = (
    IntMM("avx2_int_mm, exact, as this CPU has no fast aten._int_mm", _in_cpp, avx2.int_mm),
    IntMM("aten.mm in float32, exact, as this CPU has no fast aten._int_mm", _in_floats, float_int_mm),
    IntMM("aten._int_mm", lambda rows, device: True, padded_int_mm),
)
"""The first that suits is taken."""


def of_this_cpu() -> tuple[str, bool]:
    """A part of the key under which compiled graphs are cached, as a cache may be another machine's: its instructions, and whether AVX2's product may
    be called. Not what was measured, which another process could find to be different.
    """
    return torch.backends.cpu.get_cpu_capability(), avx2.has_kernel()


def way(rows: Any, device: torch.device) -> IntMM:
    """How so many rows are multiplied on `device`."""
    return next(each for each in WAYS if each.suits(rows, device))


def exact_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] of int8 a [M, K] times b [N, K] transposed, by what is fastest on their device."""
    return way(a.shape[0], a.device).compute(a, b)
