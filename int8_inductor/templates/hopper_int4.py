"""The template of INT4 weights beside bfloat16 or float16 activations of few rows, for Hopper: through registers into the tensor cores.

The product lies transposed, as only a left operand may come from registers. Of the eight values of a word in memory a lane of the tensor cores' left
operand takes one byte, the same of every word: so each lane reads whole words, as its three neighbours do, and picks its byte; nothing is moved
between lanes, and K keeps its order, which the activation's boxes have too. A group of K is summed by itself and scaled in float32. Where tiles are
few, K is split (see hopper_weights.py).

On an H200 (kernels in CUDA graphs, dependent launches), us, M = 16, in parentheses the Triton templates: 6144 x 4096 10.9 (11.0), 4096 x 4096 8.3
(9.0), 28672 x 4096 27.3 (28.0), 4096 x 14336 17.7 (22.5). At M = 4 it is behind weight_stream.py.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from ..gluon.program import Box
from ..gluon.template import GluonTemplate
from . import hopper
from .hopper import HopperConfig, Loop
from .hopper_text import LEFT_OPERAND
from .problem import Device, Problem, tiles
from .rivals import EXPANDED_ROWS
from .tail import Tail

__all__ = ["CONFIGS", "LOOP", "TILES", "TILES_OF_PARTS", "is_legal", "template"]

GROUP = 128
"""K of a group; two steps. Smaller groups are other templates'."""

# A byte times 1 + 2**12 has its low nibble at bit 0 and its high one at bit 16. Nibbles are the last bits of 128 (bfloat16) or 1024 (float16), which
# leave with the 8 of a packed value.
_FUNCTIONS = '''

@gluon.jit
def floats(words, byte, dtype: tl.constexpr):
    """int32 of two floats: of a byte of each word, as prmt names it."""
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 v; prmt.b32 v, $1, 0, $2; mul.lo.u32 v, v, 0x1001;
            lop3.b32 v, v, 0x000F000F, $3, 0xEA; sub.rn.bf16x2 $0, v, $4; }""",
            "=r,r,r,r,r", [words, byte, 0x43004300, 0x43084308], dtype=tl.int32, is_pure=True, pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 v; prmt.b32 v, $1, 0, $2; mul.lo.u32 v, v, 0x1001;
            lop3.b32 v, v, 0x000F000F, $3, 0xEA; sub.rn.f16x2 $0, v, $4; }""",
            "=r,r,r,r,r", [words, byte, 0x64006400, 0x64086408], dtype=tl.int32, is_pure=True, pack=1,
        )


@gluon.jit
def operand(box, dtype: tl.constexpr):
    """The weights of a box [ROWS, 8] of words, as a left operand in registers."""
    ROW_WORD_BYTE: tl.constexpr = tl.DistributedLinearLayout(
        reg_bases=[[8, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]], lane_bases=[[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]], block_bases=[], shape=[64, 8, 4],
    )
    words = tl.expand_dims(box.load(tl.SliceLayout(2, ROW_WORD_BYTE)), 2)
    byte = 0x4440 + tl.arange(0, 4, layout=tl.SliceLayout(0, tl.SliceLayout(0, ROW_WORD_BYTE)))
    words, byte = tl.broadcast(words, tl.expand_dims(tl.expand_dims(byte, 0), 0))
    return left_operand(tl.reshape(floats(words, byte, dtype), [64, 32]), dtype)
'''

