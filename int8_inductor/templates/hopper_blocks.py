"""Templates for Hopper of products that are rescaled block by block: block-scaled INT8, and INT8 activations beside INT4 weights (see hopper.py).

A trip of the loop issues the products of two blocks of K and rescales the first while the second runs; the tensor cores have the other part's
products in the meantime too. Where they take turns, a part issues when the other's first block is done: else both may come to rescale at once, and
the tensor cores idle. Scales are loaded a block ahead and multiplied where they are used: at their load a program would wait for them.

block_scaled_mm, 8192 cubed on an H200: 932 us with turns, 1033 without; 1155 for the Triton template beside this one. Turns cost where K is short,
as a part waits for the other's tail (int8_int4_mm, 8192 x 6144 x 4096: 430 and 403), so both are timed. int8_int4_mm lies transposed, so that a
group's scale is one of a row of the tile, two for a thread and not 32; its weight is unpacked to int8 in memory before (K x N bytes), which is faster
from 1024 rows on than unpacking it in registers for each tile (4096 x 4096 x 4096: 132 us and 5 for the unpacking, against 160).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..gluon.program import Box
from . import hopper
from .hopper import HopperConfig, HopperTemplate, Loop
from .problem import Device, Problem
from .tail import Tail

__all__ = ["BLOCK_SCALED_MM", "CONFIGS", "INT8_INT4_MM", "HopperBlocks"]

BLOCK_K = 128
"""K of a block; smaller ones are other templates', whose products are too short to hide their rescaling."""
LEAST_ROWS = 256
"""From so many rows of the activation on."""

# A trip past the last block multiplies zeros, with a scale of 0: the last block's may be infinite.
_TEXT = """dot = tl.zeros((ROWS, COLUMNS), tl.float32, L)
zero = tl.zeros((ROWS, COLUMNS), tl.int32, L)
{pointers}
{first}
for block in range(0, 2 * TRIPS, 2):
    mbarrier.wait(ready.index(stage), phase)
    {{% if TURNS is defined %}}
    mbarrier.wait(turns.index(PART), turn)
    {{% endif %}}
    even = warpgroup_mma(
        left_boxes.index(stage * PARTS + PART), right_boxes.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    even_stage = stage
    stage, phase = advance(stage, phase)
    mbarrier.wait(ready.index(stage), phase)
    odd = warpgroup_mma(
        left_boxes.index(stage * PARTS + PART), right_boxes.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    ahead = min(block + 1, LAST)
{odd}
    even = warpgroup_mma_wait(1, deps=[even])
    {{% if TURNS is defined %}}
    mbarrier.arrive(turns.index(1 - PART), count=1)
    turn ^= 1
    {{% endif %}}
    mbarrier.arrive(free.index(even_stage), count=1)
    scale = {even_scale}
    ahead = min(block + 2, LAST)
{even}
    dot += even.to(tl.float32) * scale[:, None]
    odd = warpgroup_mma_wait(0, deps=[odd])
    mbarrier.arrive(free.index(stage), count=1)
    stage, phase = advance(stage, phase)
    scale = {odd_scale}
    if LAST % 2 == 0:
        scale = tl.where(block < LAST, scale, 0.0)
    dot += odd.to(tl.float32) * scale[:, None]"""


def _text(pointers: list[str], scales: dict[str, str]) -> str:
    """The loop with these statements before it, and these scales: name -> pointer expression of the block `ahead`."""

    def loads(parity: str, at: str, spaces: int) -> str:
        return "\n".join(f"{' ' * spaces}{name}_{parity} = tl.load({pointer.format(at)})" for name, pointer in scales.items())

    last = 'LAST: tl.constexpr = (K + 127) // 128 - 1'
    return _TEXT.format(
        pointers="\n".join([last, *pointers]),
        first=loads("even", "0", 0),
        odd=loads("odd", "ahead", 4),
        even=loads("even", "ahead", 4),
        even_scale=" * ".join(f"{name}_even" for name in scales),
        odd_scale=" * ".join(f"{name}_odd" for name in scales),
    )


_INT8 = Box(0, BLOCK_K, "int8", 128)
_BLOCK_TEXT = _text(
    [
        'a_scales = A_SCALE + ram * {{stride("A_SCALE", 0)}}',
        'b_scales = B_SCALE + first_right // 128 * {{stride("B_SCALE", 0)}}',
    ],
    {"a_scale": 'a_scales + {0} * {{{{stride("A_SCALE", 1)}}}}', "b_scale": 'b_scales + {0} * {{{{stride("B_SCALE", 1)}}}}'},
)
_INT4_TEXT = _text(
    ['b_scales = B_SCALE + rbn * {{stride("B_SCALE", 0)}}'], {"b_scale": 'b_scales + {0} * {{{{stride("B_SCALE", 1)}}}}'}
)

CONFIGS = (HopperConfig(64, 2, 128, 6), HopperConfig(64, 2, 128, 6, turns=True))


@dataclass(frozen=True)
class HopperBlocks(HopperTemplate):
    """The template of one such product."""

    configs: tuple[HopperConfig, ...] = CONFIGS

    def is_legal(self, config: HopperConfig, problem: Problem, device: Device, tail: Tail) -> bool:
        """Whether the device can run it with that tail; see hopper.is_legal."""
        return problem.groups == (BLOCK_K,) and hopper.is_legal(self.loop, config, problem, device, tail)

    def candidates(self, problem: Problem, device: Device, tail: Tail, *, thorough: bool) -> list[HopperConfig]:
        """The configs worth timing: the legal ones, for many rows."""
        return [config for config in self.configs if problem.m >= LEAST_ROWS and self.is_legal(config, problem, device, tail)]


BLOCK_SCALED_MM = HopperBlocks(
    Loop("int8_block_scaled_mm_hopper", _BLOCK_TEXT, _INT8, _INT8, k=BLOCK_K, steps=(2,), operands=("A_SCALE", "B_SCALE"))
)
INT8_INT4_MM = HopperBlocks(
    Loop("int8_int4_mm_hopper", _INT4_TEXT, _INT8, _INT8, k=BLOCK_K, steps=(2,), transposed=True, operands=("B_SCALE",), unpack=True)
)
