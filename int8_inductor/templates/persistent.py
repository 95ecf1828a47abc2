"""The persistent template: one program a slot of the chip, which takes one output tile after another; operands through tensor descriptors (TMA).

For sm_90 and on, and operands that descriptors can name (see Problem.tma). Against the tiled template it saves address arithmetic and registers,
and, where the two loops are flattened into one, the next tile's loads are on their way while this one's tail runs. A descriptor fills what lies
past the edge of an operand with zeros. After Triton's tutorial 09-persistent-matmul and Inductor's triton_persistent_tma_mm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .problem import TILE_ORDER, Device, Problem, padded, tiles
from .render import triton_template
from .tail import Tail, indented
from .weights import expanded, whole_tiles

__all__ = ["CONFIGS", "PersistentConfig", "is_legal", "template"]


@dataclass(frozen=True)
class PersistentConfig:
    """Tile sizes in elements, pipeline stages, warps, how many programs share a multiprocessor, and whether the loops over tiles and K are one."""

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    programs: int
    flatten: bool
    group_m: int = 8

    def shared_memory(self, tail: Tail) -> int:
        """Bytes of shared memory a program takes: the pipelined int8 tiles, and, where the next tile's are on their way at the store, room in which
        the store turns the result around (seen in cubins; tests/test_machine_code.py).
        """
        operands = (self.block_m + self.block_n) * self.block_k * self.num_stages
        return operands + (16 * self.num_warps * self.block_n * (1 if tail.fast else 4) if self.flatten else 0)


# Measured on an H200 (us): 8192 cubed 756 with the first, 828 with the tiled template; 6304 x 3072 x 768 with GELU 53.0 with the last, 58.3;
# 6304 x 2304 x 768 33.8 with the first, 37.3. One program a multiprocessor with 128 x 256 tiles, warp-specialized or not, is behind on all.
CONFIGS = (
    PersistentConfig(128, 128, 128, 3, 4, programs=2, flatten=True),
    PersistentConfig(64, 128, 128, 4, 4, programs=2, flatten=True),
    PersistentConfig(64, 128, 128, 3, 4, programs=3, flatten=False),
)
RESERVED = 1024
"""Bytes of shared memory that every block takes for itself."""


def is_legal(config: PersistentConfig, problem: Problem, device: Device, tail: Tail) -> bool:
    """Whether the device runs that many programs at once on a multiprocessor with that tail, and descriptors can name the operands.

    A tail that sums tiles for a zero point would read each back out of shared memory: it is the tiled template's.
    """
    fits = config.programs * (config.shared_memory(tail) + RESERVED) <= device.shared_memory + RESERVED
    suits = problem.tma and device.tma and not tail.loop_lines()
    return fits and suits and whole_tiles(problem, config.block_n) and (tail.block_size is None or config.block_n % tail.block_size == 0)


def candidates(problem: Problem, device: Device, tail: Tail, *, thorough: bool) -> list[PersistentConfig]:
    """The configs worth timing: legal, more tiles than multiprocessors, and not twice the area; few anyway, `thorough` or not.

    So never for a single element, which Inductor stores without a mask: lanes past the edge are copies of it in the tiled template, zero here.
    """

    def useful(config: PersistentConfig) -> bool:
        many = tiles(problem, config.block_m, config.block_n) > device.multiprocessors
        return many and padded(problem, config.block_m, config.block_n) < 2 * problem.m * problem.n

    return [config for config in CONFIGS if useful(config) and is_legal(config, problem, device, tail)]


_MAIN_LOOP = """
{{{{def_kernel({arguments})}}}}
    M = {{{{size("A", 0)}}}}
    N = {rows}
    K = {{{{size("A", 1)}}}}
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
    a_tiles = tl.make_tensor_descriptor(A, shape=[M, K], strides=[{{{{stride("A", 0)}}}}, 1], block_shape=[BLOCK_M, BLOCK_K])
{descriptors}
    for tile in tl.range(tl.program_id(0), grid_m * grid_n, NUM_SMS, flatten=FLATTEN):
{order}
{pick}
        first_m = (pid_m * BLOCK_M).to(tl.int32)
        first_n = ({local_tile}).to(tl.int32)
        dot = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for k in range(0, K, BLOCK_K):
            a = a_tiles.load([first_m, k])
            b = b_tiles.load([first_n, k])
            dot = tl.dot(a, b.T, dot, out_dtype=tl.int32)
        rm = first_m.to(INDEX_DTYPE) + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
        rn = (pid_n * BLOCK_N).to(INDEX_DTYPE) + tl.arange(0, BLOCK_N).to(INDEX_DTYPE)
        ram = tl.where(rm < M, rm, 0)
        rbn = {local_columns}
"""


def _descriptor(weight: str, tiles: str) -> str:
    """The statement that makes the tensor descriptor of a weight."""
    rows, stride = f'{{{{size("{weight}", 0)}}}}', f'{{{{stride("{weight}", 0)}}}}'
    return f"{tiles} = tl.make_tensor_descriptor({weight}, shape=[{rows}, K], strides=[{stride}, 1], block_shape=[BLOCK_N, BLOCK_K])"


def source(tail: Tail) -> str:
    """The template's text with that tail, for Inductor to render."""
    weights = tail.weights
    descriptors = [_descriptor(*pair) for pair in zip(weights.names, expanded("b_tiles", weights.count), strict=True)]
    loop = _MAIN_LOOP.format(
        arguments=tail.signature(),
        rows=weights.rows,
        descriptors=indented(descriptors, 4),
        order=indented(TILE_ORDER.splitlines(), 8),
        pick=indented(weights.pick(["b_tiles", *tail.of_each_weight()]), 8),
        local_tile=weights.local_tile,
        local_columns=weights.local_columns,
    )
    return loop + tail.source(8)


def template(tail: Tail) -> Any:
    """The TritonTemplate with that tail."""
    return triton_template("int8_scaled_mm_persistent", "persistent_mm_grid", source(tail), tail)


def constants(config: PersistentConfig, problem: Problem, device: Device, tail: Tail) -> dict[str, object]:
    """The compile-time constants of a launch. NUM_SMS, as Inductor's grid for persistent kernels calls it, is how many programs run at once."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "NUM_SMS": device.multiprocessors * config.programs,
        "FLATTEN": config.flatten,
        "num_stages": config.num_stages,
        "num_warps": config.num_warps,
    }
