"""The persistent template of the block-scaled product: one program a slot of the chip, one output tile after another, operands through descriptors.

For sm_90 and on, and operands that descriptors can name (see Problem.tma). The product of one block of K has to be waited for, turned to float32,
scaled and added up; the other programs of a multiprocessor keep the tensor cores busy meanwhile. Two of them have just the registers for tiles of
128 x 128, in two parts of 64 rows, one int32 accumulator after the other. ptxas would begin the second part's product before the first is rescaled,
and spill: so the second accumulator starts from the first part's result AND a zero that no compiler knows.

8192 cubed on an H200: 1155 us with two programs (2430 without the AND); 1290 for tiles of 64 x 128; 1470 for a plain kernel of 8 warps; 742 without
any rescaling. Triton's warp specialization takes 976, but its results were wrong in places for 2048 x 4096 x 4096 (Triton 3.6), so it is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .problem import TILE_ORDER, Device, Problem, padded, tiles
from .render import triton_template
from .tail import Tail, indented

__all__ = ["CONFIGS", "BlockPersistentConfig", "is_legal", "template"]


@dataclass(frozen=True)
class BlockPersistentConfig:
    """Rows and columns of a part of a tile, how many parts of rows and of columns a tile has, pipeline stages, warps, programs that share a
    multiprocessor, and how many tile rows share a run through the weight (for L2).
    """

    block_m: int
    block_n: int
    parts_m: int
    parts_n: int
    num_stages: int
    num_warps: int
    programs: int
    group_m: int = 8

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.parts_m * self.block_m

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return self.parts_n * self.block_n

    def shared_memory(self, block_k: int) -> int:
        """Bytes of shared memory a program takes: the pipelined int8 tiles, and their barriers."""
        return (self.rows + self.columns) * block_k * self.num_stages + 64


# 6304 x 3072 x 768: 45.1 us with three programs, 50.5 with two of 128 x 128.
CONFIGS = (
    BlockPersistentConfig(64, 128, 2, 1, 3, 4, programs=2),
    BlockPersistentConfig(64, 128, 1, 1, 3, 4, programs=3),
    BlockPersistentConfig(64, 128, 1, 1, 4, 4, programs=2),
)
RESERVED = 1024
"""Bytes of shared memory that every block takes for itself."""


def is_legal(config: BlockPersistentConfig, problem: Problem, device: Device, tail: Tail) -> bool:
    """Whether the device runs that many programs at once on a multiprocessor with that tail, and descriptors can name the operands.

    Tiles of several parts have no registers left for a scale of the weight for each column.
    """
    (block_k,) = problem.groups
    fits = config.programs * (config.shared_memory(block_k) + RESERVED) <= device.shared_memory + RESERVED
    if config.parts_m * config.parts_n > 1 and config.block_n > block_k:
        return False
    return fits and problem.tma and device.tma and (tail.block_size is None or config.block_n % tail.block_size == 0)


def candidates(problem: Problem, device: Device, tail: Tail, *, thorough: bool) -> list[BlockPersistentConfig]:
    """The configs worth timing: legal, more tiles than multiprocessors, and not twice the area; few anyway, `thorough` or not.

    So never for a single element, which Inductor stores without a mask: lanes past the edge are copies of it in the tiled template, zero here.
    """

    def useful(config: BlockPersistentConfig) -> bool:
        many = tiles(problem, config.rows, config.columns) > device.multiprocessors
        return many and padded(problem, config.rows, config.columns) < 2 * problem.m * problem.n

    return [config for config in CONFIGS if useful(config) and is_legal(config, problem, device, tail)]


# Jinja's braces stand as they are: the parts in capitals are put in below.
_MAIN_LOOP = """
{{def_kernel(ARGUMENTS)}}
    M = {{size("A", 0)}}
    N = {{size("B", 0)}}
    K = {{size("A", 1)}}
    grid_m = tl.cdiv(M, PARTS_M * BLOCK_M)
    grid_n = tl.cdiv(N, PARTS_N * BLOCK_N)
    a_tiles = tl.make_tensor_descriptor(A, shape=[M, K], strides=[{{stride("A", 0)}}, 1], block_shape=[BLOCK_M, BLOCK_K])
    b_tiles = tl.make_tensor_descriptor(B, shape=[N, K], strides=[{{stride("B", 0)}}, 1], block_shape=[BLOCK_N, BLOCK_K])
    zero = tl.program_id(1)  # the grid has one dimension
    for tile in tl.range(tl.program_id(0), grid_m * grid_n, NUM_SMS):
