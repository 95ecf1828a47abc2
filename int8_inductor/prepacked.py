"""Linears of a frozen graph on a CPU: oneDNN's linear on a weight that is packed for it when the graph is compiled.

    scaled_mm(a, b, ...)  ->  onednn.qlinear_pointwise(a, packed b, ...) and what it leaves, in Inductor's code

With `torch._inductor.config.freezing` weights and static scales are constants of the compiled graph (Inductor's own INT8 path for x86 needs it
as well). A static scale of the activation then goes into oneDNN's kernel with the weight's, bias, activation and, where it provably stores what the
eager definition does, requantization; with a dynamic one the kernel gives the sums alone, as floats. aten._int_mm, which packs nothing, takes about
twice as long where the result is wide, and its sums go through memory as int32 (benchmarks/NOTES.md).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import V

from . import ops, reference
from .epilogues import EPILOGUES, PostOp
from .int_mm import SLOWER, least_seconds

__all__ = ["Prepacked", "Reached", "is_exact_and_fast", "prepacked_linear"]

SMALLEST, LARGEST = 2.0**-126, 2.0**96
"""Products of both scales that oneDNN may have as one float32: normal numbers, and small enough that no sum of int8 products overflows (2^31)."""
STEPS = 100
"""A requantized step is so many times the error of a post-op, at least."""


class Reached(enum.Enum):
    """How far oneDNN's kernel computes. SUMS: int8 products alone, as float32; ACTIVATED: up to the activation, as float32; STORED: all of it."""

    SUMS = "sums"
    ACTIVATED = "activated"
    STORED = "stored"


@dataclass(frozen=True)
class Prepacked:
    """A linear by oneDNN: its result, an Inductor box [M, N], how far that has come, and how many linears the same kernel computes."""

    box: Any
    reached: Reached
    side_by_side: int = 1

    def __str__(self) -> str:
        others = f", {self.side_by_side} side by side" if self.side_by_side > 1 else ""
        return f"onednn.qlinear_pointwise on a prepacked weight{others}"


_ROWS, _SIDE = 64, 256


@functools.cache
def is_exact_and_fast() -> bool:
    """Whether oneDNN's int8 linear is exact on this machine, and faster than float32: measured once a process.

    Before VNNI its instruction adds two products in 16 bits, saturated; some of its kernels are references, a second a call.
    """
    from ._compat import without_modes

    if not torch.backends.mkldnn.is_available():
        return False
    with without_modes(), torch.no_grad():
        exact = True
        for value, zero_point in ((127, 0), (-128, 0), (127, -128), (-128, 127)):
            a, b = torch.full((_ROWS, _SIDE), value, dtype=torch.int8), torch.full((_SIDE, _SIDE), -128, dtype=torch.int8)
            exact = exact and bool((_product(a, _pack(b, _ROWS), zero_point) == _SIDE * (value - zero_point) * -128).all())
        packed, x, y = _pack(b, _ROWS), a.float(), b.float()
        return exact and least_seconds(lambda: _product(a, packed, 0)) < SLOWER * least_seconds(lambda: torch.mm(x, y.t()))


def _pack(b: Tensor, rows: int | None) -> Tensor:
    """b [N, K] in the layout that oneDNN wants for so many rows of the activation, or for any number: [K, N]."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(b.contiguous(), None if rows is None else [rows, b.shape[1]])
    return packed


def _product(a: Tensor, packed: Tensor, zero_point: int) -> Tensor:
    ones, zeros = torch.ones(packed.shape[1]), torch.zeros(packed.shape[1], dtype=torch.int32)
    sums: Tensor = torch.ops.onednn.qlinear_pointwise(a, 1.0, zero_point, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return sums


def _named(node: torch.fx.Node) -> dict[str, Any]:
    """The arguments of a call of one of our operators."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return ops.bound(node.target, node.args, node.kwargs)


def _frozen(value: Any) -> Tensor | None:
    """What an argument of a node is: a constant of the frozen graph, or None."""
    if not isinstance(value, torch.fx.Node):
        return None
    if value.op == "get_attr":
        constant: Any = operator.attrgetter(str(value.target))(V.graph.module)
        return constant.detach() if isinstance(constant, Tensor) else None
    if value.target is torch.ops.aten.full.default and isinstance(value.args[1], (int, float)):
        fake: Tensor = value.meta["val"]
        return torch.full((1,), value.args[1], dtype=fake.dtype) if fake.numel() == 1 else None
    return None


