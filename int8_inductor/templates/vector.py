"""The vector template: one row times the weight (decode of a single token). No tensor core: the weight streams once, straight into registers.

M is 1, so that a tile of 16 rows would be 15 parts padding, and shared memory between the weight and its only use a detour. Each program takes a few
rows of the weight; a thread multiplies four int8 at a time (dp4a) and the rows are summed up at the end. For operands that descriptors could name
(see Problem.tma), as words of four need the same alignment. On an H200, N x K = 4096 x 4096: 10.5 us, against 12.5 for the best tiled config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .problem import Device, Problem
from .render import triton_template
from .tail import Tail, indented
from .weights import whole_tiles

__all__ = ["CONFIGS", "VectorConfig", "is_legal", "template"]


@dataclass(frozen=True)
class VectorConfig:
    """Rows of the weight a program takes, words of four int8 it reads of each at a time, pipeline stages, warps."""

    block_n: int
    block_words: int
    num_stages: int
    num_warps: int


CONFIGS = (
    VectorConfig(4, 512, 4, 4),
    VectorConfig(2, 512, 4, 2),
    VectorConfig(8, 256, 4, 4),
)
WORD = 4
"""int8 values that dp4a multiplies at a time."""


def is_legal(config: VectorConfig, problem: Problem, device: Device, tail: Tail) -> bool:
    """Whether there is one row, in whole words. A tail that sums tiles for a zero point, or stores in blocks, is the tiled template's."""
    return problem.one_row and problem.tma and not tail.loop_lines() and tail.block_size is None and whole_tiles(problem, config.block_n)


def candidates(problem: Problem, device: Device, tail: Tail, *, thorough: bool) -> list[VectorConfig]:
    """The configs worth timing: all, where the template is legal."""
    return [config for config in CONFIGS if is_legal(config, problem, device, tail)]


# Words and dp4a on a GPU; bytes and int32 products where there is none, and the same sums.
_MAIN_LOOP = """
{{{{def_kernel({arguments})}}}}
    M = {{{{size("A", 0)}}}}
    N = {rows}
    K = {{{{size("A", 1)}}}}
    pid_m = 0
    pid_n = tl.program_id(0).to(INDEX_DTYPE)
    rm = tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
{pick}
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX_DTYPE)
    ram = rm
    rbn = {local_columns}
{{% if DP4A %}}
    rk = tl.arange(0, BLOCK_WORDS)
    words = K // 4
    a_words = A.to(tl.pointer_type(tl.int32)) + rk[None, :]
    b_words = B.to(tl.pointer_type(tl.int32)) + rbn[:, None] * ({b_stride} // 4) + rk[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_WORDS), dtype=tl.int32)
    for k in range(0, words, BLOCK_WORDS):
        if EVEN_K:
            a = tl.load(a_words + k)
            b = tl.load(b_words + k)
        else:
            a = tl.load(a_words + k, mask=rk[None, :] < words - k, other=0)
            b = tl.load(b_words + k, mask=rk[None, :] < words - k, other=0)
        a = tl.broadcast_to(a, (BLOCK_N, BLOCK_WORDS))
        sums = tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, sums], dtype=tl.int32, is_pure=True, pack=1)
{{% else %}}
    rk = tl.arange(0, 4 * BLOCK_WORDS)
    sums = tl.zeros((BLOCK_N, 4 * BLOCK_WORDS), dtype=tl.int32)
    for k in range(0, K, 4 * BLOCK_WORDS):
        a = tl.load(A + k + rk[None, :], mask=rk[None, :] < K - k, other=0)
        b = tl.load(B + rbn[:, None] * {b_stride} + k + rk[None, :], mask=rk[None, :] < K - k, other=0)
        sums += a.to(tl.int32) * b.to(tl.int32)
{{% endif %}}
    dot = tl.sum(sums, axis=1)[None, :]
"""


def source(tail: Tail) -> str:
    """The template's text with that tail, for Inductor to render."""
    weights = tail.weights
    loop = _MAIN_LOOP.format(
        arguments=tail.signature(),
        rows=weights.rows,
        pick=indented(weights.pick(["B", *tail.of_each_weight()]), 4),
        local_columns=weights.local_columns,
        b_stride=weights.stride(0),
    )
    return loop + tail.source(4)


def template(tail: Tail) -> Any:
    """The TritonTemplate with that tail."""
    return triton_template("int8_scaled_mm_vector", "mm_grid", source(tail), tail)


def constants(config: VectorConfig, problem: Problem, device: Device, tail: Tail) -> dict[str, object]:
    """The compile-time constants of a launch."""
    return {
        "BLOCK_M": 1,
        "BLOCK_N": config.block_n,
        "BLOCK_WORDS": config.block_words,
        "DP4A": tail.ptx,
        "EVEN_K": problem.static_k is not None and problem.static_k % (WORD * config.block_words) == 0,
        "num_stages": config.num_stages,
        "num_warps": config.num_warps,
    }
