"""The eager truth of INT8 quantization: choose scales, quantize, dequantize, scaled_mm. Plain aten arithmetic, torch only.

Everything compiled is held against what stands here. Three properties of the definitions are worth knowing:

* A scale is never zero: it is at least the smallest normal float32, so an all-zero row quantizes to zeros, and 1 / scale is finite.
* A row with a NaN or an infinity has no scale. Chosen dynamically the scale is NaN, so the whole row of the result is NaN, in eager and
  compiled alike. With a given (static) scale infinities saturate and NaN quantizes to the zero point, as PTX `cvt.sat.s8.f32` has it.
* Values within half a step (1 / 255) of the largest float32 may come back from int8 as infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

INT8_MIN, INT8_MAX = -128, 127
SYMMETRIC_MIN = -127
"""Symmetric quantization leaves -128 out, so that negation is exact and scale = amax / 127 (the range torchao uses too)."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny

MAX_K = (2**31 - 1) // (128 * 128)
"""Largest K whose int8 dot product cannot overflow int32: |a| and |b| are at most 128."""
MAX_K_ZERO_POINT = (2**31 - 1) // (255 * 128)
"""The same when a zero point is subtracted from one of the two: |a - zero_point| is at most 255."""
MAX_K_ZERO_POINTS = (2**31 - 1) // (255 * 255)
"""The same when a zero point is subtracted from both."""

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_scale_symmetric(x: Tensor, dims: list[int]) -> Tensor:
    """Scale of symmetric quantization, max|x| / 127 over `dims` (kept, with size 1): float32, NaN where x is not finite."""
    amax = x.float().abs().amax(dims, keepdim=True)
    scale = torch.clamp(amax / INT8_MAX, min=SMALLEST_SCALE)
    return torch.where(amax < float("inf"), scale, float("nan"))


def choose_scale_asymmetric(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Scale and zero point that map [min(x, 0), max(x, 0)] over `dims` onto [-128, 127]: float32 and int8, dims kept with size 1."""
    x = x.float()
    low = torch.clamp(x.amin(dims, keepdim=True), max=0.0)
    high = torch.clamp(x.amax(dims, keepdim=True), min=0.0)
    # Halved first: high - low can overflow where neither of them does.
    scale = torch.clamp((high / 255 - low / 255), min=SMALLEST_SCALE)
    finite = scale < float("inf")
    zero_point = torch.clamp(torch.round(INT8_MIN - low / scale), INT8_MIN, INT8_MAX)
    zero_point = torch.where(finite, zero_point, 0.0).to(torch.int8)
    return torch.where(finite, scale, float("nan")), zero_point


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, quant_min: int = INT8_MIN, quant_max: int = INT8_MAX) -> Tensor:
    """clamp(round(x * (1 / scale)) + zero_point) as int8, rounding half to even, saturating; NaN becomes the zero point.

    `scale` (float32) and `zero_point` (integer) broadcast against `x`. One reciprocal a scale instead of one division a value, as torchao has it:
    it is the divisions that would bound a kernel that quantizes a row.
    """
    return saturate(torch.round(x.float() * torch.reciprocal(scale)), zero_point, quant_min, quant_max)


def saturate(steps: Tensor, zero_point: Tensor | None = None, quant_min: int = INT8_MIN, quant_max: int = INT8_MAX) -> Tensor:
    """clamp(steps + zero_point) as int8 for whole float32 `steps`; NaN becomes the zero point."""
    # x == x says "not NaN"; isnan is not vectorised in Inductor's C++ and would cost more than all the rest.
    steps = torch.where(steps == steps, steps, 0.0)
    if zero_point is not None:
        steps = steps + zero_point.float()
    return torch.clamp(steps, quant_min, quant_max).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """(q - zero_point) * scale in float32; `scale` and `zero_point` broadcast against `q`."""
    steps = q.float()
    if zero_point is not None:
        steps = steps - zero_point.float()
    return steps * scale


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Exact int32 [M, N] of int8 a [M, K] times int8 b [N, K] transposed, on any device and for any size up to MAX_K."""
    # float64 holds every partial sum exactly: |sum| <= 2^31 < 2^53. Not torch._int_mm: on a CPU it leaves its output uninitialized where a size
    # of 1 has a stride that oneDNN does not expect (pytorch issue 195066), and a GPU's refuses small M.
    return (a.double() @ b.double().t()).to(torch.int32)


def scale_accumulator(
    acc: Tensor,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """int32 accumulator [M, N] of a [M, K] and b [N, K] -> float32 linear output: zero points, both scales, bias.

    `a_scale`, `a_zero_point`: [M, 1] or [1]; `b_scale`, `b_zero_point`: [N] or [1]; `bias`: [N]. Zero points are corrected exactly, in int32:
    sum (a - za)(b - zb) = sum ab - za sum b - zb sum (a - za). The scales are applied one after the other: their product could underflow.
    """
    if a_zero_point is not None:
        shift = a_zero_point.to(torch.int32)
        if statically_known_true(shift.numel() == 1):
            # Multiplied before the sum: compiled code then subtracts a vector that it has, in place of a product for each of M x N values.
            acc = acc - (b.to(torch.int32) * shift.reshape(1)).sum(1, dtype=torch.int32)
        else:
            acc = acc - shift * b.sum(1, dtype=torch.int32)
    if b_zero_point is not None:
        row_sum = a.sum(1, dtype=torch.int32, keepdim=True)
        if a_zero_point is not None:
            row_sum = row_sum - a.shape[1] * a_zero_point.to(torch.int32)
        acc = acc - row_sum * b_zero_point.to(torch.int32)
    y = acc.float() * a_scale * b_scale
    return y if bias is None else y + bias.float()


def quantize_blocks(y: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """float32 [M, N] -> int8 [M, N] and float32 scales [M, N / block_size], symmetric, one scale per row and block of columns."""
    m, n = y.shape
    blocks = y.reshape(m, n // block_size, block_size)
    scale = choose_scale_symmetric(blocks, [-1])
    q = quantize(blocks, scale, None, SYMMETRIC_MIN, INT8_MAX)
    return q.reshape(m, n), scale.reshape(m, n // block_size)
