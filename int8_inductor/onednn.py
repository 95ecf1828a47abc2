"""oneDNN's int8 linear on a CPU: whether this machine has an exact one that is fast, and calls of it in what Inductor generates.

The activation is unsigned there: with a signed one oneDNN of torch 2.11 has a reference kernel where the CPU has VNNI and no AMX (4096 x 384 x 384
on eight cores of a Xeon held to AVX512-VNNI: 4 s, unsigned 0.5 ms). So 128 is added to int8 values and to their zero point, in the kernel that
quantizes.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.lowering import lowerings, make_pointwise
from torch._inductor.virtualized import V
from torch._inductor.virtualized import ops as inductor_ops

from ._compat import without_modes
from .epilogues import PostOp
from .int_mm import SLOWER, least_seconds

__all__ = ["Linear", "Store", "is_exact_and_fast", "lower_linear", "signed", "unsigned"]

OFFSET = 128
"""What an unsigned value is more than the signed one."""
_ROWS, _SIDE = 256, 512
"""Sizes of what is timed: large enough that a call's own 20 us count for little."""
X86 = ("x86_64", "amd64")
DEEP = 2049
"""255 * 127 times so many is an odd number over 2^24."""
REFERENCE = 20
"""So many times as long as float32, it is a reference kernel, which is not called again."""


@functools.cache
def is_exact_and_fast() -> bool:
    """Whether the kernel is exact on this machine, and not slower than float32: found out once a process."""
    if platform.machine().lower() not in X86 or not torch.backends.mkldnn.is_available():
        return False
    with without_modes(), torch.no_grad():
        return _is_exact() and _is_fast()


def _is_exact() -> bool:
    """Before VNNI its instruction adds two products in 16 bits, saturated. Sums are whole numbers that float32 does not hold before the zero point is
    taken off, so that has to happen in int32.
    """
    a, b = torch.full((8, DEEP), 255, dtype=torch.uint8), torch.full((64, DEEP), -127, dtype=torch.int8)
    packed = pack(b, len(a))
    sums = {shift: torch.tensor(DEEP * (255 - shift) * -127, dtype=torch.int32).float() for shift in (0, OFFSET, 254, 255)}
    return all(bool((product(a, packed, shift) == want).all()) for shift, want in sums.items())


def _is_fast() -> bool:
    """Some kernels are references, a second a call: one call is enough to tell those."""
    a, b = torch.full((_ROWS, _SIDE), 3, dtype=torch.uint8), torch.full((_SIDE, _SIDE), 3, dtype=torch.int8)
    packed, x, y = pack(b, _ROWS), a.float(), b.float()
    floats = least_seconds(lambda: torch.mm(x, y.t()))
    once = least_seconds(lambda: product(a, packed, OFFSET), 2)
    return once < REFERENCE * floats and min(once, least_seconds(lambda: product(a, packed, OFFSET))) < SLOWER * floats


def pack(b: Tensor, rows: int | None) -> Tensor:
    """int8 b [N, K] in the layout that oneDNN wants for so many rows of the activation, or for any number: [K, N]."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(b.contiguous(), None if rows is None else [rows, b.shape[1]])
    return packed


def product(a: Tensor, packed: Tensor, zero_point: int) -> Tensor:
    """The sums of uint8 (a - zero_point) [M, K] times a packed weight, as float32 [M, N]."""
    ones, zeros = torch.ones(packed.shape[1]), torch.zeros(packed.shape[1], dtype=torch.int32)
    sums: Tensor = torch.ops.onednn.qlinear_pointwise(a, 1.0, zero_point, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return sums


NOTHING = PostOp("none")


@dataclass(frozen=True)
class Linear:
    """The constants of one linear: int8 weight [N, K], float32 weight_scale [N], the activation's scale and (signed) zero point, float32 bias [N]
    or None, and what follows it.
    """

    weight: Tensor
    weight_scale: Tensor
    scale: float = 1.0
    zero_point: int = 0
    bias: Tensor | None = None
    post_op: PostOp = NOTHING


@dataclass(frozen=True)
class Store:
    """How the result is stored: as float32 or bfloat16; or as uint8 by a scale and the zero point of the signed value, to which OFFSET is added."""

    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    zero_point: int = 0

    @property
    def stored_zero_point(self) -> int:
        return self.zero_point + OFFSET if self.dtype == torch.uint8 else self.zero_point


def _shifted(box: Any, by: int, dtype: torch.dtype) -> Any:
    """8-bit integers plus a number, by way of float32, which Inductor's C++ does a vector at a time."""

    def shift(x: Any) -> Any:
        return inductor_ops.to_dtype(inductor_ops.to_dtype(x, torch.float32) + inductor_ops.constant(float(by), torch.float32), dtype)

    return make_pointwise(shift, override_return_dtype=dtype)(box)


def unsigned(box: Any) -> Any:
    """A box of int8 as uint8, OFFSET more: in memory, written by the kernel that computes it where it is not there yet."""
    shifted = _shifted(box, OFFSET, torch.uint8)
    shifted.realize()
    return shifted


def signed(box: Any) -> Any:
    """The reverse, computed by what reads it."""
    return _shifted(box, -OFFSET, torch.int8)


def lower_linear(a: Any, rows: int | None, linear: Linear, store: Store) -> Any:
    """The box [M, N] of a call on the uint8 box a [M, K]: post_op(scale (a - zero_point) @ weight.T weight_scale + bias), stored.

    rows: M, where it is known.
    """
    name = V.graph.current_node.name
    packed = V.graph.add_tensor_constant(pack(linear.weight, rows), name=f"{name}_packed")
    scale = V.graph.add_tensor_constant(linear.weight_scale, name=f"{name}_scale")
    zeros = V.graph.add_tensor_constant(torch.zeros(linear.weight.shape[0], dtype=torch.int32), name=f"{name}_zeros")
    bias = None if linear.bias is None or not linear.bias.any() else V.graph.add_tensor_constant(linear.bias, name=f"{name}_bias")
    # Where a has a stride of 0 oneDNN computes something else.
    x = (ir.ExternKernel.require_contiguous(a), linear.scale, linear.zero_point + OFFSET)
    post_op: tuple[Any, ...] = (linear.post_op.name, [], linear.post_op.algorithm)
    # Not Inductor's own template beside it, which would correct the zero point in float32.
    with inductor_config.patch(max_autotune=False, max_autotune_gemm=False):
        lower = lowerings[torch.ops.onednn.qlinear_pointwise.tensor]
        return lower(*x, packed, scale, zeros, bias, store.scale, store.stored_zero_point, store.dtype, *post_op)
