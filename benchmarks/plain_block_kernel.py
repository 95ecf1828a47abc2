"""What a first Triton kernel for block-scaled INT8 looks like: one 128 x 128 tile a program, 8 warps, scales loaded and applied block by block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import BLOCK

__all__ = ["block_scaled_mm"]


@triton.jit
def _kernel(a, b, c, a_scale, b_scale, m, n, k, a_scale_row, a_scale_block, b_scale_row, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    grid_n = tl.cdiv(n, SIZE)
    rows = (tl.program_id(0) // grid_n) * SIZE + tl.arange(0, SIZE)
    columns = (tl.program_id(0) % grid_n) * SIZE + tl.arange(0, SIZE)
    steps = tl.arange(0, SIZE)
    a_tile = a + (rows % m)[:, None].to(tl.int64) * k + steps[None, :]
    b_tile = b + (columns % n)[None, :].to(tl.int64) * k + steps[:, None]
    a_scales = a_scale + (rows % m) * a_scale_row
    b_scales = b_scale + ((columns % n) // SIZE) * b_scale_row
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for block in range(tl.cdiv(k, SIZE)):
        inside = steps < k - block * SIZE
        dot = tl.dot(tl.load(a_tile, mask=inside[None, :], other=0), tl.load(b_tile, mask=inside[:, None], other=0), out_dtype=tl.int32)
        total += dot.to(tl.float32) * tl.load(a_scales + block * a_scale_block)[:, None] * tl.load(b_scales + block)[None, :]
        a_tile += SIZE
        b_tile += SIZE
    where = rows[:, None].to(tl.int64) * n + columns[None, :]
    tl.store(c + where, total.to(c.dtype.element_ty), mask=(rows[:, None] < m) & (columns[None, :] < n))


def block_scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """bfloat16 [M, N] of int8 a [M, K] and b [N, K], contiguous, with scales in blocks of 128."""
    (m, k), n = a.shape, b.shape[0]
    c = torch.empty(m, n, dtype=torch.bfloat16, device=a.device)
    grid = (triton.cdiv(m, BLOCK) * triton.cdiv(n, BLOCK),)
    _kernel[grid](a, b, c, a_scale, b_scale, m, n, k, a_scale.stride(0), a_scale.stride(1), b_scale.stride(0), BLOCK, num_warps=8, num_stages=3)
    return c
