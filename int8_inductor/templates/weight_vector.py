"""The vector template of weight-only products: one row times the weight (decode of a single token). No tensor core: the weight streams once.

A thread reads words of four int8, or eight int4, and turns each value into a float32 by putting its bits into the mantissa of 2^23: a whole number
there is exact, and one subtraction away from its value. On an H200, int8, 4096 x 4096: 10.9 us, against 13.8 for the best tiled config and 18.5 for
bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .problem import Device, Problem
from .render import triton_template
from .tail import Tail, indented
from .weight_formats import Weight

__all__ = ["VectorConfig", "WeightVector"]


@dataclass(frozen=True)
class VectorConfig:
    """Rows of the weight a program takes, words it reads of each at a time, warps."""

    block_n: int
    block_words: int
    num_warps: int


CONFIGS = (VectorConfig(4, 512, 4), VectorConfig(8, 256, 4), VectorConfig(8, 128, 4))
WORD = 4
"""Bytes of a word."""

_MAIN_LOOP = """
{{{{def_kernel({arguments})}}}}
    M = {{{{size("A", 0)}}}}
    N = {{{{size("B", 0)}}}}
    K = {{{{size("A", 1)}}}}
    pid_m = 0
    pid_n = tl.program_id(0).to(INDEX_DTYPE)
    rm = tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX_DTYPE)
    ram = rm
    rbn = tl.where(rn < N, rn, 0)
    rk = tl.arange(0, BLOCK_WORDS)
    words = K // {values}
    b_words = B.to(tl.pointer_type(tl.int32)) + rbn[:, None] * ({{{{stride("B", 0)}}}} // 4) + rk[None, :]
    # Four values of the activation at a time.
    a_words = A.to(tl.pointer_type(tl.int64)) + ({values} // 4) * rk
    sums = tl.zeros((BLOCK_N, BLOCK_WORDS), dtype=tl.float32)
    for k in range(0, words, BLOCK_WORDS):
        inside = rk < words - k
        b = tl.load(b_words + k, mask=inside[None, :], other=0)
{products}
    dot = tl.sum(sums, axis=1)[None, :]
"""


def _products(weight: Weight) -> list[str]:
    """Statements that add the products of the words `b` at k to `sums`."""
    values, bits = 4 * weight.values_a_byte, 8 // weight.values_a_byte
    # In two's complement the sign bit, turned, is the offset of an int8; a nibble has its own.
    magic, offset = (0x4B000000, 8) if weight.packed else (0x4B000080, 128)
    join = "|" if weight.packed else "^"
    lines = [f"words{i} = tl.load(a_words + {values // 4} * k + {i}, mask=inside, other=0)" for i in range(values // 4)]
    lines += ["partial = tl.zeros((BLOCK_N, BLOCK_WORDS), dtype=tl.float32)"] if weight.scales else []
    total = "partial" if weight.scales else "sums"
    for j in range(values):
        lines += [
            f"a = ((words{j // 4} >> {16 * (j % 4)}) & 0xFFFF).to(tl.uint16).to(A.dtype.element_ty, bitcast=True).to(tl.float32)",
            f"v = (((b >> {bits * j}) & {2**bits - 1}) {join} {magic}).to(tl.float32, bitcast=True) - {float(2**23 + offset)}",
            f"{total} += v * a[None, :]",
        ]
    if weight.scales:
        at = f'rbn[:, None] * {{{{stride("B_SCALE", 0)}}}} + ((rk + k) // (GROUP // {values}))[None, :] * {{{{stride("B_SCALE", 1)}}}}'
        lines.append(f"sums += partial * tl.load(B_SCALE + {at}, mask=inside[None, :], other=0.0)")
    return lines


@dataclass(eq=False)
class WeightVector:
    """The template for one kind of weight, beside activations in floats."""

    weight: Weight
    configs: tuple[VectorConfig, ...] = CONFIGS

    def is_legal(self, config: VectorConfig, problem: Problem, device: Device, tail: Tail) -> bool:
        """Whether there is one row, in whole words. A tail that stores in blocks is another template's."""
        return problem.one_row and problem.tma and problem.a_bytes == 2 and tail.block_size is None

    def candidates(self, problem: Problem, device: Device, tail: Tail, *, thorough: bool) -> list[VectorConfig]:
        """The configs worth timing: all, where the template is legal."""
        return [config for config in self.configs if self.is_legal(config, problem, device, tail)]

    def source(self, tail: Tail) -> str:
        """The template's text with that tail, for Inductor to render."""
        arguments = tail.signature(*self.weight.scales)
        return _MAIN_LOOP.format(
            arguments=arguments, values=4 * self.weight.values_a_byte, products=indented(_products(self.weight), 8)
        ) + tail.source(4)

    def template(self, tail: Tail) -> Any:
        """The TritonTemplate with that tail."""
        return triton_template(f"int8_inductor_{self.weight.name}_vector", "mm_grid", self.source(tail), tail)

    def constants(self, config: VectorConfig, problem: Problem, device: Device, tail: Tail) -> dict[str, object]:
        """The compile-time constants of a launch."""
        return {
            "BLOCK_M": 1,
            "BLOCK_N": config.block_n,
            "BLOCK_WORDS": config.block_words,
            "GROUP": problem.groups[0] if problem.groups else 0,
            "num_stages": 1,
            "num_warps": config.num_warps,
        }
