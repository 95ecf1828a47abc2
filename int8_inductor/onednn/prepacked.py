"""Linears of a frozen graph on a CPU: oneDNN's linear on a weight that is packed for it when the graph is compiled.

    scaled_mm(a, b, ...)  ->  onednn.qlinear_pointwise(a, packed b, ...) and what it leaves, in Inductor's code

With `torch._inductor.config.freezing` weights and static scales are constants of the compiled graph (Inductor's own INT8 path for x86 needs it
as well). aten._int_mm, which packs nothing, takes about twice as long where the result is wide, and its sums go through memory as int32
(benchmarks/NOTES.md).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch._inductor import config as inductor_config
from torch._inductor.codecache import BypassFxGraphCache
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import V
from torch.fx import Graph, Node

from .. import ops
from . import forms
from .calls import Linear, decoded, encoded, lower_linear
from .constants import VIEWS, is_same, named
from .forms import Form
from .kernels import Kernel, Reached, kernel_of
from .residual import residual_of

__all__ = ["Prepacked", "Reached", "keep_from_cache", "prepacked_linear"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Prepacked:
    """A linear by oneDNN: its result, an Inductor box [M, N], how far that has come, how many linears the same kernel computes, and whether it is
    added to a residual, which has been given its value.
    """

    box: Any
    reached: Reached
    side_by_side: int = 1
    added: bool = False

    def __str__(self) -> str:
        others = f", {self.side_by_side} side by side" if self.side_by_side > 1 else ""
        return f"onednn.qlinear_pointwise on a prepacked weight{others}{', added to the residual' if self.added else ''}"


# The activation -------------------------------------------------------------------------------------------------------------------


@dataclass
class _Lowered:
    """What has been lowered of one graph. encoded: the box of what a node computes, in oneDNN's form. parts: linears, also of a neighbour's call."""

    encoded: dict[Node, Any] = dataclasses.field(default_factory=dict)
    parts: dict[Node, Prepacked] = dataclasses.field(default_factory=dict)


_LOWERED: weakref.WeakKeyDictionary[Any, _Lowered] = weakref.WeakKeyDictionary()
"""By Inductor's graph: its boxes are no other's, also where the same nodes are lowered again."""


def _lowered() -> _Lowered:
    return _LOWERED.setdefault(V.graph, _Lowered())


def _encoded(node: Node, box: Any, form: Form) -> Any:
    """The int8 box of `node` in oneDNN's form: what a linear has stored so, what another reader has had computed, or computed now."""
    known, source = _lowered().encoded, node
    while source not in known and source.target in VIEWS:
        assert isinstance(source.args[0], Node)
        source = source.args[0]
    if source is not node and source in known:
        return lowerings[aten.reshape](known[source], box.get_size())
    if node not in known:
        known[node] = _encoded_before(node) or encoded(box, form)
    return known[node]


def _encoded_before(node: Node) -> Any:
    """The same for a node of the same value that one of the last linears has read, or None: Q, K and V quantize one activation each for itself."""
    known = _lowered().encoded
    linears = [each for each in node.graph.find_nodes(op="call_function", target=ops.scaled_mm) if each < min(node.users)]
    read = [named(each)["a"] for each in linears[-LATELY:]]
    return next((known[each] for each in read if each in known and is_same(each, node)), None)


LATELY = 4
"""How many linears back: what they have read is still in a cache."""


# Calls ----------------------------------------------------------------------------------------------------------------------------

FEW_ROWS = 512
"""Up to so many rows linears of one activation are one call: on eight cores 128 x 1152 x 384 takes 54 us, 128 x 384 x 384 45. With 4096 rows three
calls are faster: their results need no new memory.
"""
SMALL = 2**26
"""Of fewer multiply-adds a call's own 20 us count: aten._int_mm with 128 x 384 x 384 takes 23 us, and what follows it is part of a kernel anyway.
With 512 rows it takes 56 us, and oneDNN's linear, which adds its result to the residual, 54.
"""


