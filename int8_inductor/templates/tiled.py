"""The tiled template: one output tile a program, operands through pointers. Any NVIDIA GPU from sm_80 on, any M, N, K and strides.

The weight is [N, K] with K contiguous, as 8-bit tensor cores want both operands; other strides work, more slowly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .problem import TILE_ORDER, Device, Problem, padded, tiles
from .render import triton_template
from .tail import Tail, indented
from .weights import whole_tiles

__all__ = ["CONFIGS", "TiledConfig", "is_legal", "template"]


@dataclass(frozen=True)
class TiledConfig:
    """Tile sizes in elements, pipeline stages, warps, and how many tile rows share a run through the weight (for L2)."""

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    group_m: int = 8

    def shared_memory(self) -> int:
        """Bytes of shared memory that the pipelined int8 tiles take."""
        return (self.block_m + self.block_n) * self.block_k * self.num_stages

    def registers(self, tail: Tail, copy_bytes: int) -> int:
        """An estimate, on the high side, of the registers a thread takes where it copies `copy_bytes` of a tile at a time.

        Accumulators; three for the address and mask of each copy (a copy of 1 or 2 bytes takes one for the data too, but shares the rest);
        60 for everything else, and 20 more where the loop sums operands for a zero point. tests/test_machine_code.py holds it against cubins.
        """
        threads = 32 * self.num_warps
        accumulators = self.block_m * self.block_n // threads
        copies = (self.block_m + self.block_n) * self.block_k // (threads * copy_bytes)
        return accumulators + 3 * copies + 60 + (20 if tail.loop_lines() else 0)


# Best guesses first, large M before decode. On an H200 tiles of which several share a multiprocessor win, as one's epilogue overlaps another's main
# loop: 128 x 128 x 128 with 3 stages and 4 warps fits twice (8192 cubed: 828 us, against 979 for 128 x 256), 64 x 128 x 128 three times (K = 768).
CONFIGS = (
    TiledConfig(128, 128, 128, 3, 4),
    TiledConfig(64, 128, 128, 3, 4),
    TiledConfig(128, 128, 128, 3, 8),
    TiledConfig(64, 128, 128, 4, 4),
    TiledConfig(128, 128, 64, 4, 8),
    TiledConfig(128, 256, 128, 3, 8),
    TiledConfig(256, 128, 128, 3, 8),
    TiledConfig(64, 128, 64, 4, 4),
    TiledConfig(64, 256, 128, 3, 4),
    TiledConfig(128, 128, 64, 3, 8),
    # Up to 256 rows, where tiles of 128 do not fill the chip: 128 x 4096 x 14336 takes 30.3 us with the second, 34.7 with the fourth;
    # 64 x 4096 x 14336 27.8 with the third; 256 x 6144 x 4096 20.5 with the first.
    TiledConfig(64, 64, 128, 4, 4),
    TiledConfig(64, 64, 256, 6, 4),
    TiledConfig(64, 32, 256, 6, 4),
    TiledConfig(64, 32, 256, 4, 4),
    TiledConfig(64, 64, 128, 6, 4),
    TiledConfig(64, 64, 128, 3, 4),
    # Up to 32 rows: K = 14336, N = 6144 and N = 28672 have the first three.
    TiledConfig(32, 32, 512, 6, 2),
    TiledConfig(32, 64, 256, 6, 2),
    TiledConfig(32, 128, 256, 3, 2),
    TiledConfig(32, 32, 256, 5, 4),
    TiledConfig(32, 64, 256, 4, 4),
    TiledConfig(32, 128, 128, 4, 4),
    # Decode: the weight streams once. On an H200 at M = 16 narrow tiles win where N is 4096 or 6144, the wide one at 28672; at K = 14336 the first.
    TiledConfig(16, 16, 512, 4, 2),
    TiledConfig(16, 128, 256, 4, 4),
    TiledConfig(16, 32, 256, 8, 2),
    TiledConfig(16, 32, 256, 5, 4),
    TiledConfig(16, 64, 256, 6, 4),
    TiledConfig(16, 64, 256, 4, 4),
    TiledConfig(16, 128, 128, 3, 4),
    # For rows whose length is no multiple of 16 bytes: few copies a thread.
    TiledConfig(128, 128, 32, 3, 8),
    TiledConfig(64, 64, 32, 3, 4),
    TiledConfig(16, 64, 64, 3, 4),
)

MAX_REGISTERS = 255
"""Registers that a thread can have, on every GPU; what does not fit spills to memory."""
MAX_COPY_BYTES = 16
"""The most that a thread copies at a time."""
QUICK_CONFIGS = 8
"""How many configs are timed when max_autotune is off."""
WASTE = 1.5
"""A config is not timed when its tiles cover this many times the area of the tightest config's."""
ONCE = 64
"""Up to so many rows one tile covers M, and the weight is read once."""
FULL = 0.75
"""Tiles for this share of the multiprocessors count as filling the chip."""


