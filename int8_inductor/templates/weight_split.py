"""The split template of weight-only and int4 products, for few rows: a program multiplies several groups of K at a time and adds them up at the end.

The products of one step are a batch, which Triton deals out to the warps: each warp has a group of its own, and the tile may be as narrow as 16 rows
of the weight, so that enough programs read it. Rows of the activation past the end are masked: every program asks L2 for all of them. On an H200,
int8 at M = 1 and 4, against cuBLAS in bfloat16 (geometric mean over Llama's shapes): 1.71 and 1.65; with a copy of row 0 in their place 1.25 and
1.42.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .problem import Device, Problem
from .render import triton_template
from .tail import Tail, indented
from .weight_formats import Weight

__all__ = ["SplitConfig", "WeightSplit"]


@dataclass(frozen=True)
class SplitConfig:
    """Tile sizes, groups multiplied at a time, what K of a group is where the weight has none, pipeline stages, warps."""

    block_m: int
    block_n: int
    splits: int
    num_stages: int
    num_warps: int
    block_k: int = 128

    def shared_memory(self, weight: Weight, a_bytes: int, group: int) -> int:
        """Bytes of shared memory that the pipelined tiles take, and the activation taken apart or summed results."""
        a, b = self.block_m * group * a_bytes, self.block_n * group // weight.values_a_byte
        return self.splits * ((a + b) * self.num_stages + max(a, 4 * self.block_m * self.block_n))


FEW_ROWS = 16
"""Up to so many rows of an activation."""
LEAST_GROUP = 64
"""Groups of int4 are halves of even and odd k, of which tensor cores multiply 16 at a time at the least; smaller ones are the tiled template's."""

_LOOP = """
{{{{def_kernel({arguments})}}}}
{{% set INSIDE = "" if EVEN_STEPS else ", mask=inside, other=0" %}}
{{% set LIVE = INSIDE if EVEN_M else ", mask=live, other=0" if EVEN_STEPS else ", mask=inside & live, other=0" %}}
    M = {{{{size("A", 0)}}}}
    N = {{{{size("B", 0)}}}}
    K = {{{{size("A", 1)}}}}
    tile = tl.program_id(0).to(INDEX_DTYPE)
    grid_n = tl.cdiv(N, BLOCK_N)
    pid_m = tile // grid_n
    pid_n = tile % grid_n
    rm = pid_m * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX_DTYPE)
    ram = tl.where(rm < M, rm, 0)
    live = (rm < M)[None, None, :]
    rbn = tl.where(rn < N, rn, 0)
    rs = tl.arange(0, SPLITS).to(INDEX_DTYPE)
    rb = tl.arange(0, BLOCK_K // {values_a_byte}).to(INDEX_DTYPE)
    b_columns = rs[:, None, None] * (BLOCK_K // {values_a_byte}) + rb[None, None, :]
    b_tile = B + rbn[None, :, None] * {{{{stride("B", 0)}}}} + b_columns * {{{{stride("B", 1)}}}}
{pointers}
    sums = tl.zeros((SPLITS, BLOCK_N, BLOCK_M), dtype=tl.float32)
    for first in range(0, K // BLOCK_K, SPLITS):
        group = first + rs
        inside = (group < K // BLOCK_K)[:, None, None]
        b = tl.load(b_tile + first * (BLOCK_K // {values_a_byte}) * {{{{stride("B", 1)}}}}{{{{INSIDE}}}})
{product}
{scales}
        sums += partial
    dot = tl.trans(tl.sum(sums, axis=0)){unit}
"""
_POINTER = """a_rows = rs[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :, None]
a_tile = A + ram[None, None, :] * {{{{stride("A", 0)}}}} + a_rows * {{{{stride("A", 1)}}}}"""
_PRODUCT = """a = tl.load(a_tile + first * BLOCK_K * {{{{stride("A", 1)}}}}{{{{LIVE}}}})
{convert}
partial = tl.dot(w, a{sums}).to(tl.float32)"""
_PAIR_POINTER = """a_rows = rs[:, None, None] * (BLOCK_K // 2) + rb[None, :, None]
a_words = A.to(tl.pointer_type(tl.int32)) + ram[None, None, :] * ({{{{stride("A", 0)}}}} // 2) + a_rows"""
_PAIRS = """pairs = tl.load(a_words + first * (BLOCK_K // 2){{{{LIVE}}}})
even = (pairs & 0xFFFF).to(tl.uint16).to(A.dtype.element_ty, bitcast=True)
odd = ((pairs >> 16) & 0xFFFF).to(tl.uint16).to(A.dtype.element_ty, bitcast=True)
{convert}
partial = tl.dot(low, even)
partial = tl.dot(high, odd, partial)"""
_SCALES = {
    "B_SCALE": """b_scale = B_SCALE + rbn[None, :, None] * {{stride("B_SCALE", 0)}} + group[:, None, None] * {{stride("B_SCALE", 1)}}
partial *= tl.load(b_scale{{INSIDE}})""",
    "A_SCALE": """a_scale = A_SCALE + ram[None, None, :] * {{stride("A_SCALE", 0)}} + group[:, None, None] * {{stride("A_SCALE", 1)}}
partial *= tl.load(a_scale{{INSIDE}})""",
}


