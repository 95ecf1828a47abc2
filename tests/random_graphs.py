"""Random programs of quants, dequants, linears, pointwise operators and views, each with its result in float64 and a bound on float32's error.

A `Program` is Python source that calls into its own constants. While it grows, every value is carried in float64 together with a bound on how far
float32 may end from it, whether the arithmetic is done as written or rewritten. Scales of quants are chosen so that no value lies within its error of
a tie: so int8 values are exact, and errors stay small however long a program is.

Bounds, with U the relative error of one float32 rounding: a linear of K inputs adds (K + 4) U |x| |w|, which covers the integer path too, as
|x| |w| is at least |x w|; a pointwise operator adds a few U of its result and operands, and scales what is there by its Lipschitz constant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from dialect_cases import DIALECTS, TORCHAO, Dialect, per_channel
from hypothesis import strategies as st
from support import EVALUATION, LIPSCHITZ, U
from torch import Tensor

MARGIN = 1e-3
"""How near to a tie, in steps, a quantized value may come, its error apart."""


@dataclass
class Value:
    """A variable of a program. For an int8 one, `qparams` and `dialect` say how it was made, and the error is 0."""

    name: str
    value: Tensor
    error: Tensor
    depends_on: tuple[str, ...] = ()
    kind: str = ""
    dialect: Dialect | None = None
    qparams: tuple[Tensor, Tensor | None] | None = None

    @property
    def is_int8(self) -> bool:
        return self.qparams is not None


@dataclass(repr=False)
class Program:
    """Source under construction. `draw` is hypothesis's."""

    draw: Any
    dialects: tuple[Dialect, ...]
    lines: list[str] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=lambda: {"torch": torch, "F": F})
    values: dict[str, Value] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    seed: int = 0

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.source())  # what hypothesis shows of a failing one

    # Constants, variables, choices

    def rand(self, *shape: int) -> Tensor:
        self.seed += 1
        return torch.rand(shape, generator=torch.Generator().manual_seed(self.seed))

    def int8(self, *shape: int) -> Tensor:
        self.seed += 1
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(self.seed))

    def constant(self, value: Any) -> str:
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def assign(self, expression: str, value: Tensor, error: Tensor, *depends_on: Value, **more: Any) -> Value:
        name = f"v{len(self.values)}"
        self.lines.append(f"    {name} = {expression}")
        self.values[name] = Value(name, value, error, tuple(v.name for v in depends_on), **more)
        return self.values[name]

    def choose(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def choose_late(self, values: list[Value]) -> Value:
        """One of the values, mostly one of the last: so that chains grow, and old values are shared now and then."""
        back = self.draw(st.sampled_from([1, 1, 1, 1, 1, 2, 3, 6]))
        return values[-min(back, len(values))]

    def floats(self) -> list[Value]:
        return [v for v in self.values.values() if not v.is_int8]

    def int8s(self) -> list[Value]:
        return [v for v in self.values.values() if v.is_int8]

    # Steps: each adds a variable, or returns None where it does not apply

    def quantize(self, x: Value | None = None) -> Value | None:
        x, dialect = x or self.choose_late(self.floats()), self.choose(self.dialects)
        by_rows = dialect.per_row and self.draw(st.booleans()) and x.value.shape[:-1].numel() > 1
        largest = x.value.abs().amax(-1, keepdim=True) if by_rows else x.value.abs().max().reshape(1)
        start = (largest / self.choose([60, 120, 200])).clamp(min=1e-3)
        scale = scale_away_from_ties(x, start)
        if scale is None:
            return None
        zero_point = self.zero_point(scale) if self.draw(st.booleans()) else None
        s, z = (self.constant(each) for each in dialect.qparams(scale, zero_point))
        shift = 0 if zero_point is None else zero_point.double()
        q = (torch.round(x.value / scale.double()) + shift).clamp(-128, 127)
        expression = f"{self.constant(dialect)}.quantize({x.name}, {s}, {z})"
        return self.assign(expression, q, torch.zeros_like(q), x, kind="quant", dialect=dialect, qparams=(scale, zero_point))

    def zero_point(self, scale: Tensor) -> Tensor:
        return (self.rand(*scale.shape) * 100 - 50).to(torch.int32)

    def dequantize(self) -> Value | None:
        if not self.int8s():
            return None
        q = self.choose_late(self.int8s())
        assert q.qparams is not None
        scale, zero_point = q.qparams
        # What one dialect wrote, another may read, where it has scales of that shape.
        dialect = self.choose([q.dialect, *(d for d in self.dialects if d.per_row or scale.numel() == 1)])
        s, z = (self.constant(each) for each in dialect.qparams(scale, zero_point))
        value = (q.value - (0 if zero_point is None else zero_point.double())) * scale.double()
        return self.assign(f"{self.constant(dialect)}.dequantize({q.name}, {s}, {z})", value, 3 * U * value.abs(), q, kind="dequant")

    def linear(self, x: Value | None = None) -> Value:
        x = x or self.choose_late(self.floats())
        k, n = x.value.shape[-1], self.choose([1, 3, 8])
        if self.choose([True, True, True, True, False]):
            w, scale = self.int8(n, k), (self.rand(n, 1) + 0.5) / (127 * k**0.5)
            dequantize = self.choose(d.weight for d in self.dialects if d.weight is not per_channel)
            wide = f"{self.constant(dequantize)}({self.constant(w)}, {self.constant(scale)})"
            weight = w.double() * scale.double()
        else:
            w = (self.rand(n, k) - 0.5) / k**0.5
            wide, weight = self.constant(w), w.double()
        bias = self.rand(n) - 0.5 if self.draw(st.booleans()) else None
        value = x.value @ weight.t() + (0 if bias is None else bias.double())
        error = x.error @ weight.abs().t() + (k + 4) * U * (x.value.abs() @ weight.abs().t()) + 2 * U * value.abs() + U
        return self.assign(f"F.linear({x.name}, {wide}, {self.constant(bias)})", value, error, x, kind="linear")

    def pointwise(self, x: Value | None = None) -> Value:
        x = x or self.choose_late(self.floats())
        expression, fn, own = self.choose(POINTWISE)
        value = fn(x.value)
        error = LIPSCHITZ * x.error + EVALUATION * U * (x.value.abs() + value.abs() + 1) + own(value)
        return self.assign(expression.format(x.name), value, error, x)

    def combine(self) -> Value | None:
        x = self.choose_late(self.floats())
        y = self.choose([v for v in self.floats() if v.value.shape == x.value.shape])
        value = x.value + y.value
        return self.assign(f"{x.name} + {y.name}", value, x.error + y.error + U * value.abs(), x, y)

    def move(self) -> Value | None:
        x = self.choose_late(list(self.values.values()))
        if x.is_int8 and x.qparams is not None and x.qparams[0].numel() > 1:
            return None  # its scales by rows would have to move along
        moves = [m for m in MOVES if m[1] == x.value.ndim]
        expression, _, fn = self.choose(moves)
        more = {"dialect": x.dialect, "qparams": x.qparams} if x.is_int8 else {}
        return self.assign(expression.format(x.name), fn(x.value), fn(x.error), x, **more)

    def layer(self) -> Value | None:
        """What the passes make one kernel of, if nothing else reads what is in between."""
        x = self.dequantize()
        if x is None:
            return None
        y = self.linear(x)
        if self.draw(st.booleans()):
            y = self.pointwise(y)
        return self.quantize(y) if self.choose([True, True, False]) else y

    # The whole

    def source(self) -> str:
        parameters = ", ".join(f"v{i}" for i in range(len(self.inputs)))
        return "\n".join([f"def program({parameters}):", *self.lines, f"    return {', '.join(self.outputs)},"])

    def function(self) -> Any:
        """The program as a function of `inputs`."""
        code = compile(self.source(), "random_program.py", "exec")
        exec(code, self.names)
        return self.names["program"]

    def reached(self, kind: str) -> int:
        """How many variables of that kind the outputs depend on."""
        pending, seen = list(self.outputs), set()
        while pending:
            name = pending.pop()
            if name not in seen:
                seen.add(name)
                pending.extend(self.values[name].depends_on)
        return sum(self.values[name].kind == kind for name in seen)


def _nothing(value: Tensor) -> Tensor:
    return torch.zeros_like(value)


def _bfloat16(value: Tensor) -> Tensor:
    return 2.0**-8 * value.abs()


def _fitted_gelu(value: Tensor) -> Tensor:
    return (1.3e-4 * value.abs()).clamp(max=1.6e-5) + 2.5e-8


POINTWISE = (
    ("F.relu({})", F.relu, _nothing),
    ("F.gelu({})", F.gelu, _fitted_gelu),
    ("F.gelu({}, approximate='tanh')", lambda x: F.gelu(x, approximate="tanh"), _nothing),
    ("F.silu({})", F.silu, _nothing),
    ("torch.sigmoid({})", torch.sigmoid, _nothing),
    ("{} * 0.75", lambda x: x * 0.75, _nothing),
    ("{} + 0.25", lambda x: x + 0.25, _nothing),
    ("{}.to(torch.bfloat16).float()", lambda x: x, _bfloat16),
    ("{}.clamp(-2.0, 2.0)", lambda x: x.clamp(-2.0, 2.0), _nothing),
)
"""Source, the same in float64, and what its evaluation adds beyond a few roundings."""

MOVES = (
    ("{}.unsqueeze(0)", 2, lambda t: t.unsqueeze(0)),
    ("{}.t()", 2, lambda t: t.t()),
    ("{}.flip(0)", 2, lambda t: t.flip(0)),
    ("{}[:, :1].expand(-1, 5)", 2, lambda t: t[:, :1].expand(-1, 5)),
    ("{}.flatten(0, 1)", 3, lambda t: t.flatten(0, 1)),
    ("{}.transpose(0, 1)", 3, lambda t: t.transpose(0, 1)),
    ("{}.transpose(1, 2)", 3, lambda t: t.transpose(1, 2)),
    ("{}.transpose(0, 1).contiguous()", 3, lambda t: t.transpose(0, 1)),
)
"""Source, the number of dimensions that it takes, and the same on a float64 value or bound."""


def scale_away_from_ties(x: Value, start: Tensor) -> Tensor | None:
    """Scales near `start`, of its shape, for which no value is within its error and MARGIN of a tie, and none is lost in its error; or None."""
    best = start.float()
    settled = torch.zeros(start.shape, dtype=torch.bool)
    for step in range(200):
        candidate = (start * (1 + step / 97)).float()
        t, e = x.value / candidate.double(), x.error / candidate.double() + 8 * U * (x.value / candidate.double()).abs() + MARGIN
        clear = ((t - t.floor() - 0.5).abs() > e) | (t.abs() > 300)
        fine = clear.all(-1, keepdim=True) if start.ndim > 1 or start.numel() > 1 else clear.all().reshape(1)
        best = torch.where(fine & ~settled, candidate, best)
        settled |= fine
        if bool(settled.all()):
            return best
    return None


STEPS = ("layer", "layer", "layer", "quantize", "dequantize", "linear", "pointwise", "combine", "move")


@st.composite
def programs(draw: st.DrawFn, dialects: tuple[Dialect, ...] = tuple(d for d in DIALECTS if d is not TORCHAO)) -> Program:
    """A program of one or two inputs and 4 to 9 steps, which starts with a quantized input of a linear, and returns one to three variables."""
    program = Program(draw, dialects, seed=draw(st.integers(0, 2**20)) * 1000)
    shapes = st.sampled_from([(1, 5), (4, 5), (6, 8), (2, 3, 5), (3, 1, 8)])
    for shape in draw(st.lists(shapes, min_size=1, max_size=2)):
        x = program.rand(*shape) * 6 - 3
        program.inputs.append(x)
        name = f"v{len(program.values)}"
        program.values[name] = Value(name, x.double(), torch.zeros_like(x, dtype=torch.float64))
    for step in ["quantize", "layer", *draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=7))]:
        if getattr(program, step)() is None:
            program.pointwise()
    computed = list(program.values)[len(program.inputs) :]
    program.outputs = [computed[-1], *draw(st.lists(st.sampled_from(computed), max_size=2, unique=True))]
    return program
