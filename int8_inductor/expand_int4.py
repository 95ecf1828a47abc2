"""Packed INT4 as int8 in memory, for kernels whose operands come from memory as they are multiplied. Imported where such a kernel is launched: it
needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["expand_int4"]

BLOCK = 4096
"""Bytes of packed values that a program takes."""


def _expand(PACKED, VALUES, total, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):  # type: ignore[no-untyped-def]
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.load(PACKED + at, mask=at < total, other=0)
    low = (packed & 15).to(tl.int8) - 8
    high = (packed >> 4).to(tl.int8) - 8
    both = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(VALUES + both, tl.interleave(low, high), mask=both < 2 * total)


_kernel: Any = triton.jit(_expand)


def expand_int4(packed: Tensor, *, dependent: bool = False) -> Tensor:
    """uint8 [N, K / 2], two values a byte (int4.py) -> int8 [N, K] in [-8, 7], on the packed values' device, the current one.

    dependent: whether it is launched, and what follows it may be, before the kernel before has ended (launching.py).
    """
    packed = packed.contiguous()
    values = torch.empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=torch.int8, device=packed.device)
    total = packed.numel()
    options = {"launch_pdl": True} if dependent else {}
    _kernel[(triton.cdiv(total, BLOCK),)](packed, values, total, BLOCK=BLOCK, DEPENDENT=dependent, num_warps=4, **options)
    return values
