"""The tiled template of the block-scaled product: one output tile a program, operands through pointers. Any NVIDIA GPU from sm_80 on, any sizes.

The main loop takes one block of K at a time: an int32 product of it, turned to float32, times the activation's scale for each row and the weight's,
added to a float32 accumulator. Scales are loaded a block ahead: behind the tiles' own traffic a load takes longer than the product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .problem import TILE_ORDER, Device, Problem, padded, tiles
from .render import triton_template
from .tail import Tail, indented

__all__ = ["CONFIGS", "BlockTiledConfig", "is_legal", "template"]


@dataclass(frozen=True)
class BlockTiledConfig:
    """Rows and columns of a tile, pipeline stages, warps, and how many tile rows share a run through the weight (for L2)."""

    block_m: int
    block_n: int
    num_stages: int
    num_warps: int
    group_m: int = 8

    def shared_memory(self, block_k: int) -> int:
        """Bytes of shared memory that the pipelined int8 tiles take."""
        return (self.block_m + self.block_n) * block_k * self.num_stages

    def registers(self, block_k: int, copy_bytes: int) -> int:
        """An estimate, on the high side, of the registers a thread takes where it copies `copy_bytes` of a tile at a time.

        Two accumulators, int32 and float32; three for the address and mask of each copy; 64 for everything else.
        """
        threads = 32 * self.num_warps
        copies = (self.block_m + self.block_n) * block_k // (threads * copy_bytes)
        return 2 * self.block_m * self.block_n // threads + 3 * copies + 64


# Best guesses first, large M before decode.
CONFIGS = (
    BlockTiledConfig(64, 128, 3, 4),
    BlockTiledConfig(128, 128, 3, 8),
    BlockTiledConfig(64, 64, 4, 4),
    BlockTiledConfig(32, 128, 4, 4),
    BlockTiledConfig(32, 64, 5, 4),
    BlockTiledConfig(16, 128, 4, 4),
    BlockTiledConfig(16, 64, 8, 4),
    BlockTiledConfig(16, 64, 5, 4),
    BlockTiledConfig(16, 32, 6, 2),
    # For rows whose length is no multiple of 16 bytes: few copies a thread.
    BlockTiledConfig(32, 32, 3, 4),
    BlockTiledConfig(16, 32, 3, 8),
    BlockTiledConfig(32, 128, 3, 16),
)

MAX_REGISTERS = 255
"""Registers that a thread can have, on every GPU; what does not fit spills to memory."""
MAX_COPY_BYTES = 16
"""The most that a thread copies at a time."""
QUICK_CONFIGS = 5
"""How many configs are timed when max_autotune is off."""
WASTE = 1.5
"""A config is not timed when its tiles cover this many times the area of the tightest config's."""
ONCE = 64
"""Up to so many rows one tile covers M, and the weight is read once."""
FULL = 0.75
"""Tiles for this share of the multiprocessors count as filling the chip."""


def is_legal(config: BlockTiledConfig, problem: Problem, device: Device, tail: Tail) -> bool:
    """Whether `config` can be built, without spilling registers, with that tail on that device."""
    (block_k,) = problem.groups
    copy_bytes = math.gcd(problem.k, MAX_COPY_BYTES)  # every row begins at a multiple of it
    fits = config.shared_memory(block_k) <= device.shared_memory and config.registers(block_k, copy_bytes) <= MAX_REGISTERS
    return fits and (tail.block_size is None or config.block_n % tail.block_size == 0)


def candidates(problem: Problem, device: Device, tail: Tail, *, thorough: bool) -> list[BlockTiledConfig]:
    """The configs worth timing: legal, tiles not wasted on M nor so low that they read the weight twice where once will do; those that fill the chip
    and best guesses first; a few unless `thorough`.
    """
    legal = [config for config in CONFIGS if is_legal(config, problem, device, tail)]
    high = [config for config in legal if config.block_m >= min(problem.m, ONCE)] or legal

    def area(config: BlockTiledConfig) -> int:
        return padded(problem, config.block_m, config.block_n)

    def idle(config: BlockTiledConfig) -> float:
        return max(0.0, FULL * device.multiprocessors - tiles(problem, config.block_m, config.block_n))

    least = min(map(area, high))
    useful = sorted((config for config in high if area(config) <= WASTE * least), key=idle)
    return useful if thorough else useful[:QUICK_CONFIGS]