# Past K both boxes are zeros, and so is the scale: the last group's may be infinite.
_TEXT = """dot = tl.zeros((ROWS, COLUMNS), tl.float32, L)
zero = tl.zeros((ROWS, COLUMNS), tl.float32, L)
GROUPS: tl.constexpr = K // 128
b_scales = B_SCALE + rbn * {{stride("B_SCALE", 0)}}
group = first_step // 2
scale = tl.load(b_scales + min(group, GROUPS - 1) * {{stride("B_SCALE", 1)}})
for trip in range(0, TRIPS):
    following = tl.load(b_scales + min(group + 1, GROUPS - 1) * {{stride("B_SCALE", 1)}})
    mbarrier.wait(ready.index(stage), phase)
    even = operand(left_boxes.index(stage * PARTS + PART), right_boxes.dtype)
    sums = warpgroup_mma(even, right_boxes.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    even_stage = stage
    stage, phase = advance(stage, phase)
    mbarrier.wait(ready.index(stage), phase)
    odd = operand(left_boxes.index(stage * PARTS + PART), right_boxes.dtype)
    sums = warpgroup_mma(odd, right_boxes.index(stage).permute((1, 0)), sums, is_async=True)
    sums, even, odd = warpgroup_mma_wait(0, deps=[sums, even, odd])
    mbarrier.arrive(free.index(even_stage), count=1)
    mbarrier.arrive(free.index(stage), count=1)
    stage, phase = advance(stage, phase)
    dot += sums * tl.where(group < GROUPS, scale, 0.0)[:, None]
    scale = following
    group += 1"""

LOOP = Loop(
    "int4_weight_mm_hopper",
    _TEXT,
    left=Box(0, 8, "int32", 32),
    right=Box(0, 64, "bfloat16", 128),
    k=64,
    instruction_k=16,
    steps=(2,),
    transposed=True,
    operands=("B_SCALE",),
    functions=LEFT_OPERAND + _FUNCTIONS,
    splits=True,
)

# As many programs as registers allow: each waits for its own products, and the others go on. Of a split product the tail is another kernel's.
TILES = (
    HopperConfig(64, 1, 16, 7, programs=4),
    HopperConfig(64, 1, 32, 8, programs=3),
    HopperConfig(64, 1, 64, 8, programs=2),
    HopperConfig(64, 1, 128, 5, programs=2),
)
TILES_OF_PARTS = (*TILES[:2], HopperConfig(64, 1, 64, 5, programs=3), TILES[3])
SPLITS = (2, 4)
CONFIGS = (*TILES, *(replace(tile, splits=splits) for tile in TILES_OF_PARTS for splits in SPLITS))
LEAST_ROWS = 5
"""Of the activation; fewer are weight_stream.py's, and from EXPANDED_ROWS on the weight is expanded."""
LEAST_GROUPS = 4
"""Of a part of K."""
TIMED = 2


def is_legal(config: HopperConfig, problem: Problem, device: Device, tail: Tail) -> bool:
    """Whether the device can run it with that tail, beside activations in two bytes; see hopper.is_legal."""
    return problem.groups == (GROUP,) and problem.a_bytes == 2 and hopper.is_legal(LOOP, config, problem, device, tail)


def candidates(problem: Problem, device: Device, tail: Tail, *, thorough: bool) -> list[HopperConfig]:
    """The configs worth timing: of the narrowest tile that holds all rows, or else the widest, the most parts of K whose programs all run at once."""
    if not LEAST_ROWS <= problem.m < EXPANDED_ROWS:
        return []
    wide_enough = [tile.columns for tile in TILES if tile.columns >= problem.m] or [TILES[-1].columns]
    legal = [config for config in CONFIGS if config.columns == min(wide_enough) and is_legal(config, problem, device, tail)]
    fit = [config for config in legal if config.splits == 1 or _fits(config, problem, device)]
    return sorted(fit, key=lambda config: -config.splits)[:TIMED]


def _fits(config: HopperConfig, problem: Problem, device: Device) -> bool:
    programs = tiles(problem, config.columns, config.rows * config.parts) * config.splits
    return programs <= config.programs * device.multiprocessors and problem.k >= GROUP * LEAST_GROUPS * config.splits


@functools.cache
def template(tail: Tail) -> GluonTemplate:
    """The template with that tail."""
    return hopper.hopper_template(LOOP, tail)


def constants(config: HopperConfig, problem: Problem, device: Device, tail: Tail) -> dict[str, Any]:
    """The constants of a kernel."""
    return hopper.launch_constants(LOOP, config, problem)
