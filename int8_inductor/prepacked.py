"""Linears of a frozen graph on a CPU: oneDNN's linear on a weight that is packed for it when the graph is compiled.

    scaled_mm(a, b, ...)  ->  onednn.qlinear_pointwise(a + 128, packed b, ...) and what it leaves, in Inductor's code

With `torch._inductor.config.freezing` weights and static scales are constants of the compiled graph (Inductor's own INT8 path for x86 needs it
as well). A static scale of the activation then goes into oneDNN's kernel with the weight's, bias, activation and, where it provably stores what the
eager definition does, requantization; with a dynamic one the kernel gives the sums alone, as floats. aten._int_mm, which packs nothing, takes about
twice as long where the result is wide, and its sums go through memory as int32 (benchmarks/NOTES.md).
"""

from __future__ import annotations

import dataclasses
import enum
import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.codecache import BypassFxGraphCache
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import V
from torch.fx import Graph, Node

from . import onednn, ops, reference
from .epilogues import EPILOGUES
from .onednn import Linear, Store

__all__ = ["Prepacked", "Reached", "keep_from_cache", "prepacked_linear"]

aten = torch.ops.aten

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


# What is constant -----------------------------------------------------------------------------------------------------------------


def _named(node: Node) -> dict[str, Any]:
    """The arguments of a call of one of our operators."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return ops.bound(node.target, node.args, node.kwargs)


def _frozen(value: Any) -> Tensor | None:
    """What an argument of a node is: a constant of the frozen graph, or None."""
    if not isinstance(value, Node):
        return None
    if value.op == "get_attr":
        constant: Any = operator.attrgetter(str(value.target))(V.graph.module)
        return constant.detach() if isinstance(constant, Tensor) else None
    if value.target is aten.full.default and isinstance(value.args[1], (int, float)):
        fake: Tensor = value.meta["val"]
        return torch.full((1,), value.args[1], dtype=fake.dtype) if fake.numel() == 1 else None
    return None


def _number(value: Tensor | None) -> float | None:
    """The value of a constant of one element, or None."""
    return float(value.item()) if value is not None and value.numel() == 1 else None


def _static(weight: Tensor, named: dict[str, Any]) -> Linear | None:
    """The linear of a product whose scales and bias are all constants that oneDNN's kernel takes, or None."""
    rows, post_op = weight.shape[0], EPILOGUES[named["activation"]].onednn
    scale, weight_scale = _number(_frozen(named["a_scale"])), _frozen(named["b_scale"])
    if scale is None or weight_scale is None or post_op is None:
        return None
    zero_point = 0.0 if named["a_zero_point"] is None else _number(_frozen(named["a_zero_point"]))
    bias = torch.zeros(rows) if named["bias"] is None else _frozen(named["bias"])
    if zero_point is None or bias is None:
        return None
    weight_scale, bias = weight_scale.reshape(-1).float().expand(rows).contiguous(), bias.reshape(-1).float().contiguous()
    products = weight_scale * scale
    if not bool(((products >= SMALLEST) & (products <= LARGEST)).all() and bias.isfinite().all()):
        return None
    return Linear(weight, weight_scale, scale, int(zero_point), bias, post_op)


def _store(linear: Linear, named: dict[str, Any]) -> Store | None:
    """How the kernel stores what the eager definition does, where it can: as float32 or bfloat16, or as 8 bits by a constant scale that is coarse
    beside the post-op's error, and where nothing would be stored below the smallest value that is allowed.
    """
    if "block_size" in named:
        return None
    if named["out_scale"] is None:
        dtype = named["out_dtype"] or torch.float32
        return Store(dtype) if dtype in (torch.float32, torch.bfloat16) else None
    scale = _number(_frozen(named["out_scale"]))
    zero_point = 0.0 if named["out_zero_point"] is None else _number(_frozen(named["out_zero_point"]))
    if scale is None or zero_point is None or not max(SMALLEST, STEPS * linear.post_op.error) <= scale <= LARGEST:
        return None
    least = linear.post_op.least / scale + zero_point
    if named["out_quant_min"] != reference.INT8_MIN and not least > reference.SYMMETRIC_MIN:
        return None
    return Store(torch.uint8, scale, int(zero_point))


