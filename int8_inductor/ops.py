"""The operators `int8_inductor::scaled_mm` and `int8_inductor::scaled_mm_block_quant`: schema, checks, fake, and eager = reference.

Both compute y = activation(scale(a @ b.T) + bias) from int8 a [M, K] and b [N, K]. The first stores y, as a float dtype or, given `out_scale`, as
int8; the second stores y as int8 with scales of its own, one per row and block of columns. `torch.compile` lowers them to templates (lowering.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

from . import reference
from .epilogues import EPILOGUES

__all__ = ["KERNEL_PREFERENCES", "scaled_mm", "scaled_mm_block_quant"]

KERNEL_PREFERENCES = ("auto", "triton", "torch")
BLOCK_SIZES = (32, 64, 128)

_OPERANDS = (
    "Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? a_zero_point=None, Tensor? b_zero_point=None, Tensor? bias=None, *, "
    'str activation="none", str kernel_preference="auto"'
)
_library = torch.library.Library("int8_inductor", "DEF")
_library.define(
    f"scaled_mm({_OPERANDS}, Tensor? out_scale=None, Tensor? out_zero_point=None, int out_quant_min=-128, ScalarType? out_dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(f"scaled_mm_block_quant({_OPERANDS}, int block_size=128) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("round_to_int8(Tensor t, int quant_min=-128) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _is(actual: Any, wanted: Any) -> bool:
    """Whether two sizes agree. Where one depends on data and nothing tells yet, they have to: the compiled code asserts it."""
    if guard_or_false(actual == wanted):
        return True
    if not guard_or_true(actual == wanted):
        return False
    torch._check(actual == wanted, lambda: f"scaled_mm: sizes {actual} and {wanted} must agree")
    return True


def _check_vector(name: str, t: Tensor | None, size: Any, column: bool, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if t is None:
        return
    if t.dtype not in dtypes:
        raise TypeError(f"scaled_mm: {name} must be one of {', '.join(map(str, dtypes))}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"scaled_mm: {name} must be on {device}, the device of a, got {t.device}")
    if t.ndim <= 2 and guard_or_false(t.numel() == 1):
        return
    vector = (t.ndim == 1 or (t.ndim == 2 and column and _is(t.shape[1], 1))) and _is(t.shape[0], size)
    if not vector:
        raise ValueError(f"scaled_mm: {name} must have 1 element or shape [{size}]{f' or [{size}, 1]' if column else ''}, got {list(t.shape)}")


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ZERO_POINT_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)
_K_LIMITS = (
    (reference.MAX_K, ""),
    (reference.MAX_K_ZERO_POINT, " with a zero point"),
    (reference.MAX_K_ZERO_POINTS, " with two zero points"),
)


def check_operands(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None,
    b_zero_point: Tensor | None,
    bias: Tensor | None,
    activation: str,
    kernel_preference: str,
) -> None:
    """Raise TypeError or ValueError, naming the argument, what came and what is allowed."""
    for name, t in (("a", a), ("b", b)):
        if t.dtype != torch.int8:
            raise TypeError(f"scaled_mm: {name} must be torch.int8, got {t.dtype}")
        if t.ndim != 2:
            raise ValueError(f"scaled_mm: {name} must be a matrix, got shape {list(t.shape)}")
    (m, k), n = a.shape, b.shape[0]
    if not _is(b.shape[1], k):
        raise ValueError(f"scaled_mm: a [M, K] and b [N, K] must agree in K, got {list(a.shape)} and {list(b.shape)}")
    if guard_or_false(k == 0) or guard_or_false(n == 0):
        raise ValueError(f"scaled_mm: N and K must be positive, got a {list(a.shape)} and b {list(b.shape)}")
    limit, case = _K_LIMITS[(a_zero_point is not None) + (b_zero_point is not None)]
    if k > limit:
        raise ValueError(f"scaled_mm: K must be at most {limit}{case}, or int32 could overflow; got {k}")
    if b.device != a.device:
        raise ValueError(f"scaled_mm: b must be on {a.device}, the device of a, got {b.device}")
    _check_vector("a_scale", a_scale, m, True, (torch.float32,), a.device)
    _check_vector("b_scale", b_scale, n, True, (torch.float32,), a.device)
    _check_vector("a_zero_point", a_zero_point, m, True, ZERO_POINT_DTYPES, a.device)
    _check_vector("b_zero_point", b_zero_point, n, True, ZERO_POINT_DTYPES, a.device)
    if bias is not None:
        _check_vector("bias", bias, n, False, _FLOATS, a.device)
    if activation not in EPILOGUES:
        raise ValueError(f"scaled_mm: activation must be one of {', '.join(EPILOGUES)}, got {activation!r}")
    if kernel_preference not in KERNEL_PREFERENCES:
        raise ValueError(f"scaled_mm: kernel_preference must be one of {', '.join(KERNEL_PREFERENCES)}, got {kernel_preference!r}")


def check_store(a: Tensor, out_scale: Tensor | None, out_zero_point: Tensor | None, out_quant_min: int, out_dtype: torch.dtype | None) -> None:
    """Raise TypeError or ValueError for what says how scaled_mm stores its result."""
    if out_scale is None:
        if out_zero_point is not None:
            raise ValueError("scaled_mm: out_zero_point needs out_scale, got None")
        if out_dtype is not None and out_dtype not in reference.OUT_DTYPES:
            raise TypeError(f"scaled_mm: out_dtype must be one of {', '.join(map(str, reference.OUT_DTYPES))}, got {out_dtype}")
        return
    if out_dtype not in (None, torch.int8):
        raise TypeError(f"scaled_mm: out_dtype must be torch.int8 or None with out_scale, got {out_dtype}")
    if out_quant_min not in (reference.INT8_MIN, reference.SYMMETRIC_MIN):
        raise ValueError(f"scaled_mm: out_quant_min must be -128 or -127, got {out_quant_min}")
    _check_vector("out_scale", out_scale, a.shape[0], True, (torch.float32,), a.device)
    _check_vector("out_zero_point", out_zero_point, a.shape[0], True, ZERO_POINT_DTYPES, a.device)


def _column(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.reshape(-1, 1)


def _row(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.reshape(-1)


IntMm = Callable[[Tensor, Tensor], Tensor]


def linear_eager(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    int_mm: IntMm = reference.int_mm,
) -> Tensor:
    """activation(scale(a @ b.T) + bias) in float32 [M, N]; `int_mm` is the exact int8 product that it is built on."""
    y = reference.scale_accumulator(int_mm(a, b), a, b, a_scale.reshape(-1, 1), b_scale.reshape(-1), _column(a_zero_point), _row(b_zero_point), bias)
    return EPILOGUES[activation].eager(y)


def store_eager(
    y: Tensor,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_quant_min: int = reference.INT8_MIN,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """What scaled_mm stores of its float32 result y [M, N]: int8 when there is an `out_scale` ([1] or [M, 1]), else `out_dtype` (float32)."""
    if out_scale is None:
        return y.to(out_dtype or torch.float32)
    return reference.quantize(y, out_scale.reshape(-1, 1), _column(out_zero_point), out_quant_min)


def _scaled_mm_eager(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    kernel_preference: str = "auto",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_quant_min: int = -128,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check_operands(a, b, a_scale, b_scale, a_zero_point, b_zero_point, bias, activation, kernel_preference)
    check_store(a, out_scale, out_zero_point, out_quant_min, out_dtype)
    y = linear_eager(a, b, a_scale, b_scale, a_zero_point, b_zero_point, bias, activation=activation)
    return store_eager(y, out_scale, out_zero_point, out_quant_min, out_dtype)


def _scaled_mm_fake(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    kernel_preference: str = "auto",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_quant_min: int = -128,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check_operands(a, b, a_scale, b_scale, a_zero_point, b_zero_point, bias, activation, kernel_preference)
    check_store(a, out_scale, out_zero_point, out_quant_min, out_dtype)
    dtype = torch.int8 if out_scale is not None else out_dtype or torch.float32
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


def _check_block_size(n: Any, block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"scaled_mm_block_quant: block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")
    if not _is(n % block_size, 0):
        raise ValueError(f"scaled_mm_block_quant: N must be a multiple of block_size {block_size}, got {n}")


def _scaled_mm_block_quant_eager(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    kernel_preference: str = "auto",
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    check_operands(a, b, a_scale, b_scale, a_zero_point, b_zero_point, bias, activation, kernel_preference)
    _check_block_size(b.shape[0], block_size)
    y = linear_eager(a, b, a_scale, b_scale, a_zero_point, b_zero_point, bias, activation=activation)
    return reference.quantize_blocks(y, block_size)


def _scaled_mm_block_quant_fake(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    kernel_preference: str = "auto",
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    check_operands(a, b, a_scale, b_scale, a_zero_point, b_zero_point, bias, activation, kernel_preference)
    m, n = a.shape[0], b.shape[0]
    _check_block_size(n, block_size)
    return a.new_empty((m, n)), a.new_empty((m, n // block_size), dtype=torch.float32)


def round_to_int8_eager(t: Tensor, quant_min: int = reference.INT8_MIN) -> Tensor:
    _check_round_to_int8(t, quant_min)
    return reference.saturate(torch.round(t), None, quant_min)


def _round_to_int8_fake(t: Tensor, quant_min: int = reference.INT8_MIN) -> Tensor:
    _check_round_to_int8(t, quant_min)
    return torch.empty_like(t, dtype=torch.int8)


def _check_round_to_int8(t: Tensor, quant_min: int) -> None:
    if t.dtype != torch.float32:
        raise TypeError(f"round_to_int8: t must be torch.float32, got {t.dtype}")
    if quant_min not in (reference.INT8_MIN, reference.SYMMETRIC_MIN):
        raise ValueError(f"round_to_int8: quant_min must be -128 or -127, got {quant_min}")


_library.impl("round_to_int8", round_to_int8_eager, "CompositeExplicitAutograd")
torch.library.register_fake("int8_inductor::round_to_int8", _round_to_int8_fake, lib=_library)
_library.impl("scaled_mm", _scaled_mm_eager, "CompositeExplicitAutograd")
_library.impl("scaled_mm_block_quant", _scaled_mm_block_quant_eager, "CompositeExplicitAutograd")
torch.library.register_fake("int8_inductor::scaled_mm", _scaled_mm_fake, lib=_library)
torch.library.register_fake("int8_inductor::scaled_mm_block_quant", _scaled_mm_block_quant_fake, lib=_library)

scaled_mm = torch.ops.int8_inductor.scaled_mm.default
scaled_mm_block_quant = torch.ops.int8_inductor.scaled_mm_block_quant.default
round_to_int8 = torch.ops.int8_inductor.round_to_int8.default
