"""The persistent template of the block-scaled product: one program a slot of the chip, one output tile after another, operands through descriptors.

For sm_90 and on, and operands that descriptors can name (see Problem.tma). The product of one block of K has to be waited for, turned to float32,
scaled and added up; something else has to keep the tensor cores busy meanwhile. On Hopper that is done best by warp specialization: one group of
warps loads, two multiply and rescale 128 x 128 each, in two parts of 64 rows, and take turns. Triton makes that of `warp_specialize`; but it moves
the descriptors' first row for the second group, and with it everything that is computed of the same number, so rows are counted from another: the
first row plus a zero that no compiler knows.

Elsewhere, and for tails that Triton cannot divide, it is the other programs of a multiprocessor. Two of them have just the registers for tiles of
128 x 128, in two parts of 64 rows, one int32 accumulator after the other. ptxas would begin the second part's product before the first is rescaled,
and spill: so the second accumulator starts from the first part's result AND that zero.

8192 cubed on an H200: 1006 us; 1155 with two programs (2430 without the AND); 1290 for tiles of 64 x 128; 1470 for a plain kernel of 8 warps;
742 without any rescaling.
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
    """Rows of a part of a tile, columns of a tile, how many parts of rows it has, pipeline stages, warps, programs that share a multiprocessor, how
    many tile rows share a run through the weight (for L2), and whether warps are specialized (num_warps is then of a group that multiplies).
    """

    block_m: int
    block_n: int
    parts: int
    num_stages: int
    num_warps: int
    programs: int
    group_m: int = 8
    specialized: bool = False

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.parts * self.block_m

    def shared_memory(self, block_k: int) -> int:
        """Bytes of shared memory a program takes: the pipelined int8 tiles, and their barriers."""
        return (self.rows + self.block_n) * block_k * self.num_stages + 64


# 6304 x 3072 x 768: 43.9 us with three programs, 52.8 with two of 128 x 128, 46.5 specialized.
CONFIGS = (
    BlockPersistentConfig(128, 128, 2, 4, 4, programs=1, group_m=4, specialized=True),
    BlockPersistentConfig(64, 128, 2, 3, 4, programs=2),
    BlockPersistentConfig(64, 128, 1, 3, 4, programs=3),
    BlockPersistentConfig(64, 128, 1, 4, 4, programs=2),
)
RESERVED = 1024
"""Bytes of shared memory that every block takes for itself."""


def is_legal(config: BlockPersistentConfig, problem: Problem, device: Device, tail: Tail) -> bool:
    """Whether the device runs that many programs at once on a multiprocessor with that tail, and descriptors can name the operands.

    Specialized, a tail that does more than add a bias and store half precision spills hundreds of registers, or cannot be divided.
    """
    (block_k,) = problem.groups
    fits = config.programs * (config.shared_memory(block_k) + RESERVED) <= device.shared_memory + RESERVED
    short = tail.fast and tail.activation == "none" and tail.out_scale is None and tail.block_size is None
    if config.specialized and not (device.hopper and short):
        return False
    return fits and problem.tma and device.tma and (tail.block_size is None or config.block_n % tail.block_size == 0)


def candidates(problem: Problem, device: Device, tail: Tail, *, thorough: bool) -> list[BlockPersistentConfig]:
    """The configs worth timing: legal, more tiles than multiprocessors, and not twice the area; few anyway, `thorough` or not.

    So never for a single element, which Inductor stores without a mask: lanes past the edge are copies of it in the tiled template, zero here.
    """

    def useful(config: BlockPersistentConfig) -> bool:
        many = tiles(problem, config.rows, config.block_n) > device.multiprocessors
        return many and padded(problem, config.rows, config.block_n) < 2 * problem.m * problem.n

    return [config for config in CONFIGS if useful(config) and is_legal(config, problem, device, tail)]


# Jinja's braces stand as they are: the parts in capitals are put in below.
_MAIN_LOOP = """
{{def_kernel(ARGUMENTS)}}
    M = {{size("A", 0)}}
    N = {{size("B", 0)}}
    K = {{size("A", 1)}}
    grid_m = tl.cdiv(M, PARTS * BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
    a_tiles = tl.make_tensor_descriptor(A, shape=[M, K], strides=[{{stride("A", 0)}}, 1], block_shape=[BLOCK_M, BLOCK_K])
    b_tiles = tl.make_tensor_descriptor(B, shape=[N, K], strides=[{{stride("B", 0)}}, 1], block_shape=[BLOCK_N, BLOCK_K])
    zero = tl.program_id(1)  # the grid has one dimension
    for tile in tl.range(tl.program_id(0), grid_m * grid_n, NUM_SMS, warp_specialize=SPECIALIZED):
TILE_ORDER
        first_m = (pid_m * PARTS * BLOCK_M).to(tl.int32)
        first_row = first_m.to(INDEX_DTYPE) + zero
        first_n = (pid_n * BLOCK_N).to(tl.int32)
        rn = first_n.to(INDEX_DTYPE) + tl.arange(0, BLOCK_N).to(INDEX_DTYPE)
        rbn = tl.where(rn < N, rn, 0)
{% if BLOCK_N <= BLOCK_K %}
        b_scales = B_SCALE + (first_n // BLOCK_K) * {{stride("B_SCALE", 0)}}
{% else %}
        b_scales = B_SCALE + (rbn // BLOCK_K) * {{stride("B_SCALE", 0)}}
{% endif %}
{% for part in range(PARTS) %}
        rows = first_row + {{part}} * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
        a_scales_{{part}} = A_SCALE + tl.where(rows < M, rows, 0) * {{stride("A_SCALE", 0)}}
        dot_{{part}} = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
{% endfor %}
        for k in range(0, K, BLOCK_K):
            b = b_tiles.load([first_n, k]).T
            b_scale = tl.load(b_scales + (k // BLOCK_K) * {{stride("B_SCALE", 1)}})
{% for part in range(PARTS) %}
            a = a_tiles.load([first_m + {{part}} * BLOCK_M, k])
            a_scale = tl.load(a_scales_{{part}} + (k // BLOCK_K) * {{stride("A_SCALE", 1)}})
{% if BLOCK_N <= BLOCK_K %}
            scale = (a_scale * b_scale)[:, None]
{% else %}
            scale = a_scale[:, None] * b_scale[None, :]
{% endif %}
{% if part == 0 or SPECIALIZED %}
            product = tl.dot(a, b, out_dtype=tl.int32)
{% else %}
            product = tl.dot(a, b, dot_{{part - 1}}.to(tl.int32, bitcast=True) & zero, out_dtype=tl.int32)
{% endif %}
            dot_{{part}} += product.to(tl.float32) * scale
{% endfor %}
        for part in tl.static_range(PARTS):
{% for part in range(PARTS) %}
            if part == {{part}}:
                dot = dot_{{part}}
{% endfor %}
            rm = first_row + part * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
            ram = tl.where(rm < M, rm, 0)
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
        "PARTS": config.parts,
        "GROUP_M": config.group_m,
        "SPECIALIZED": config.specialized,
        "NUM_SMS": device.multiprocessors * config.programs,
        "num_stages": config.num_stages,
        "num_warps": config.num_warps,
    }