@dataclass(frozen=True)
class _Kernel:
    """What one call of oneDNN's kernel computes for a linear."""

    linear: Linear
    store: Store
    reached: Reached

    def suits(self, other: _Kernel) -> bool:
        """Whether one call can compute both, of the same activation."""
        one, two = ((each.linear.scale, each.linear.zero_point, each.linear.post_op, each.store, each.reached) for each in (self, other))
        return one == two


def _kernel(node: Node) -> _Kernel | None:
    """What oneDNN computes of the scaled_mm `node`, or None."""
    named = _named(node)
    if named["b_zero_point"] is not None or (weight := _frozen(named["b"])) is None:
        return None
    if weight.shape[1] > reference.MAX_K_ZERO_POINT:
        return None  # sums of unsigned values could overflow
    if (linear := _static(weight, named)) is not None:
        store = _store(linear, named)
        return _Kernel(linear, Store(), Reached.ACTIVATED) if store is None else _Kernel(linear, store, Reached.STORED)
    if named["a_zero_point"] is not None:
        return None  # it would be corrected in int32, which sums in float32 are not above 2^24
    return _Kernel(Linear(weight, torch.ones(weight.shape[0])), Store(), Reached.SUMS)


# The activation -------------------------------------------------------------------------------------------------------------------


@dataclass
class _Lowered:
    """What has been lowered of one graph. unsigned: the box of what a node computes, as uint8. parts: linears, also those of a neighbour's call."""

    unsigned: dict[Node, Any] = dataclasses.field(default_factory=dict)
    parts: dict[Node, Prepacked] = dataclasses.field(default_factory=dict)


_LOWERED: weakref.WeakKeyDictionary[Any, _Lowered] = weakref.WeakKeyDictionary()
"""By Inductor's graph: its boxes are no other's, also where the same nodes are lowered again."""


def _lowered() -> _Lowered:
    return _LOWERED.setdefault(V.graph, _Lowered())


def _unsigned(node: Node, box: Any) -> Any:
    """The int8 box of `node` as uint8: what a linear has stored so, what another reader has had computed, or computed now."""
    known, source = _lowered().unsigned, node
    while source not in known and source.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        assert isinstance(source.args[0], Node)
        source = source.args[0]
    if source is not node and source in known:
        return lowerings[aten.reshape](known[source], box.get_size())
    if node not in known:
        known[node] = _unsigned_before(node) or onednn.unsigned(box)
    return known[node]


def _unsigned_before(node: Node) -> Any:
    """The same for a node of the same value that one of the last linears has read, or None: Q, K and V quantize one activation each for itself."""
    known = _lowered().unsigned
    linears = [each for each in node.graph.find_nodes(op="call_function", target=ops.scaled_mm) if each < min(node.users)]
    read = [_named(each)["a"] for each in linears[-LATELY:]]
    return next((known[each] for each in read if each in known and _same(each, node)), None)


LATELY = 4
"""How many linears back: what they have read is still in a cache."""


def _same(x: Any, y: Any) -> bool:
    """Whether two arguments of nodes have the same value: the same node, equal constants, or the same operator on the same values. Linears of one
    activation have scales of their own, which calibration has made equal.
    """
    if not isinstance(x, Node) or not isinstance(y, Node):
        return type(x) is type(y) and bool(x == y)
    if x is y:
        return True
    one, two = _frozen(x), _frozen(y)
    if one is not None and two is not None:
        return one.dtype == two.dtype and torch.equal(one, two)
    pure = x.op == "call_function" and x.target is y.target and isinstance(x.target, torch._ops.OpOverload) and not x.is_impure()
    if not pure or torch.Tag.nondeterministic_seeded in x.target.tags:  # type: ignore[union-attr]
        return False
    return len(x.args) == len(y.args) and x.kwargs == y.kwargs and all(map(_same, x.args, y.args))


# Calls ----------------------------------------------------------------------------------------------------------------------------

