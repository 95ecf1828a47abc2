"""The template of weight-only INT8 for Hopper: the weight goes from shared memory through registers, as bfloat16 or float16, into the tensor cores.

The product lies transposed, as only a left operand may come from registers. A step's weights are converted while the one before is multiplied, but
for the first of a trip through the loop. Pairs of int8 are read as one int16, and come out as the pair of floats that a tensor core's register
holds: nothing is moved between threads. Where tiles are few, K is split: each part leaves float32 sums, and a second kernel adds them up, in order.

On an H200, against cuBLAS with a bfloat16 weight (without split, two steps a trip): 64 x 4096 x 14336 1.32 (0.69), 256 x 4096 x 14336 0.90 (0.70),
1024 x 28672 x 4096 1.01, 1024 x 6144 x 4096 0.89 (0.78). At 256 rows the activation's way from L2 may be what limits it: each tile of weights
reads all of it, 36 KB a step of 64 x 256, where cuBLAS's multiprocessors share what they read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..gluon.program import Box
from ..gluon.template import GluonTemplate
from . import hopper
from .hopper import HopperConfig, Loop
from .hopper_text import LEFT_OPERAND
from .problem import Device, Problem, tiles
from .tail import Tail

__all__ = ["CONFIGS", "LOOP", "TILES", "is_legal", "template"]

# bfloat16 of an int8 v: the byte in the mantissa of 128 is 128 + (v & 127); what is too much, 128 or, for a negative v, 256, has v's sign bit in the
# same place. float16 has room for v + 128 in the mantissa of 1024.
_FUNCTIONS = '''

@gluon.jit
def floats(pairs, dtype: tl.constexpr):
    """int16 of two int8 -> int32 of two floats."""
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c, d, one, less; mov.b32 one, 0x3F803F80; mov.b32 less, 0xBF80BF80;
            prmt.b32 a, $2, 0x43434343, 0x4140; prmt.b32 b, $2, 0x43434343, 0x4342;
            and.b32 c, a, 0xFF80FF80; and.b32 d, b, 0xFF80FF80; and.b32 a, a, 0xFF7FFF7F; and.b32 b, b, 0xFF7FFF7F;
            fma.rn.bf16x2 $0, c, less, a; fma.rn.bf16x2 $1, d, less, b; }""",
            "=&r,=&r,r", [pairs], dtype=tl.int32, is_pure=True, pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t, u;
            xor.b32 t, $2, 0x80808080; mov.b32 u, 0x64806480;
            prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342;
            sub.rn.f16x2 $0, $0, u; sub.rn.f16x2 $1, $1, u; }""",
            "=&r,=&r,r", [pairs], dtype=tl.int32, is_pure=True, pack=2,
        )


@gluon.jit
def operand(box, dtype: tl.constexpr):
    """The weights of a box [ROWS, 32] of pairs, as a left operand in registers."""
    PAIRS: tl.constexpr = tl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8], [0, 16]], lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, 32],
    )
    return left_operand(floats(box.load(PAIRS), dtype), dtype)
'''

# Past K both boxes are zeros.
_TEXT = """dot = tl.zeros((ROWS, COLUMNS), tl.float32, L)
for trip in range(0, TRIPS):
    mbarrier.wait(ready.index(stage), phase)
    weights = operand(left_boxes.index(stage * PARTS + PART), right_boxes.dtype)
    dot = warpgroup_mma(weights, right_boxes.index(stage).permute((1, 0)), dot, is_async=True)
    last = stage
    stage, phase = advance(stage, phase)
    for step in tl.static_range(1, STEPS):
        mbarrier.wait(ready.index(stage), phase)
        following = operand(left_boxes.index(stage * PARTS + PART), right_boxes.dtype)
        dot = warpgroup_mma(following, right_boxes.index(stage).permute((1, 0)), dot, is_async=True)
        # The registers of these weights are read until their product is done.
        dot, weights = warpgroup_mma_wait(1, deps=[dot, weights])
        mbarrier.arrive(free.index(last), count=1)
        weights = following
        last = stage
        stage, phase = advance(stage, phase)
    dot, weights = warpgroup_mma_wait(0, deps=[dot, weights])
    mbarrier.arrive(free.index(last), count=1)"""

STEPS = (8, 4, 2)
"""Products of a trip, at whose end the tensor cores run dry."""

LOOP = Loop(
    "int8_weight_mm_hopper",
    _TEXT,
    left=Box(0, 32, "int16", 64),
    right=Box(0, 64, "bfloat16", 128),
    k=64,
    instruction_k=16,
    steps=STEPS,
    transposed=True,
    functions=LEFT_OPERAND + _FUNCTIONS,
    splits=True,
)

TILES = (
    HopperConfig(64, 2, 256, 4, steps=4),  # with 8 the longest tail spills
    HopperConfig(64, 2, 128, 8),
    HopperConfig(64, 2, 64, 12),
    HopperConfig(64, 1, 256, 5),
    HopperConfig(64, 1, 128, 4, programs=2),
    HopperConfig(64, 1, 64, 8, programs=2),
)
SPLITS = (1, 2, 4)
CONFIGS = tuple(replace(tile, splits=splits) for tile in TILES for splits in SPLITS)
LEAST_K = 1024
"""A part of K has at least so much of it."""
LEAST_ROWS = 33
"""From so many rows of the activation on."""
TIMED, AS_GOOD = 4, 1.3
"""How many configs are timed, of those that should take no more than so many times what the best takes."""
CONVERSION = 128
"""Columns that take as long as loading and converting the tile's weights: on an H200 a step of 64 x 64 takes 300 cycles, one of 64 x 256 760, one of
128 x 256 1390.
"""
ELEMENTS_A_CYCLE = 36
"""Of a step of 64, in tiles, columns for conversion included."""
FINISH_CYCLES, SUM_CYCLES = 3000, 0.2
"""What the second kernel of a split product takes, and what each element of a part's sums does: 8 bytes to and from L2."""