def _number(value: Tensor | None) -> float | None:
    """The value of a constant of one element, or None."""
    return float(value.item()) if value is not None and value.numel() == 1 else None


@dataclass(frozen=True)
class _Linear:
    """The constants of one linear. scale, zero_point: of the activation. bias: zeros where there is none."""

    weight: Tensor
    weight_scale: Tensor
    scale: float
    zero_point: int
    bias: Tensor
    post_op: PostOp


def _static(weight: Tensor, named: Mapping[str, Any]) -> _Linear | None:
    """The linear of a product whose scales and bias are all constants that oneDNN's kernel takes, or None."""
    rows, post_op = weight.shape[0], EPILOGUES[named["activation"]].onednn
    scale, weight_scale = _number(_frozen(named["a_scale"])), _frozen(named["b_scale"])
    if scale is None or weight_scale is None or post_op is None:
        return None
    zero_point = bias = None
    if named["a_zero_point"] is not None and (zero_point := _number(_frozen(named["a_zero_point"]))) is None:
        return None
    if named["bias"] is not None and (bias := _frozen(named["bias"])) is None:
        return None
    weight_scale = weight_scale.reshape(-1).float().expand(rows).contiguous()
    products = weight_scale * scale
    shift = torch.zeros(rows) if bias is None else bias.reshape(-1).float().contiguous()
    if not bool(((products >= SMALLEST) & (products <= LARGEST)).all() and shift.isfinite().all()):
        return None
    return _Linear(weight, weight_scale, scale, int(zero_point or 0), shift, post_op)


@dataclass(frozen=True)
class _Store:
    """How oneDNN's kernel stores a result."""

    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    zero_point: int = 0


def _store(linear: _Linear, named: Mapping[str, Any]) -> _Store | None:
    """How the kernel stores what the eager definition does, where it can: as float32 or bfloat16, or as int8 by a constant scale that is coarse
    beside the post-op's error, and where nothing would be stored below the smallest value that is allowed.
    """
    if "block_size" in named:
        return None
    if named["out_scale"] is None:
        dtype = named["out_dtype"] or torch.float32
        return _Store(dtype) if dtype in (torch.float32, torch.bfloat16) else None
    scale = _number(_frozen(named["out_scale"]))
    zero_point = 0.0 if named["out_zero_point"] is None else _number(_frozen(named["out_zero_point"]))
    if scale is None or zero_point is None or not STEPS * linear.post_op.error <= scale < LARGEST or scale < SMALLEST:
        return None
    least = linear.post_op.least / scale + zero_point
    if named["out_quant_min"] != reference.INT8_MIN and not least > reference.SYMMETRIC_MIN:
        return None
    return _Store(torch.int8, scale, int(zero_point))


def _constant(t: Tensor, name: str) -> Any:
    return V.graph.add_tensor_constant(t, name=name)


def _call(a: Any, linear: _Linear, store: _Store) -> Any:
    """The box of oneDNN's kernel."""
    name = V.graph.current_node.name
    rows = a.get_size()[0]
    packed = _constant(_pack(linear.weight, int(rows) if isinstance(rows, (int, sympy.Integer)) else None), f"{name}_packed")
    scale = _constant(linear.weight_scale, f"{name}_scale")
    zeros = _constant(torch.zeros(linear.weight.shape[0], dtype=torch.int32), f"{name}_zeros")
    bias = _constant(linear.bias, f"{name}_bias") if linear.bias.any() else None
    lower = lowerings[torch.ops.onednn.qlinear_pointwise.tensor]
    # Where a has a stride of 0 oneDNN computes something else.
    activation, stored = (linear.scale, linear.zero_point), (store.scale, store.zero_point, store.dtype)
    post_op: tuple[Any, ...] = (linear.post_op.name, [], linear.post_op.algorithm)
    return lower(ir.ExternKernel.require_contiguous(a), *activation, packed, scale, zeros, bias, *stored, *post_op)


@dataclass(frozen=True)
class _Kernel:
    """What one call of oneDNN's kernel computes for a linear."""

    linear: _Linear
    store: _Store
    reached: Reached

    def suits(self, other: _Kernel) -> bool:
        """Whether one call can compute both, of the same activation."""
        one, two = (dataclasses.replace(each.linear, weight=_NONE, weight_scale=_NONE, bias=_NONE) for each in (self, other))
        return one == two and self.store == other.store and self.reached is other.reached


