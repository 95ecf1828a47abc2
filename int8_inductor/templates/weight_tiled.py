"""The tiled template of weight-only and int4 products: one output tile a program, operands through pointers. Any NVIDIA GPU from sm_80, any strides.

It computes the transposed product: the converted weight is the left operand, which Hopper's tensor cores take from registers (a right one they take
from shared memory alone), and up to 64 rows of the activation are a right operand without padding to 64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .problem import TILE_ORDER, Device, Problem, padded, tiles
from .render import triton_template
from .tail import Tail, indented
from .weight_formats import Weight

__all__ = ["WeightConfig", "WeightTiled"]


@dataclass(frozen=True)
class WeightConfig:
    """Tile sizes in elements, pipeline stages, warps, and how many tile rows share a run through the weight (for L2).

    block_k: of one step of the loop; a step is several products where groups are smaller.
    """

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    group_m: int = 8

    def shared_memory(self, weight: Weight, a_bytes: int) -> int:
        """Bytes of shared memory that the pipelined tiles take; pairs of an activation are written there once more, taken apart."""
        a, b = self.block_m * self.block_k * a_bytes, self.block_n * self.block_k // weight.values_a_byte
        return (a + b) * self.num_stages + (a if weight.packed else 0)

    def registers(self, weight: Weight, a_bytes: int, copy_bytes: int) -> int:
        """An estimate, on the high side, of the registers a thread takes: sums, and products not yet scaled; the converted weight of two steps, as
        one is multiplied while the next is converted; 60 for everything else, and three for each copy that is not of 16 bytes.
        """
        threads = 32 * self.num_warps
        sums = self.block_m * self.block_n // threads * (2 if weight.scales else 1)
        converted = 2 * self.block_n * self.block_k * a_bytes // (4 * threads)
        copies = (self.block_m * a_bytes + self.block_n) * self.block_k // (threads * copy_bytes)
        return sums + converted + 60 + (3 * copies if copy_bytes < MAX_COPY_BYTES else 0)


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

_START = """
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
    a_tile = A + ram[None, :] * {{{{stride("A", 0)}}}} + rk[:, None] * {{{{stride("A", 1)}}}}
    dot = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
"""

_ROWS = """
    b_tile = B + rbn[:, None] * {{{{stride("B", 0)}}}} + rk[None, :] * {{{{stride("B", 1)}}}}
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_tile)
            b = tl.load(b_tile)
        else:
            a = tl.load(a_tile, mask=rk[:, None] < K - k, other=0)
            b = tl.load(b_tile, mask=rk[None, :] < K - k, other=0)
{convert}
        dot = tl.dot(w, a, dot, input_precision="ieee")
        a_tile += BLOCK_K * {{{{stride("A", 1)}}}}
        b_tile += BLOCK_K * {{{{stride("B", 1)}}}}
    dot = tl.trans(dot)