FEW_ROWS = 512
"""Up to so many rows linears of one activation are one call: on eight cores 128 x 1152 x 384 takes 54 us, 128 x 384 x 384 45. With 4096 rows three
calls are faster: their results need no new memory.
"""
SMALL = 2**27
"""Of fewer multiply-adds a call's own 20 us count: aten._int_mm with 128 x 384 x 384 takes 23 us, and what follows it is part of a kernel anyway."""


def _neighbours(node: Node, kernel: _Kernel) -> dict[Node, _Kernel]:
    """`node` and the scaled_mm after it, as far as one call can compute them all."""
    found, nodes = {node: kernel}, node.graph.find_nodes(op="call_function", target=node.target)
    for each in nodes[nodes.index(node) + 1 :]:
        other = _kernel(each) if _same(_named(node)["a"], _named(each)["a"]) else None
        if other is None or not kernel.suits(other):
            break
        found[each] = other
    return found


def _side_by_side(linears: Sequence[Linear]) -> Linear:
    """Linears of one activation as one."""
    weight, weight_scale = torch.cat([each.weight for each in linears]), torch.cat([each.weight_scale for each in linears])
    bias = [each.bias for each in linears if each.bias is not None]
    return dataclasses.replace(linears[0], weight=weight, weight_scale=weight_scale, bias=torch.cat(bias) if bias else None)


def _lower(a: Any, rows: int | None, kernels: dict[Node, _Kernel]) -> None:
    """Lower linears of one activation, the box a of the first, as one call, and note the columns of each."""
    (node, kernel), first = next(iter(kernels.items())), 0
    linear = _side_by_side([each.linear for each in kernels.values()])
    box = onednn.lower_linear(_unsigned(_named(node)["a"], a), rows, linear, kernel.store)
    for each, one in kernels.items():
        last = first + one.linear.weight.shape[0]
        part = box if len(kernels) == 1 else lowerings[aten.slice](box, 1, first, last)
        if kernel.store.dtype == torch.uint8:
            _lowered().unsigned[each], part = part, onednn.signed(part)
        _lowered().parts[each] = Prepacked(part, kernel.reached, len(kernels))
        first = last


def _pays(kernel: _Kernel, rows: int | None, side_by_side: int) -> bool:
    """Whether a call of oneDNN's kernel is faster than aten._int_mm and what follows it."""
    computes = kernel.linear.post_op.name != "none" or side_by_side > 1
    return computes or rows is None or rows * kernel.linear.weight.numel() >= SMALL


def prepacked_linear(node: Node, a: Any, rows: int | None) -> Prepacked | None:
    """What oneDNN computes of the scaled_mm `node`, whose activation lowers to the box `a` of so many rows, where that is known.

    None where its weight is no constant of a frozen graph, this CPU has no exact kernel, or aten._int_mm is faster.
    """
    if not inductor_config.freezing or V.graph.cpp_wrapper or a.get_device().type != "cpu" or not onednn.is_exact_and_fast():
        return None
    parts = _lowered().parts
    if node not in parts and (kernel := _kernel(node)) is not None:
        few = rows is not None and rows <= FEW_ROWS and kernel.store.dtype.is_floating_point
        kernels = _neighbours(node, kernel) if few else {node: kernel}
        if _pays(kernel, rows, len(kernels)):
            _lower(a, rows, kernels)
    return parts.get(node)


class _Uncached:
    """What a graph module holds to be kept out of Inductor's cache on disk: whoever hashes it is told to do without."""

    def __deepcopy__(self, memo: Any) -> _Uncached:
        return self

    def __reduce__(self) -> NoReturn:
        raise BypassFxGraphCache("weights packed by oneDNN cannot be written")


def keep_from_cache(graph: Graph) -> None:
    """Have Inductor keep a joint graph whose weights will be packed out of its cache on disk, as it does with its own packed weights: they cannot be
    written, and what is made of the constants' values here is no part of the cache's key.
    """
    if not inductor_config.freezing:
        return
    products = (node for node in graph.nodes if node.target in (ops.scaled_mm, ops.scaled_mm_block_quant))
    devices = {_named(node)["a"].meta["val"].device.type for node in products}
    if "cpu" in devices and onednn.is_exact_and_fast():
        assert graph.owning_module is not None
        graph.owning_module._int8_inductor_uncached = _Uncached()  # type: ignore[assignment]
