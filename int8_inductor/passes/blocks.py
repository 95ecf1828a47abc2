"""Scales in blocks: which scale belongs to which element of a dequantized operand, read off the views between the two.

A graph has a scale [M, K / 128] either repeated to its value's size (unsqueeze, expand, reshape, slice), or broadcast against a view of the value in
blocks that a later view undoes. Both are followed from the scale forward, dimension by dimension, to the operand of the linear.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from .base import VIEWS, Path, argument, aten, same, val
from .dialects import Dequant
from .dialects.types import is_symbolic

__all__ = ["Axis", "Repeated", "follow"]


@dataclass(frozen=True)
class Axis:
    """What an index i of a dimension says about the scale: it is the one at i // repeat along `dims`, adjacent dimensions taken as one; ()
    where all share one.
    """

    dims: tuple[int, ...]
    repeat: Any


@dataclass(frozen=True)
class Repeated:
    """A scale, and for each dimension of the operand that it is repeated to what that dimension says about it."""

    scale: Node
    axes: tuple[Axis, ...]

    def extent(self, axis: int) -> Any:
        """How many scales there are along a dimension of the operand."""
        extent: Any = 1
        for dim in self.axes[axis].dims:
            extent = extent * val(self.scale).shape[dim]
        return extent


Axes = list[Axis]


def follow(dequant: Dequant, path: Path) -> Repeated | None:
    """The scale of `dequant`, from as far back as it can be followed, to the operand that `path` makes of its value; None: nothing is repeated."""
    if not isinstance(dequant.scale, Node) or dequant.axis is not None or is_symbolic(dequant.scale):
        return None
    found = None
    for chain in _chains(dequant.scale):
        axes = _along(_start(chain[0]), chain)
        axes = None if axes is None else _broadcast(axes, dequant)
        axes = None if axes is None else _along(axes, [dequant.q, *path.shapes_only()])
        if axes is not None:
            found = Repeated(chain[0], tuple(axes))
    return found


_MOVES = (*VIEWS, aten.expand.default, aten.unsqueeze.default, aten.clone.default, aten.slice.Tensor, aten.permute.default)


def _chains(scale: Node) -> list[list[Node]]:
    """The paths to `scale` over ops that move data about, the shortest first: each begins one op further back."""
    chain = [scale]
    chains = [list(chain)]
    while chain[0].target in _MOVES and isinstance(chain[0].args[0], Node):
        chain.insert(0, chain[0].args[0])
        chains.append(list(chain))
    return chains


def _along(axes: Axes, nodes: list[Node]) -> Axes | None:
    """The axes of the first of `nodes`, followed to the last."""
    for source, node in itertools.pairwise(nodes):
        moved = _step(axes, source, node)
        if moved is None:
            return None
        axes = moved
    return axes


def _start(scale: Node) -> Axes:
    return [Axis((dim,), 1) for dim in range(val(scale).ndim)]


def _broadcast(axes: Axes, dequant: Dequant) -> Axes | None:
    """The axes of a scale as it broadcasts against the quantized value."""
    assert isinstance(dequant.scale, Node)
    return _expanded(axes, val(dequant.scale).shape, val(dequant.q).shape)


def _expanded(axes: Axes, before: Sequence[Any], after: Sequence[Any]) -> Axes | None:
    if len(before) > len(after):
        return None
    lacking = len(after) - len(before)
    result = [Axis((), size) for size in after[:lacking]]
    for axis, old, new in zip(axes, before, after[lacking:], strict=True):
        if same(old, new):
            result.append(axis)
        elif same(old, 1):
            result.append(Axis(axis.dims, new))  # one scale: it is at i // new = 0
        else:
            return None
    return result


def _step(axes: Axes, source: Node, node: Node) -> Axes | None:
    """The axes after one op that moves data about; None where they cannot be said."""
    before, after = val(source).shape, val(node).shape
    if node.target is aten.clone.default:
        return axes
    if node.target is aten.unsqueeze.default:
        dim = argument(node, "dim") % len(after)
        return [*axes[:dim], Axis((), 1), *axes[dim:]]
    if node.target is aten.permute.default:
        return [axes[dim] for dim in argument(node, "dims")]
    if node.target is aten.expand.default:
        return _expanded(axes, before, after)
    if node.target is aten.slice.Tensor:
        # What is cut is repetitions, not scales: readers check that there are as many scales as blocks.
        repeated = not same(axes[argument(node, "dim") % len(after)].repeat, 1)
        return axes if repeated and argument(node, "start") in (None, 0) and argument(node, "step") == 1 else None
    return _viewed(axes, before, after) if node.target in VIEWS else None


def _viewed(axes: Axes, before: Sequence[Any], after: Sequence[Any]) -> Axes | None:
    """The axes after a view that keeps dimensions, merges adjacent ones, or adds and drops ones of size 1."""
    result, at = [], 0
    for size in after:
        while at < len(before) and same(before[at], 1) and not same(size, 1):
            at += 1
        if same(size, 1) and not (at < len(before) and same(before[at], 1)):
            result.append(Axis((), 1))
            continue
        if at == len(before):
            return None
        merged, product = axes[at], before[at]
        at += 1
        while not same(product, size):
            if at == len(before):
                return None
            both = _merged(merged, axes[at], before[at])
            if both is None:
                return None
            merged, product = both, product * before[at]
            at += 1
        result.append(merged)
    return result if all(same(size, 1) for size in before[at:]) else None


def _merged(outer: Axis, inner: Axis, size: Any) -> Axis | None:
    """Two adjacent dimensions as one: `inner` runs faster and has `size` elements."""
    if same(size, 1):
        return outer
    if not inner.dims:
        return Axis(outer.dims, outer.repeat * size)
    ordered = outer.dims and outer.dims[-1] < inner.dims[0] and same(outer.repeat, 1)
    return Axis((*outer.dims, *inner.dims), inner.repeat) if ordered else None
