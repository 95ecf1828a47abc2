"""The tail that every template shares: from the accumulator to the stored tile.

A `Tail` says which operands there are and how each is indexed; `Tail.source()` writes the Triton text. Around it a template supplies `dot`
(int32, or float32 without zero points, [BLOCK_M, BLOCK_N]), the index vectors `rm` and `rn`, their in-range twins `ram` and `rbn`, `M`, `N` and,
where zero points ask for them, the sums `a_sum` [BLOCK_M] and `b_sum` [BLOCK_N] over K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import reference
from ..epilogues import EPILOGUES
from .weights import Weights, expanded

__all__ = ["COLUMN", "CONSTANT", "OF_EACH_WEIGHT", "OPERANDS", "ROW", "ROW_OPERANDS", "SCALAR", "Indexing", "Tail", "indented"]


@dataclass(frozen=True)
class Indexing:
    """How a tail reads an operand: `load` is a Triton expression of the operand's name; a literal is not a kernel argument."""

    name: str
    load: str
    is_argument: bool = True


SCALAR = Indexing("scalar", "tl.load({0})")
ROW = Indexing("row", 'tl.load({0} + ram * {{{{stride("{0}", 0)}}}})[:, None]')
COLUMN = Indexing("column", 'tl.load({0} + rbn * {{{{stride("{0}", 0)}}}})[None, :]')
OF_EACH_WEIGHT = Indexing("each_weight", "tl.load({0} + rbn)[None, :]")
"""A contiguous vector for each of several weights side by side; the main loop picks its weight's."""
CONSTANT = Indexing("constant", "tl.full((), {0}, tl.float32)", is_argument=False)


def indented(lines: list[str], spaces: int) -> str:
    """Statements as text, each line `spaces` further in."""
    return "\n".join(" " * spaces + line for line in lines)


OPERANDS = ("a_scale", "b_scale", "a_zero_point", "b_zero_point", "bias", "out_scale", "out_zero_point")
"""The operands of a Tail, in the order in which a kernel takes them."""
ROW_OPERANDS = ("a_scale", "a_zero_point", "out_scale", "out_zero_point")
"""Those that have one element or one for each row of the result; the others one for each column."""