def is_legal(config: HopperConfig, problem: Problem, device: Device, tail: Tail) -> bool:
    """Whether the device can run it with that tail, beside activations in two bytes; see hopper.is_legal."""
    return problem.a_bytes == 2 and hopper.is_legal(LOOP, config, problem, device, tail)


def candidates(problem: Problem, device: Device, tail: Tail, *, thorough: bool) -> list[HopperConfig]:
    """The configs worth timing: legal, and those that fill the chip best without tiles that are mostly padding."""
    legal = [config for config in CONFIGS if is_legal(config, problem, device, tail) and hopper.useful(LOOP, config, problem)]
    legal = [config for config in legal if config.splits == 1 or problem.k >= LEAST_K * config.splits]
    if not legal or problem.m < LEAST_ROWS:
        return []
    work = {config: _work(problem, device, config) for config in legal}
    return [config for config in sorted(legal, key=work.__getitem__) if work[config] <= AS_GOOD * min(work.values())][:TIMED]


def _work(problem: Problem, device: Device, config: HopperConfig) -> float:
    """About how many cycles the busiest multiprocessor takes."""
    high = config.rows * config.parts
    of_each = -(-tiles(problem, config.columns, high) * config.splits // device.multiprocessors)
    steps = -(-problem.k // (LOOP.k * config.splits))
    cycles = of_each * steps * high * (config.columns + CONVERSION) / ELEMENTS_A_CYCLE
    if config.splits == 1:
        return cycles
    return cycles + FINISH_CYCLES + SUM_CYCLES * config.splits * problem.m * problem.n / device.multiprocessors


def template(tail: Tail) -> GluonTemplate:
    """The template with that tail."""
    return hopper.hopper_template(LOOP, tail)


def constants(config: HopperConfig, problem: Problem, device: Device, tail: Tail) -> dict[str, Any]:
    """The constants of a kernel."""
    return hopper.launch_constants(LOOP, config, problem)