_NONE = torch.empty(0)


def _kernel(node: torch.fx.Node) -> _Kernel | None:
    """What oneDNN computes of the scaled_mm `node`, or None."""
    named = _named(node)
    if named["b_zero_point"] is not None or (weight := _frozen(named["b"])) is None:
        return None
    if (linear := _static(weight, named)) is not None:
        store = _store(linear, named)
        return _Kernel(linear, _Store(), Reached.ACTIVATED) if store is None else _Kernel(linear, store, Reached.STORED)
    if named["a_zero_point"] is not None:
        return None  # it would be corrected in int32, which sums in float32 are not above 2^24
    rows = weight.shape[0]
    return _Kernel(_Linear(weight, torch.ones(rows), 1.0, 0, torch.zeros(rows), PostOp("none")), _Store(), Reached.SUMS)


def _same(x: Any, y: Any) -> bool:
    """Whether two arguments of nodes have the same value: the same node, equal constants, or the same operator on the same values. Linears of one
    activation have scales of their own, which calibration has made equal.
    """
    if x is y or not isinstance(x, torch.fx.Node) or not isinstance(y, torch.fx.Node):
        return bool(x is y or (type(x) is type(y) and not isinstance(x, torch.fx.Node) and x == y))
    one, two = _frozen(x), _frozen(y)
    if one is not None and two is not None:
        return one.dtype == two.dtype and torch.equal(one, two)
    pure = x.op == "call_function" and x.target is y.target and isinstance(x.target, torch._ops.OpOverload) and not x.is_impure()
    return pure and len(x.args) == len(y.args) and x.kwargs == y.kwargs and all(map(_same, x.args, y.args))


def _neighbours(node: torch.fx.Node, kernel: _Kernel) -> dict[torch.fx.Node, _Kernel]:
    """`node` and the scaled_mm after it, as far as one call can compute them all."""
    found, nodes = {node: kernel}, node.graph.find_nodes(op="call_function", target=node.target)
    for each in nodes[nodes.index(node) + 1 :]:
        other = _kernel(each) if _same(_named(node)["a"], _named(each)["a"]) else None
        if other is None or not kernel.suits(other):
            break
        found[each] = other
    return found


def _side_by_side(linears: Sequence[_Linear]) -> _Linear:
    """Linears of one activation as one."""
    weight, weight_scale, bias = (torch.cat([getattr(each, name) for each in linears]) for name in ("weight", "weight_scale", "bias"))
    return dataclasses.replace(linears[0], weight=weight, weight_scale=weight_scale, bias=bias)


FEW_ROWS = 512
"""Up to so many rows a call's own time counts: on eight cores 128 x 1152 x 384 takes 52 us, 128 x 384 x 384 45. With 4096 rows three calls are faster:
their results need no new memory.
"""
_PART = "int8_inductor_part"
"""Key of a node's meta: its linear, where a neighbour's lowering has computed that."""


def _lower_neighbours(node: torch.fx.Node, a: Any, kernel: _Kernel) -> None:
    """Lower `node` and its neighbours as one call, and note the columns of each, if it has any and they are worth that."""
    rows = a.get_size()[0]
    if not isinstance(rows, (int, sympy.Integer)) or rows > FEW_ROWS or not kernel.store.dtype.is_floating_point:
        return
    neighbours = _neighbours(node, kernel)
    if len(neighbours) < 2:
        return
    box, first = _call(a, _side_by_side([each.linear for each in neighbours.values()]), kernel.store), 0
    for each, one in neighbours.items():
        last = first + one.linear.weight.shape[0]
        each.meta[_PART] = Prepacked(lowerings[torch.ops.aten.slice](box, 1, first, last), kernel.reached, len(neighbours))
        first = last


def prepacked_linear(node: torch.fx.Node, a: Any) -> Prepacked | None:
    """What oneDNN computes of the scaled_mm `node`, whose activation lowers to the box `a`; None where its weight is no constant of a frozen graph,
    or this CPU has no exact kernel.
    """
    if not inductor_config.freezing or V.graph.cpp_wrapper or a.get_device().type != "cpu" or not is_exact_and_fast():
        return None
    if _PART not in node.meta and (kernel := _kernel(node)) is not None:
        _lower_neighbours(node, a, kernel)
        if _PART not in node.meta:
            return Prepacked(_call(a, kernel.linear, kernel.store), kernel.reached)
    part: Prepacked | None = node.meta.get(_PART)
    return part