@dataclass(frozen=True)
class Tail:
    """The static shape of what follows the main loop. None: that operand is absent, or, a scale, applied by the main loop.

    activations: in place of `activation`, one for each of several weights side by side (weights.py), whose number the main loop leaves in `weight`.
    block_size: dynamic requantize with scales as second output. fast: the result is stored with less precision than float32. ptx: a GPU's own
    instructions may be written, which the interpreter does not know.
    """

    a_scale: Indexing | None = None
    b_scale: Indexing | None = None
    a_zero_point: Indexing | None = None
    b_zero_point: Indexing | None = None
    bias: Indexing | None = None
    out_scale: Indexing | None = None
    out_zero_point: Indexing | None = None
    activation: str = "none"
    activations: tuple[str, ...] = ()
    out_quant_min: int = reference.INT8_MIN
    block_size: int | None = None
    fast: bool = False
    ptx: bool = False

    @classmethod
    def of(cls, operands: Mapping[str, Indexing]) -> Tail:
        """A tail with these operands, by field name, and nothing else."""
        fields: dict[str, Any] = dict(operands)
        return cls(**fields)

    def operands(self) -> dict[str, Indexing]:
        """The operands that are there, by field name, in the order in which a kernel takes them."""
        return {name: value for name in OPERANDS if (value := getattr(self, name)) is not None}

    @property
    def weights(self) -> Weights:
        """Those that the main loop multiplies with."""
        return Weights(len(self.activations) or 1)

    def of_each_weight(self) -> list[str]:
        """The operands of which each of several weights has its own, as kernel arguments without their numbers."""
        return [name.upper() for name, indexing in self.operands().items() if indexing is OF_EACH_WEIGHT]

    def arguments(self) -> list[str]:
        """Names of the kernel arguments, after those of the main loop."""
        given = [(name.upper(), indexing) for name, indexing in self.operands().items() if indexing.is_argument]
        names = [each for name, indexing in given for each in expanded(name, self.weights.count if indexing is OF_EACH_WEIGHT else 1)]
        return names + (["BLOCK_SCALES"] if self.block_size else [])

    def signature(self, *loop: str) -> str:
        """The kernel's arguments, as def_kernel takes them; `loop`: what the main loop reads besides A and B."""
        return ", ".join(f'"{name}"' for name in ("A", *self.weights.names, *loop, *self.arguments()))

    def name(self) -> str:
        """A name for the kernel that says what the tail does, unique to it."""
        parts = [f"{name}_{indexing.name}" for name, indexing in self.operands().items()]
        parts += self.activations or [self.activation]
        parts += ["fast"] if self.fast else []
        if self.out_scale or self.block_size:
            parts.append(f"int8_{-self.out_quant_min}")
        if self.block_size:
            parts.append(f"block{self.block_size}")
        if self.ptx:
            parts.append("ptx")
        return "_".join(parts)

    def describe(self) -> str:
        """The epilogue in words, for reports: e.g. 'bias + gelu + int8'."""
        parts = ["scales"]
        parts += ["zero point"] if self.a_zero_point or self.b_zero_point else []
        parts += ["bias"] if self.bias else []
        parts += [self.activation] if self.activation != "none" else []
        parts += ["int8"] if self.out_scale else []
        parts += [f"int8 in blocks of {self.block_size}"] if self.block_size else []
        return " + ".join(parts)

    def _load(self, name: str) -> str:
        return self.operands()[name].load.format(name.upper())

    def loop_lines(self) -> list[str]:
        """What the main loop adds for each pair of int8 tiles a [BLOCK_M, BLOCK_K] and b [BLOCK_K, BLOCK_N]."""
        lines = ["b_sum += tl.sum(b.to(tl.int32), axis=0)"] if self.a_zero_point else []
        return lines + (["a_sum += tl.sum(a.to(tl.int32), axis=1)"] if self.b_zero_point else [])

    def init_lines(self) -> list[str]:
        """What those sums start from."""
        lines = ["b_sum = tl.zeros((BLOCK_N,), dtype=tl.int32)"] if self.a_zero_point else []
        return lines + (["a_sum = tl.zeros((BLOCK_M,), dtype=tl.int32)"] if self.b_zero_point else [])

    def _accumulator_lines(self) -> list[str]:
        lines = []
        if self.a_zero_point:
            lines += [f"a_zero_point = {self._load('a_zero_point')}.to(tl.int32)", "dot -= a_zero_point * b_sum[None, :]"]
        if self.b_zero_point:
            shift = "a_sum[:, None] - K * a_zero_point" if self.a_zero_point else "a_sum[:, None]"
            lines.append(f"dot -= ({shift}) * {self._load('b_zero_point')}.to(tl.int32)")
        scales = [self._load(name) for name in ("a_scale", "b_scale") if name in self.operands()]
        lines.append(" * ".join(["x = dot.to(tl.float32)", *scales]))
        if self.bias:
            lines.append(f"x += {self._load('bias')}.to(tl.float32)")
        return lines + self._activation_lines()

    def _activation_lines(self) -> list[str]:
        epilogues = [EPILOGUES[name] for name in self.activations or (self.activation,)]
        texts = [each.triton_fast if self.fast and each.triton_fast else each.triton for each in epilogues]
        if len(set(texts)) == 1:
            return texts[0].splitlines()
        lines = []
        for i, text in enumerate(texts):
            lines.append("else:" if i == len(texts) - 1 else f"{'el' if i else ''}if weight == {i}:")
            lines += [f"    {line}" for line in text.splitlines()]
        return lines

    def _round_lines(self) -> list[str]:
        """Steps `t` to the int8 tile `y`: NaN is zero, round half to even, shift, saturate. One conversion of a GPU does all but the shift.

        Elsewhere a float added to 1.5 * 2^23 is rounded to an integer, whose low byte is the float's own.
        """
        low = self.out_quant_min
        if self.out_zero_point:
            number = "tl.where(t == t, t, 0.0)"
            lines = [f"t = libdevice.rint({number}) + {self._load('out_zero_point')}.to(tl.float32)"]
        else:
            lines = [] if self.ptx else ["t = tl.where(t == t, t, 0.0)"]
        if self.ptx:
            floor = "" if low == reference.INT8_MIN else f" max.s32 $0, $0, {low};"
            asm = f'"cvt.rni.sat.s8.f32 $0, $1;{floor}", "=r,f", [t], dtype=tl.int32, is_pure=True, pack=1'
            return [*lines, f"y = tl.inline_asm_elementwise({asm}).to(tl.int8)"]
        lines.append(f"t = tl.minimum(tl.maximum(t, {float(low)}), {float(reference.INT8_MAX)})")
        return [*lines, f"y = (t + {1.5 * 2.0**23}).to(tl.int32, bitcast=True).to(tl.int8)"]

    def _block_lines(self) -> list[str]:
        size = self.block_size
        tiny = repr(reference.SMALLEST_SCALE)
        return [
            "blocks = tl.abs(y)",
            # What lies past the edge has no part in the last block's scale. Of a single element, which is stored without a mask, it is a copy.
            f"if N % {size} != 0:",
            "    if M * N != 1:",
            "        blocks = tl.where((rn < N)[None, :], blocks, 0.0)",
            f"blocks = tl.reshape(blocks, (BLOCK_M, BLOCK_N // {size}, {size}))",
            # tl.max may drop a NaN; a block that holds anything not finite has no scale.
            'finite = tl.min((blocks < float("inf")).to(tl.int32), axis=2) == 1',
            "largest = tl.max(blocks, axis=2)",
            f"scale = tl.where(largest > 0.0, tl.maximum(largest / {float(reference.INT8_MAX)}, {tiny}), 0.0)",
            'scale = tl.where(finite, scale, float("nan"))',
            f"rb = pid_n * (BLOCK_N // {size}) + tl.arange(0, BLOCK_N // {size})",
            f"scale_mask = (rm[:, None] < M) & (rb[None, :] < tl.cdiv(N, {size}))",
            f"tl.store(BLOCK_SCALES + rm[:, None] * tl.cdiv(N, {size}) + rb[None, :], scale, mask=scale_mask)",
            "inverse = 1.0 / tl.where(scale == 0.0, 1.0, scale)",
            f"inverse = tl.broadcast_to(inverse[:, :, None], (BLOCK_M, BLOCK_N // {size}, {size}))",
            "t = y * tl.reshape(inverse, (BLOCK_M, BLOCK_N))",
            *self._round_lines(),
        ]

    def statements(self) -> list[str]:
        """From `dot` to the tile `y` that is stored."""
        lines = self._accumulator_lines()
        if self.out_scale:
            lines += [f"t = y * (1.0 / {self._load('out_scale')})", *self._round_lines()]
        return lines + (self._block_lines() if self.block_size else [])

    def source(self, indent: int) -> str:
        """The text from `dot` to the store, `indent` spaces into a kernel's body."""
        lines = self.statements()
        lines += ["idx_m = rm[:, None]", "idx_n = rn[None, :]", "mask = (idx_m < M) & (idx_n < N)"]
        store = f'("idx_m", "idx_n"), "y", "mask", indent_width={indent}, val_shape=("BLOCK_M", "BLOCK_N")'
        lines.append(f"{{{{store_output({store})}}}}")
        return indented(lines, indent)