TILE_ORDER
        first_m = (pid_m * PARTS_M * BLOCK_M).to(tl.int32)
        first_row = first_m.to(INDEX_DTYPE)
        first_n = (pid_n * PARTS_N * BLOCK_N).to(tl.int32)
{% for i in range(PARTS_M) %}
        rows = first_row + {{i}} * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
        a_scales_{{i}} = A_SCALE + tl.where(rows < M, rows, 0) * {{stride("A_SCALE", 0)}}
{% endfor %}
{% for j in range(PARTS_N) %}
{% if BLOCK_N <= BLOCK_K %}
        column_{{j}} = first_n + {{j}} * BLOCK_N
{% else %}
        column_{{j}} = first_n + {{j}} * BLOCK_N + tl.arange(0, BLOCK_N)
{% endif %}
        # A part that lies past the edge reads the first scale.
        b_scales_{{j}} = B_SCALE + tl.where(column_{{j}} < N, column_{{j}} // BLOCK_K, 0).to(INDEX_DTYPE) * {{stride("B_SCALE", 0)}}
{% endfor %}
{% for i in range(PARTS_M) %}
{% for j in range(PARTS_N) %}
        dot_{{i}}_{{j}} = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
{% endfor %}
{% endfor %}
        for k in range(0, K, BLOCK_K):
{% for i in range(PARTS_M) %}
            a_{{i}} = a_tiles.load([first_m + {{i}} * BLOCK_M, k])
            a_scale_{{i}} = tl.load(a_scales_{{i}} + (k // BLOCK_K) * {{stride("A_SCALE", 1)}})
{% endfor %}
{% for j in range(PARTS_N) %}
            b_{{j}} = b_tiles.load([first_n + {{j}} * BLOCK_N, k]).T
            b_scale_{{j}} = tl.load(b_scales_{{j}} + (k // BLOCK_K) * {{stride("B_SCALE", 1)}})
{% endfor %}
{% for i in range(PARTS_M) %}
{% for j in range(PARTS_N) %}
{% if BLOCK_N <= BLOCK_K %}
            scale = (a_scale_{{i}} * b_scale_{{j}})[:, None]
{% else %}
            scale = a_scale_{{i}}[:, None] * b_scale_{{j}}[None, :]
{% endif %}
{% if i + j == 0 %}
            product = tl.dot(a_{{i}}, b_{{j}}, out_dtype=tl.int32)
{% else %}
            start = dot_{{i if j else i - 1}}_{{j - 1 if j else PARTS_N - 1}}.to(tl.int32, bitcast=True) & zero
            product = tl.dot(a_{{i}}, b_{{j}}, start, out_dtype=tl.int32)
{% endif %}
            dot_{{i}}_{{j}} += product.to(tl.float32) * scale
{% endfor %}
{% endfor %}
        tile_n = pid_n
        for part in tl.static_range(PARTS_M * PARTS_N):
{% for i in range(PARTS_M) %}
{% for j in range(PARTS_N) %}
            if part == {{i * PARTS_N + j}}:
                dot = dot_{{i}}_{{j}}
{% endfor %}
{% endfor %}
            rm = first_row + part // PARTS_N * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
            pid_n = tile_n * PARTS_N + part % PARTS_N
            rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX_DTYPE)
            ram = tl.where(rm < M, rm, 0)
            rbn = tl.where(rn < N, rn, 0)
"""


def source(tail: Tail) -> str:
    """The template's text with that tail, for Inductor to render."""
    loop = _MAIN_LOOP.replace("ARGUMENTS", tail.signature("A_SCALE", "B_SCALE"))
    return loop.replace("TILE_ORDER", indented(TILE_ORDER.splitlines(), 8)) + tail.source(12)


def template(tail: Tail) -> Any:
    """The TritonTemplate with that tail."""
    return triton_template("int8_block_scaled_mm_persistent", "persistent_mm_grid", source(tail), tail)


def constants(config: BlockPersistentConfig, problem: Problem, device: Device, tail: Tail) -> dict[str, object]:
    """The compile-time constants of a launch. NUM_SMS, as Inductor's grid for persistent kernels calls it, is how many programs run at once."""
    (block_k,) = problem.groups
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": block_k,
        "PARTS_M": config.parts_m,
        "PARTS_N": config.parts_n,
        "GROUP_M": config.group_m,
        "NUM_SMS": device.multiprocessors * config.programs,
        "num_stages": config.num_stages,
        "num_warps": config.num_warps,
    }
