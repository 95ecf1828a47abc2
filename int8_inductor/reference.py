"""The eager truth of INT8 quantization: choose scales, quantize, dequantize, scaled_mm. Plain aten arithmetic, torch only.

Everything compiled is held against what stands here. Three properties of the definitions are worth knowing:

* A scale is never zero: it is at least the smallest normal float32, so an all-zero row quantizes to zeros, and 1 / scale is finite.
* A row with a NaN or an infinity has no scale. Chosen dynamically the scale is NaN, so the whole row of the result is NaN, in eager and
  compiled alike. With a given (static) scale infinities saturate and NaN quantizes to the zero point, as PTX `cvt.sat.s8.f32` has it.
* Values within half a step (1 / 255) of the largest float32 may come back from int8 as infinity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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


def _no_smaller(scale: Tensor) -> Tensor:
    """`scale`, SMALLEST_SCALE at the least: not by that name, as torch.compile(dynamic=True) makes an input of a float that it finds among globals
    (2.15), and no pass knows the scale by it.
    """
    return torch.clamp(scale, min=torch.finfo(torch.float32).tiny)


def choose_scale_symmetric(x: Tensor, dims: list[int]) -> Tensor:
    """Scale of symmetric quantization, max|x| / 127 over `dims` (kept, with size 1): float32, NaN where x is not finite."""
    amax = x.float().abs().amax(dims, keepdim=True)
    scale = _no_smaller(amax / INT8_MAX)
    return torch.where(amax < float("inf"), scale, float("nan"))


def choose_scale_asymmetric(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Scale and zero point that map [min(x, 0), max(x, 0)] over `dims` onto [-128, 127]: float32 and int8, dims kept with size 1."""
    x = x.float()
    low = torch.clamp(x.amin(dims, keepdim=True), max=0.0)
    high = torch.clamp(x.amax(dims, keepdim=True), min=0.0)
    # Halved first: high - low can overflow where neither of them does.
    scale = _no_smaller(high / 255 - low / 255)
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


def small_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """The same for K of at most 1024, where float32 holds every partial sum: |sum| <= 2^24."""
    return (a.float() @ b.float().t()).to(torch.int32)


def block_scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    scale_block: int = 128,
) -> Tensor:
    """a [M, K] times b [N, K] transposed, both int8 in blocks, as float32 [M, N]: exact in int32 within each K block, scaled, summed up in float32.

    a_scale: [M, ceil(K / B)], of blocks of 1 x B. b_scale: [ceil(N / B), ceil(K / B)], of blocks of B x B. B is scale_block. The two scales of a
    block are multiplied first: where the product is below 2^-126 it loses precision. After Jetfire (arXiv 2403.12422) and, for the accumulation,
    DeepSeek-V3 (arXiv 2412.19437, section 3.3).
    """
    y = None
    for block in range(a_scale.shape[1]):
        k = slice(block * scale_block, (block + 1) * scale_block)
        scale = a_scale[:, block, None] * expand_blocks(b_scale[:, block], b.shape[:1], (scale_block,))
        term = small_int_mm(a[:, k], b[:, k]).float() * scale
        y = term if y is None else y + term
    assert y is not None
    return y


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


def in_blocks(x: Tensor, block_size: Sequence[int]) -> Tensor:
    """[..., R, C] as [..., ceil(R / r), r, ceil(C / c), c] for block_size (r, c), one dimension for each size given; a size of 1 adds no dimension.

    What a last block lacks is filled with zeros.
    """
    for dim, block in enumerate(block_size, -len(block_size)):
        if block == 1:
            continue
        lacking = -x.shape[dim] % block
        if not statically_known_true(lacking == 0):
            x = F.pad(x, [0, 0] * (-dim - 1) + [0, lacking])
        x = x.unflatten(dim, (-1, block))
    return x


def whole_blocks(x: Tensor, block: int) -> Tensor:
    """`x` [..., C] with zeros behind it up to a multiple of `block` columns."""
    lacking = -x.shape[-1] % block
    return x if statically_known_true(lacking == 0) else F.pad(x, [0, lacking])


def expand_blocks(scale: Tensor, sizes: Sequence[int], block_size: Sequence[int]) -> Tensor:
    """Scales [..., ceil(R / r), ceil(C / c)] as [..., R, C], for sizes (R, C) and block_size (r, c): each repeated over its block."""
    for dim, (size, block) in enumerate(zip(sizes, block_size, strict=True), -len(sizes)):
        if block > 1:
            wide = scale.unsqueeze(dim)
            repeated = wide.expand(*wide.shape[:dim], block, *wide.shape[wide.ndim + dim + 1 :])
            scale = repeated.flatten(dim - 1, dim).narrow(dim, 0, size)
    return scale


def choose_scale_blocks(blocks: Tensor, dims: list[int]) -> Tensor:
    """Scale of symmetric quantization of blocks: as choose_scale_symmetric, but 0 for a block of zeros."""
    amax = blocks.float().abs().amax(dims, keepdim=True)
    scale = _no_smaller(amax / INT8_MAX)
    return torch.where((amax > 0) & (amax < float("inf")), scale, amax * 0.0)


def quantize_blocks(x: Tensor, block_size: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Symmetric int8 of float x [..., R, C] and float32 scales [..., ceil(R / r), ceil(C / c)], one for each block of block_size (r, c).

    block_size: an int is for blocks of that many columns. The last blocks may be short. A block of zeros has the scale 0 and comes back as zeros.
    """
    sizes = _sizes(block_size)
    blocks, dims = in_blocks(x, sizes), _block_dims(sizes)
    scale = choose_scale_blocks(blocks, dims)
    q = quantize(blocks, scale, None, SYMMETRIC_MIN, INT8_MAX)
    for dim in range(-1, -len(sizes) - 1, -1):
        if sizes[dim] > 1:
            q = q.flatten(dim - 1, dim).narrow(dim, 0, x.shape[dim])
    return q, scale.squeeze(dims)


def _sizes(block_size: int | Sequence[int]) -> tuple[int, ...]:
    return (block_size,) if isinstance(block_size, int) else tuple(block_size)


def _block_dims(sizes: tuple[int, ...]) -> list[int]:
    """Which dimensions of in_blocks' result run within a block."""
    dims, dim = [], -1
    for block in reversed(sizes):
        if block > 1:
            dims.append(dim)
        dim -= 1 if block == 1 else 2
    return dims


def dequantize_blocks(q: Tensor, scale: Tensor, block_size: int | Sequence[int]) -> Tensor:
    """int8 q [..., R, C] times its scales, as quantize_blocks makes them, in float32."""
    sizes = _sizes(block_size)
    return dequantize(q, expand_blocks(scale, q.shape[q.ndim - len(sizes) :], sizes))