@dataclass(eq=False)
class WeightSplit:
    """The template for one kind of weight; `configs`: best guesses first."""

    weight: Weight
    configs: tuple[SplitConfig, ...]

    def is_legal(self, config: SplitConfig, problem: Problem, device: Device, tail: Tail) -> bool:
        """Whether `config` can be built for that problem: few rows, whole groups of two bytes or one, and aligned."""
        group = _group(config, problem)
        whole = problem.static_k is not None and problem.static_k % group == 0 and group >= (LEAST_GROUP if self.weight.packed else 0)
        fits = config.shared_memory(self.weight, problem.a_bytes, group) <= device.shared_memory
        rows = problem.m <= FEW_ROWS and problem.a_bytes <= 2
        return whole and fits and rows and problem.tma and (tail.block_size is None or config.block_n % tail.block_size == 0)

    def candidates(self, problem: Problem, device: Device, tail: Tail, *, thorough: bool) -> list[SplitConfig]:
        """The configs worth timing: the lowest tiles that cover all rows."""
        legal = [config for config in self.configs if self.is_legal(config, problem, device, tail) and config.block_m >= problem.m]
        least = min((config.block_m for config in legal), default=0)
        return [config for config in legal if config.block_m == least]

    def source(self, tail: Tail) -> str:
        """The template's text with that tail, for Inductor to render."""
        weight = self.weight
        convert = weight.convert(tail.ptx, "(SPLITS, BLOCK_N, BLOCK_K)")
        pairs = weight.packed and weight.floats
        product = (_PAIRS if pairs else _PRODUCT).format(convert=convert, sums="" if weight.floats else ", out_dtype=tl.int32")
        loop = _LOOP.format(
            arguments=tail.signature(*weight.scales),
            values_a_byte=weight.values_a_byte,
            pointers=indented((_PAIR_POINTER if pairs else _POINTER).format().splitlines(), 4),
            product=indented(product.splitlines(), 8),
            scales=indented([line for name in weight.scales for line in _SCALES[name].splitlines()], 8),
            unit="" if weight.factor == 1.0 else f" * {1.0 / weight.factor!r}",
        )
        return loop + tail.source(4)

    def template(self, tail: Tail) -> Any:
        """The TritonTemplate with that tail."""
        return triton_template(f"int8_inductor_{self.weight.name}_split", "mm_grid", self.source(tail), tail)

    def constants(self, config: SplitConfig, problem: Problem, device: Device, tail: Tail) -> dict[str, object]:
        """The compile-time constants of a launch."""
        group = _group(config, problem)
        return {
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": group,
            "SPLITS": config.splits,
            "EVEN_M": problem.static_m is not None and problem.static_m % config.block_m == 0,
            "EVEN_STEPS": problem.static_k is not None and problem.static_k % (group * config.splits) == 0,
            "num_stages": config.num_stages,
            "num_warps": config.num_warps,
        }


def _group(config: SplitConfig, problem: Problem) -> int:
    return problem.groups[0] if problem.groups else config.block_k