SCALES = """
a_scales = A_SCALE + ram * {{stride("A_SCALE", 0)}}
{% if BLOCK_N <= BLOCK_K %}
b_scales = B_SCALE + (pid_n * BLOCK_N // BLOCK_K) * {{stride("B_SCALE", 0)}}
{% else %}
b_scales = B_SCALE + (rbn // BLOCK_K) * {{stride("B_SCALE", 0)}}
{% endif %}
a_scale = tl.load(a_scales)
b_scale = tl.load(b_scales)"""
"""Triton statements for where the tile's scales begin, those of the activation's rows and the weight's (one for all columns, or one for each)."""
SCALES_AHEAD = """
{% if BLOCK_N <= BLOCK_K %}
scale = (a_scale * b_scale)[:, None]
{% else %}
scale = a_scale[:, None] * b_scale[None, :]
{% endif %}
ahead = min(k // BLOCK_K + 1, tl.cdiv(K, BLOCK_K) - 1)
a_scale = tl.load(a_scales + ahead * {{stride("A_SCALE", 1)}})
b_scale = tl.load(b_scales + ahead * {{stride("B_SCALE", 1)}})"""
"""Triton statements that make the `scale` of the block at `k` of the scales that were loaded a block before, and load those of the next."""

_MAIN_LOOP = """
{{{{def_kernel({arguments})}}}}
    M = {{{{size("A", 0)}}}}
    N = {{{{size("B", 0)}}}}
    K = {{{{size("A", 1)}}}}
    tile = tl.program_id(0).to(INDEX_DTYPE)
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
{order}
    rm = pid_m * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX_DTYPE)
    # Rows past the end read the first row; the store leaves them out.
    ram = tl.where(rm < M, rm, 0)
    rbn = tl.where(rn < N, rn, 0)
    rk = tl.arange(0, BLOCK_K).to(INDEX_DTYPE)
    a_tile = A + ram[:, None] * {{{{stride("A", 0)}}}} + rk[None, :] * {{{{stride("A", 1)}}}}
    b_tile = B + rbn[None, :] * {{{{stride("B", 0)}}}} + rk[:, None] * {{{{stride("B", 1)}}}}
{scales}
    dot = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
{ahead}
        if EVEN_K:
            a = tl.load(a_tile)
            b = tl.load(b_tile)
        else:
            a = tl.load(a_tile, mask=rk[None, :] < K - k, other=0)
            b = tl.load(b_tile, mask=rk[:, None] < K - k, other=0)
        dot += tl.dot(a, b, out_dtype=tl.int32).to(tl.float32) * scale
        a_tile += BLOCK_K * {{{{stride("A", 1)}}}}
        b_tile += BLOCK_K * {{{{stride("B", 1)}}}}
"""


def source(tail: Tail) -> str:
    """The template's text with that tail, for Inductor to render."""
    loop = _MAIN_LOOP.format(
        arguments=tail.signature("A_SCALE", "B_SCALE"),
        order=indented(TILE_ORDER.splitlines(), 4),
        scales=indented(SCALES.strip().splitlines(), 4),
        ahead=indented(SCALES_AHEAD.strip().splitlines(), 8),
    )
    return loop + tail.source(4)


def template(tail: Tail) -> Any:
    """The TritonTemplate with that tail."""
    return triton_template("int8_block_scaled_mm", "mm_grid", source(tail), tail)


def constants(config: BlockTiledConfig, problem: Problem, device: Device, tail: Tail) -> dict[str, object]:
    """The compile-time constants of a launch."""
    (block_k,) = problem.groups
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": block_k,
        "GROUP_M": config.group_m,
        "EVEN_K": problem.static_k is not None and problem.static_k % block_k == 0,
        "num_stages": config.num_stages,
        "num_warps": config.num_warps,
    }
