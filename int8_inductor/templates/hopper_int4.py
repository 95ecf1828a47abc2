"""Templates of INT4 weights beside bfloat16 or float16 activations of few rows, for Hopper: through registers into the tensor cores.

The product lies transposed, as only a left operand may come from registers. Of the eight values of a word in memory a lane of the tensor cores' left
operand takes one byte, the same of every word: so each lane reads whole words, as its three neighbours do, and picks its byte; nothing is moved
between lanes, and K keeps its order, which the activation's boxes have too. A group of K is summed by itself and scaled in float32. Where tiles are
few, K is split (see hopper_weights.py).

A step has two groups beside up to 32 rows of the activation: boxes of weights are 128 bytes wide then, as descriptors read narrow ones at no more
rows a second; beside more rows, whose sums take more registers, one. On an H200 (kernels in CUDA graphs, dependent launches), us, M = 16, the same
configs with boxes of 128, 64 and 32 bytes: 6144 x 4096 9.8, 10.0, 10.1; 4096 x 4096 8.5, 8.9, 8.9; 28672 x 4096 25.2, 26.3, 27.6; 4096 x 14336 16.0,
17.0, 17.1. At M = 4 it is behind weight_stream.py but for N = 28672.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..gluon.program import Box
from . import hopper
from .hopper import HopperConfig, HopperTemplate, Loop
from .hopper_text import LEFT_OPERAND
from .problem import Device, Problem, tiles
from .rivals import EXPANDED_ROWS
from .tail import Tail

__all__ = ["INT4_MM", "HopperInt4"]

GROUP = 128
"""K of a group. Smaller groups are other templates'."""

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
def halves(words, count: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(words, [64, 2, count // 2]), (0, 2, 1)))


@gluon.jit
def operand(words, dtype: tl.constexpr):
    """The weights of [64, 8] words, as a left operand in registers."""
    ROW_WORD_BYTE: tl.constexpr = LAYOUT_OF_8
    words = tl.expand_dims(tl.convert_layout(words, tl.SliceLayout(2, ROW_WORD_BYTE), assert_trivial=True), 2)
    byte = 0x4440 + tl.arange(0, 4, layout=tl.SliceLayout(0, tl.SliceLayout(0, ROW_WORD_BYTE)))
    words, byte = tl.broadcast(words, tl.expand_dims(tl.expand_dims(byte, 0), 0))
    return left_operand(tl.reshape(floats(words, byte, dtype), [64, 32]), dtype)


@gluon.jit
def words_of(box):
    """The words of a step's box, 8 columns each."""
    ROW_WORD_BYTE: tl.constexpr = LAYOUT_OF_BOX
    words = box.load(tl.SliceLayout(2, ROW_WORD_BYTE))
SPLIT
'''

_SPLIT = {
    1: "    return halves(words, 16)",
    2: """    near, far = halves(words, 32)
    a, b = halves(near, 16)
    c, d = halves(far, 16)
    return a, b, c, d""",
}
"""By the groups of a step, two words' columns each."""


def _layout(words: int) -> str:
    """How four warps hold the bytes of 64 rows of words: a lane the same byte of each of its rows' words."""
    registers = [[8, 0, 0], *([0, 1 << bit, 0] for bit in range(words.bit_length() - 1))]
    lanes = [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return (
        f"tl.DistributedLinearLayout(reg_bases={registers}, lane_bases={lanes}, warp_bases=[[16, 0, 0], [32, 0, 0]], "
        f"block_bases=[], shape=[64, {words}, 4])"
    )


def _functions(groups: int) -> str:
    """Those of a loop with so many groups a step."""
    text = _FUNCTIONS.replace("LAYOUT_OF_8", _layout(8)).replace("LAYOUT_OF_BOX", _layout(16 * groups))
    return LEFT_OPERAND + text.replace("SPLIT", _SPLIT[groups])


# Past K both boxes are zeros, and so is the scale: the last group's may be infinite.
_START = """dot = tl.zeros((ROWS, COLUMNS), tl.float32, L)
zero = tl.zeros((ROWS, COLUMNS), tl.float32, L)
GROUPS: tl.constexpr = K // 128
b_scales = B_SCALE + rbn * {{stride("B_SCALE", 0)}}
group = first_step * (BOXES // 2)"""
_SCALE = 'scale_{0} = tl.load(b_scales + min(group + {0}, GROUPS - 1) * {{{{stride("B_SCALE", 1)}}}})'


def _product(weights: str, box: int, sums: str) -> str:
    first = ", use_acc=False" if sums == "zero" else ""
    right = f"right_boxes.index(stage * BOXES + {box}).permute((1, 0))"
    return f"sums_{box // 2} = warpgroup_mma({weights}, {right}, {sums}{first}, is_async=True)"


def _text(groups: int) -> str:
    """The loop. A group's products run while the next one's first weights are converted, and it is scaled while that one's run."""
    each = range(groups)
    words = [f"words_{i}" for i in range(2 * groups)]
    body = [_SCALE.format(g) for g in each]
    body += ["mbarrier.wait(ready.index(stage), phase)", f"{', '.join(words)} = words_of(left_boxes.index(stage * PARTS + PART))"]
    body += ["even_0 = operand(words_0, right_boxes.dtype)"]
    for g in each:
        body += [_product(f"even_{g}", 2 * g, "zero"), f"odd_{g} = operand(words_{2 * g + 1}, right_boxes.dtype)"]
        body += [_product(f"odd_{g}", 2 * g + 1, f"sums_{g}")]
        body += [_scaled(g - 1)] if g else []
        body += [f"even_{g + 1} = operand(words_{2 * g + 2}, right_boxes.dtype)"] if g + 1 < groups else []
        body += [f"sums_{g}, even_{g}, odd_{g} = warpgroup_mma_wait(0, deps=[sums_{g}, even_{g}, odd_{g}])"]
    body += ["mbarrier.arrive(free.index(stage), count=1)", "stage, phase = advance(stage, phase)", _scaled(groups - 1)]
    body += [f"group += {groups}"]
    return "\n".join([_START, "for trip in range(0, TRIPS):", *(f"    {line}" for line in body)])


def _scaled(g: int) -> str:
    return f"dot += sums_{g} * tl.where(group + {g} < GROUPS, scale_{g}, 0.0)[:, None]"


def _loop(groups: int) -> Loop:
    """The main loop with so many groups a step."""
    return Loop(
        f"int4_weight_mm_hopper_{groups}",
        _text(groups),
        left=Box(0, 16 * groups, "int32", 64 * groups),
        right=Box(0, 64, "bfloat16", 128),
        boxes=2 * groups,
        k=GROUP * groups,
        instruction_k=16,
        transposed=True,
        operands=("B_SCALE",),
        functions=_functions(groups),
        splits=True,
    )


SPLITS = (2, 4)
LEAST_ROWS = 5
"""Of the activation; fewer are weight_stream.py's, and from EXPANDED_ROWS on the weight is expanded."""
LEAST_GROUPS = 4
"""Of a part of K."""
TIMED = 3


@dataclass(frozen=True)
class HopperInt4(HopperTemplate):
    """The template for `least` to `most` rows of the activation. tiles: of whole products, the narrowest first; of_parts: of split ones, whose
    tail is another kernel's.
    """

    least: int
    most: int
    tiles: tuple[HopperConfig, ...]
    of_parts: tuple[HopperConfig, ...]

    @property
    def configs(self) -> tuple[HopperConfig, ...]:
        return (*self.tiles, *(replace(tile, splits=splits) for tile in self.of_parts for splits in SPLITS))

    def is_legal(self, config: HopperConfig, problem: Problem, device: Device, tail: Tail) -> bool:
        """Whether the device can run it with that tail, beside activations in two bytes; see hopper.is_legal."""
        return problem.groups == (GROUP,) and problem.a_bytes == 2 and hopper.is_legal(self.loop, config, problem, device, tail)

    def candidates(self, problem: Problem, device: Device, tail: Tail, *, thorough: bool) -> list[HopperConfig]:
        """The configs worth timing: of the narrowest tile that holds all rows, or the widest, the most parts of K whose programs all run at once."""
        if not self.least <= problem.m <= self.most:
            return []
        wide_enough = [tile.columns for tile in self.tiles if tile.columns >= problem.m] or [self.tiles[-1].columns]
        legal = [config for config in self.configs if config.columns == min(wide_enough) and self.is_legal(config, problem, device, tail)]
        fit = [config for config in legal if config.splits == 1 or _fits(config, problem, device)]
        return sorted(fit, key=lambda config: -config.splits)[:TIMED]


def _fits(config: HopperConfig, problem: Problem, device: Device) -> bool:
    programs = tiles(problem, config.columns, config.rows * config.parts) * config.splits
    return programs <= config.programs * device.multiprocessors and problem.k >= GROUP * LEAST_GROUPS * config.splits


# As many programs as registers allow: each waits for its own products, and the others go on.
_FEW = (HopperConfig(64, 1, 16, 3, programs=4), HopperConfig(64, 1, 32, 4, programs=2))
_MORE = (HopperConfig(64, 1, 64, 4, programs=2), HopperConfig(64, 1, 128, 2, programs=2))
INT4_MM = (
    HopperInt4(_loop(2), LEAST_ROWS, 32, _FEW, (*_FEW, HopperConfig(64, 1, 16, 3, programs=3))),
    HopperInt4(_loop(1), 33, EXPANDED_ROWS - 1, _MORE, (HopperConfig(64, 1, 64, 3, programs=3), _MORE[1])),
)
"""Two groups a step, and one."""
