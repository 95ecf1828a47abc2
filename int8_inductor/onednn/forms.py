"""In which form oneDNN's int8 linear takes its activation on this machine: found out once a process, by asking the kernel itself.

A signed activation is taken as it is. Where that has a reference kernel (torch 2.11 where the CPU has VNNI and no AMX: 4 s for 4096 x 384 x 384 on
eight cores of a Xeon held to AVX512-VNNI, unsigned 0.5 ms), 128 is added to int8 values and to their zero point, in the kernel that quantizes.
Before VNNI the instruction adds two products in 16 bits, saturated: then there is none.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .._compat import without_modes
from ..avx2 import is_x86
from ..int_mm import SLOWER, least_seconds

__all__ = ["FORMS", "SIGNED", "UNSIGNED", "Form", "form", "is_exact", "pack"]


@dataclass(frozen=True)
class Form:
    """An int8 activation as oneDNN's kernel takes it: of dtype, and offset more than the int8 value."""

    dtype: torch.dtype
    offset: int

    @property
    def largest(self) -> int:
        """The largest magnitude."""
        limits = torch.iinfo(self.dtype)
        return max(limits.max, -limits.min)


SIGNED, UNSIGNED = Form(torch.int8, 0), Form(torch.uint8, 128)
FORMS = (SIGNED, UNSIGNED)

_ROWS, _SIDE = 256, 512
"""Sizes of what is timed: large enough that a call's own 20 us count for little."""
FLOAT_INTEGERS = 2**24
"""float32 holds every whole number up to here."""
SHORT, LONG = 64, 2049
"""K whose sums of 255 * 127 are below that, and an odd number above."""
REFERENCE = 20
"""So many times as long as float32, it is a reference kernel, which is not called again."""


@functools.cache
def form() -> Form | None:
    """The form for which the kernel is exact on this machine, and not slower than float32, or None."""
    if not is_x86() or not torch.backends.mkldnn.is_available():
        return None
    with without_modes(), torch.no_grad():
        return next((each for each in FORMS if _has_exact_kernel(each) and _is_fast(each)), None)


def _has_exact_kernel(taken: Form) -> bool:
    """Whether sums are exact of the largest values, and of ones, which a kernel that adds 128 to a signed activation has as large ones as well."""
    largest = torch.iinfo(taken.dtype).max
    return _sums_are_exact(taken, SHORT, largest, (0, taken.offset, -1)) and _sums_are_exact(taken, LONG, 1, (0,))


@functools.cache
def shifts_exactly(taken: Form) -> bool:
    """Whether a zero point is taken off in int32, so that a sum which float32 does not hold may come before (with AMX it is not: torch 2.11)."""
    with without_modes(), torch.no_grad():
        return _sums_are_exact(taken, LONG, torch.iinfo(taken.dtype).max, (1, 127, taken.largest - 1))


def is_exact(taken: Form, weight: Tensor, zero_point: int) -> bool:
    """Whether the kernel's sums of any int8 activation with such a zero point times int8 weight [N, K] are: all that it computes on the way is held
    by float32, or by int32.
    """
    shift = zero_point + taken.offset
    if shift == 0 or shifts_exactly(taken):
        return True
    most = int(weight.int().abs().sum(1).max()) * (taken.largest + abs(shift))
    return most <= FLOAT_INTEGERS


def _sums_are_exact(taken: Form, k: int, value: int, zero_points: tuple[int, ...]) -> bool:
    """Whether the sums of k times that value times -127 are, as float32."""
    a, b = torch.full((8, k), value, dtype=taken.dtype), torch.full((64, k), -127, dtype=torch.int8)
    packed = pack(b, len(a))
    sums = {shift: torch.tensor(k * (value - shift) * -127, dtype=torch.int32).float() for shift in zero_points}
    return all(bool((product(a, packed, shift) == want).all()) for shift, want in sums.items())


def _is_fast(taken: Form) -> bool:
    """Some kernels are references, a second a call: one call is enough to tell those."""
    a, b = torch.full((_ROWS, _SIDE), 3, dtype=taken.dtype), torch.full((_SIDE, _SIDE), 3, dtype=torch.int8)
    packed, x, y = pack(b, _ROWS), a.float(), b.float()
    floats = least_seconds(lambda: torch.mm(x, y.t()))
    once = least_seconds(lambda: product(a, packed, taken.offset), 2)
    return once < REFERENCE * floats and min(once, least_seconds(lambda: product(a, packed, taken.offset))) < SLOWER * floats


def pack(b: Tensor, rows: int | None) -> Tensor:
    """int8 b [N, K] in the layout that oneDNN wants for so many rows of the activation, or for any number: [K, N]."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(b.contiguous(), None if rows is None else [rows, b.shape[1]])
    return packed


def product(a: Tensor, packed: Tensor, zero_point: int) -> Tensor:
    """The sums of (a - zero_point) [M, K] times a packed weight, as float32 [M, N]."""
    ones, zeros = torch.ones(packed.shape[1]), torch.zeros(packed.shape[1], dtype=torch.int32)
    sums: Tensor = torch.ops.onednn.qlinear_pointwise(a, 1.0, zero_point, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return sums