def _neighbours(node: Node, kernel: Kernel, form: Form) -> dict[Node, Kernel]:
    """`node` and the scaled_mm after it, as far as one call can compute them all."""
    found, nodes = {node: kernel}, node.graph.find_nodes(op="call_function", target=node.target)
    for each in nodes[nodes.index(node) + 1 :]:
        other = kernel_of(each, form) if is_same(named(node)["a"], named(each)["a"]) else None
        if other is None or not kernel.suits(other):
            break
        found[each] = other
    return found


def _side_by_side(linears: Sequence[Linear]) -> Linear:
    """Linears of one activation as one."""
    weight, weight_scale = torch.cat([each.weight for each in linears]), torch.cat([each.weight_scale for each in linears])
    bias = [each.bias for each in linears if each.bias is not None]
    return dataclasses.replace(linears[0], weight=weight, weight_scale=weight_scale, bias=torch.cat(bias) if bias else None)


def _lower_joined(a: Any, form: Form, rows: int | None, kernels: dict[Node, Kernel]) -> None:
    """Lower linears of one activation, the box a of the first, as one call, and note the columns of each."""
    (node, kernel), first = next(iter(kernels.items())), 0
    linear = _side_by_side([each.linear for each in kernels.values()])
    box = lower_linear(_encoded(named(node)["a"], a, form), form, rows, linear, kernel.store)
    for each, one in kernels.items():
        last = first + one.linear.weight.shape[0]
        _lowered().parts[each] = Prepacked(lowerings[aten.slice](box, 1, first, last), kernel.reached, len(kernels))
        first = last


def _lower_alone(a: Any, form: Form, rows: int | None, node: Node, kernel: Kernel) -> None:
    """Lower one linear, and the residual sum after it where there is one, and note what it computes."""
    x = _encoded(named(node)["a"], a, form)
    residual = residual_of(node) if kernel.may_add else None
    box = lower_linear(x, form, rows, kernel.linear, kernel.store, residual and residual.matrix)
    if residual is not None:
        residual.settle(box)
    elif not kernel.store.dtype.is_floating_point:
        _lowered().encoded[node], box = box, decoded(box, form)
    _lowered().parts[node] = Prepacked(box, kernel.reached, added=residual is not None)


def _pays(kernel: Kernel, rows: int | None, side_by_side: int) -> bool:
    """Whether a call of oneDNN's kernel is faster than aten._int_mm and what follows it."""
    computes = kernel.linear.post_op.name != "none" or side_by_side > 1
    return computes or rows is None or rows * kernel.linear.weight.numel() >= SMALL


def prepacked_linear(node: Node, a: Any, rows: int | None) -> Prepacked | None:
    """What oneDNN computes of the scaled_mm `node`, whose activation lowers to the box `a` of so many rows, where that is known.

    None where its weight is no constant of a frozen graph, this CPU has no exact kernel, or aten._int_mm is faster.
    """
    if not inductor_config.freezing or V.graph.cpp_wrapper or a.get_device().type != "cpu" or (form := forms.form()) is None:
        return None
    parts = _lowered().parts
    if node not in parts and (kernel := kernel_of(node, form)) is not None:
        few = rows is not None and rows <= FEW_ROWS and kernel.store.dtype.is_floating_point
        kernels = _neighbours(node, kernel, form) if few else {node: kernel}
        if not _pays(kernel, rows, len(kernels)):
            return None
        if len(kernels) > 1:
            _lower_joined(a, form, rows, kernels)
        else:
            _lower_alone(a, form, rows, node, kernel)
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
    devices = {named(node)["a"].meta["val"].device.type for node in products}
    if "cpu" in devices and forms.form() is not None:
        assert graph.owning_module is not None
        graph.owning_module._int8_inductor_uncached = _Uncached()  # type: ignore[assignment]