"""

_GROUPS = """
{{% set INSIDE = "" if EVEN_STEPS else ", mask=inside[None, :], other=0" %}}
{{% set INSIDE_ROW = "" if EVEN_STEPS else ", mask=inside, other=0" %}}
    rb = tl.arange(0, BLOCK_K // {values_a_byte}).to(INDEX_DTYPE)
    b_tile = B + rbn[:, None] * {{{{stride("B", 0)}}}} + rb[None, :] * {{{{stride("B", 1)}}}}
{pointers}
    for first in range(0, K // BLOCK_K, STEPS):
        for step in tl.static_range(STEPS):
            group = first + step
            inside = group + tl.zeros((1,), dtype=tl.int32) < K // BLOCK_K
            b = tl.load(b_tile + group * (BLOCK_K // {values_a_byte}) * {{{{stride("B", 1)}}}}{{{{INSIDE}}}})
{product}
{scales}
            dot += partial
    dot = tl.trans(dot){unit}
"""

_PRODUCT = """a = tl.load(a_tile + group * BLOCK_K * {{{{stride("A", 1)}}}}{{{{INSIDE}}}})
{convert}
partial = tl.dot(w, a{sums}).to(tl.float32)"""

# A word of an activation holds what an even and an odd k multiply.
_PAIRS = """{{% if PAIRS %}}
pairs = tl.load(a_words + group * (BLOCK_K // 2){{{{INSIDE}}}})
even = (pairs & 0xFFFF).to(tl.uint16).to(A.dtype.element_ty, bitcast=True)
odd = ((pairs >> 16) & 0xFFFF).to(tl.uint16).to(A.dtype.element_ty, bitcast=True)
{{% else %}}
even = tl.load(a_even + group * BLOCK_K * {{{{stride("A", 1)}}}}{{{{INSIDE}}}})
odd = tl.load(a_even + (group * BLOCK_K + 1) * {{{{stride("A", 1)}}}}{{{{INSIDE}}}})
{{% endif %}}
{convert}
partial = tl.dot(low, even, input_precision="ieee")
partial = tl.dot(high, odd, partial, input_precision="ieee")"""
_PAIR_POINTERS = """{{% if PAIRS %}}
a_words = A.to(tl.pointer_type(tl.int32)) + ram[None, :] * ({{{{stride("A", 0)}}}} // 2) + rb[:, None]
{{% else %}}
a_even = A + ram[None, :] * {{{{stride("A", 0)}}}} + 2 * rb[:, None] * {{{{stride("A", 1)}}}}
{{% endif %}}"""


@dataclass(eq=False)
class WeightTiled:
    """The template for one kind of weight; `configs`: best guesses first, large M before decode."""

    weight: Weight
    configs: tuple[WeightConfig, ...]

    def is_legal(self, config: WeightConfig, problem: Problem, device: Device, tail: Tail) -> bool:
        """Whether `config` can be built, without spilling registers, with that tail on that device."""
        copy_bytes = MAX_COPY_BYTES if self.weight.scales else math.gcd(problem.k, MAX_COPY_BYTES)  # groups are whole and aligned
        memory = config.shared_memory(self.weight, problem.a_bytes)
        fits = memory <= device.shared_memory and config.registers(self.weight, problem.a_bytes, copy_bytes) <= MAX_REGISTERS
        return fits and (tail.block_size is None or config.block_n % tail.block_size == 0)

    def candidates(self, problem: Problem, device: Device, tail: Tail, *, thorough: bool) -> list[WeightConfig]:
        """The configs worth timing: legal, tiles not wasted on M nor so low that they read the weight twice where once will do; those that fill the
        chip and best guesses first; a few unless `thorough`.
        """
        legal = [config for config in self.configs if self.is_legal(config, problem, device, tail)]
        high = [config for config in legal if config.block_m >= min(problem.m, ONCE)] or legal

        def area(config: WeightConfig) -> int:
            return padded(problem, config.block_m, config.block_n)

        def idle(config: WeightConfig) -> float:
            return max(0.0, FULL * device.multiprocessors - tiles(problem, config.block_m, config.block_n))

        least = min(map(area, high))
        useful = sorted((config for config in high if area(config) <= WASTE * least), key=idle)
        return useful if thorough else useful[:QUICK_CONFIGS]

    def source(self, tail: Tail) -> str:
        """The template's text with that tail, for Inductor to render."""
        weight, convert = self.weight, self.weight.convert(tail.ptx)
        start = _START.format(arguments=tail.signature(*weight.scales), order=indented(TILE_ORDER.splitlines(), 4))
        if not weight.scales:
            return start + _ROWS.format(convert=_block(convert, 8)) + tail.source(4)
        pairs = weight.packed and weight.floats
        product = (_PAIRS if pairs else _PRODUCT).format(
            convert=convert, sums=', input_precision="ieee"' if weight.floats else ", out_dtype=tl.int32"
        )
        loop = _GROUPS.format(
            values_a_byte=weight.values_a_byte,
            pointers=_block(_PAIR_POINTERS.format() if pairs else "", 4),
            product=_block(product, 12),
            scales=_block(weight.group_scales, 12),
            unit="" if weight.factor == 1.0 else f" * {1.0 / weight.factor!r}",
        )
        return start + loop + tail.source(4)

    def template(self, tail: Tail) -> Any:
        """The TritonTemplate with that tail."""
        return triton_template(f"int8_inductor_{self.weight.name}", "mm_grid", self.source(tail), tail)

    def constants(self, config: WeightConfig, problem: Problem, device: Device, tail: Tail) -> dict[str, object]:
        """The compile-time constants of a launch."""
        (step,) = problem.groups or (config.block_k,)
        steps = max(1, config.block_k // step)
        known = {
            "STEPS": steps,
            "EVEN_STEPS": problem.static_k is not None and problem.static_k % (step * steps) == 0,
            "PAIRS": problem.tma and problem.a_bytes == 2,
        }
        return {
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": step,
            "GROUP_M": config.group_m,
            **(known if self.weight.scales else {"EVEN_K": problem.static_k is not None and problem.static_k % config.block_k == 0}),
            "num_stages": config.num_stages,
            "num_warps": config.num_warps,
        }


def _block(text: str, spaces: int) -> str:
    return indented(text.splitlines(), spaces)