def is_legal(config: TiledConfig, problem: Problem, device: Device, tail: Tail) -> bool:
    """Whether `config` can be built, without spilling registers, with that tail on that device."""
    copy_bytes = math.gcd(problem.k, MAX_COPY_BYTES)  # every row begins at a multiple of it
    fits = config.shared_memory() <= device.shared_memory and config.registers(tail, copy_bytes) <= MAX_REGISTERS
    return fits and whole_tiles(problem, config.block_n) and (tail.block_size is None or config.block_n % tail.block_size == 0)


def candidates(problem: Problem, device: Device, tail: Tail, *, thorough: bool) -> list[TiledConfig]:
    """The configs worth timing: legal, tiles not wasted on M nor so low that they read the weight twice where once will do; those that fill the chip
    and best guesses first; a few unless `thorough`.
    """
    legal = [config for config in CONFIGS if is_legal(config, problem, device, tail)]
    high = [config for config in legal if config.block_m >= min(problem.m, ONCE)] or legal

    def area(config: TiledConfig) -> int:
        return padded(problem, config.block_m, config.block_n)

    def idle(config: TiledConfig) -> float:
        return max(0.0, FULL * device.multiprocessors - tiles(problem, config.block_m, config.block_n))

    least = min(map(area, high))
    useful = sorted((config for config in high if area(config) <= WASTE * least), key=idle)
    return useful if thorough else useful[:QUICK_CONFIGS]


_MAIN_LOOP = """
{{{{def_kernel({arguments})}}}}
    M = {{{{size("A", 0)}}}}
    N = {rows}
    K = {{{{size("A", 1)}}}}
    tile = tl.program_id(0).to(INDEX_DTYPE)
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
{order}
{pick}
    rm = pid_m * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX_DTYPE)
    # Rows past the end read the first row; the store leaves them out.
    ram = tl.where(rm < M, rm, 0)
    rbn = {local_columns}
    rk = tl.arange(0, BLOCK_K).to(INDEX_DTYPE)
    a_tile = A + ram[:, None] * {{{{stride("A", 0)}}}} + rk[None, :] * {{{{stride("A", 1)}}}}
    b_tile = B + rbn[None, :] * {b_stride_0} + rk[:, None] * {b_stride_1}
    dot = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
{init}
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_tile)
            b = tl.load(b_tile)
        else:
            a = tl.load(a_tile, mask=rk[None, :] < K - k, other=0)
            b = tl.load(b_tile, mask=rk[:, None] < K - k, other=0)
        dot = tl.dot(a, b, dot, out_dtype=tl.int32)
{loop}
        a_tile += BLOCK_K * {{{{stride("A", 1)}}}}
        b_tile += BLOCK_K * {b_stride_1}
"""


def source(tail: Tail) -> str:
    """The template's text with that tail, for Inductor to render."""
    weights = tail.weights
    loop = _MAIN_LOOP.format(
        arguments=tail.signature(),
        rows=weights.rows,
        order=indented(TILE_ORDER.splitlines(), 4),
        pick=indented(weights.pick(["B", *tail.of_each_weight()]), 4),
        local_columns=weights.local_columns,
        b_stride_0=weights.stride(0),
        b_stride_1=weights.stride(1),
        init=indented(tail.init_lines(), 4),
        loop=indented(tail.loop_lines(), 8),
    )
    return loop + tail.source(4)


def template(tail: Tail) -> Any:
    """The TritonTemplate with that tail."""
    return triton_template("int8_scaled_mm", "mm_grid", source(tail), tail)


def constants(config: TiledConfig, problem: Problem, device: Device, tail: Tail) -> dict[str, object]:
    """The compile-time constants of a launch."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "EVEN_K": problem.static_k is not None and problem.static_k % config.block_k == 0,
        "num_stages": config.num_stages,
        "num_warps": config.num_warps,
    }
