"""Weights dequantized from int8 or int4, beside an activation in floats or, for int4, in int8.

mm(x, (b * scale).T)                                         ->  weight_int8_mm(x, b, scale)                      W8A16, per tensor or per row
mm(x, view(view(b, [N, K / g, g]) * scale, [N, K]).T)        ->  weight_int8_group_mm(x, b, scale, g)             W8A16, in groups
mm(x, view(view(unpack(p), ...) * scale, ...).T)             ->  weight_int4_mm(x, p, scale, g)                   W4A16
mm(a * a_scale, view(view(unpack(p), ...) * scale, ...).T)   ->  int8_int4_mm(a, p, a_scale, scale, g)            W4A8, a_scale per tensor or per row
mm(view(view(a, ...) * a_scale, ...), ...)                   ->  int8_int4_group_mm(a, p, a_scale, scale, g)      W4A8, a_scale per row and group

`unpack` is what passes/unpack.py finds. An activation that is widened to float32 goes in as what it is widened from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from ...int4 import GROUP_SIZES, OFFSET
from ...products.int8_int4 import INT8_INT4_GROUP_MM, INT8_INT4_MM
from ...products.weight_only import WEIGHT_INT4_MM, WEIGHT_INT8_GROUP_MM, WEIGHT_INT8_MM
from ..base import VIEWS, Declined, Path, aten, is_float_cast, keeps_last, make, prims, same, same_shape, val
from ..dialects import Dequant
from ..operands import Factor, activation_factors, check_sizes, weight_factors
from ..unpack import unpacked
from .types import Operand, Reading, Scheme

__all__ = ["INT4", "WEIGHT_ONLY"]

ANY_K = 2**31 - 1
"""Products that are summed in float32, group by group, have no limit of K."""


@dataclass(frozen=True)
class _Groups:
    """A quantized matrix [rows, K] with a scale for each group along K, or its inverse, and how many values share one. last: the scale's dimension of
    groups.
    """

    scale: Node
    inverse: bool
    size: int
    last: int = -2

    def emit(self, graph: Graph, like: Node) -> Node:
        """The scales as [rows, K / size], float32."""
        node = self.scale
        if val(node).dtype != torch.float32:
            node = make(graph, like, prims.convert_element_type.default, node, torch.float32)
        if self.inverse:
            node = make(graph, like, aten.reciprocal.default, node)
        return make(graph, like, aten.reshape.default, node, [-1, val(node).shape[self.last]])


def _check(dequant: Dequant) -> None:
    if dequant.problem:
        raise Declined(f"{dequant.node.name} is no dequantize that is matched: {dequant.problem}")


def _zero_point(dequant: Dequant) -> int | None:
    """The zero point, where it is known to be one number for all."""
    if dequant.zero_point is None:
        return 0
    return int(dequant.zero_point) if isinstance(dequant.zero_point, (int, float)) else None


def _read_groups(dequant: Dequant, path: Path, columns: Any, what: str, end: list[Any]) -> _Groups:
    """The groups of a matrix that is dequantized as [..., K / g, g] and viewed as [..., K]. end: how the path goes on, as targets."""
    q = val(dequant.q)
    moves = path.shapes_only()
    if not moves or moves[0].target not in VIEWS or [node.target for node in moves[1:]] != end:
        raise Declined(f"the {what} in groups is moved about between the dequant and the linear")
    size, count = q.shape[-1], q.shape[-2]
    if not (isinstance(size, int) and isinstance(count, int)) or not same(val(moves[0]).shape[-1], columns) or not same(size * count, columns):
        raise Declined(f"the {what}'s groups {list(q.shape)} are not groups along its rows")
    if size not in GROUP_SIZES:
        raise Declined(f"the {what} is in groups of {size}, not of {', '.join(map(str, GROUP_SIZES))}")
    scale = dequant.scale
    if dequant.axis is not None or not isinstance(scale, Node) or not same_shape(val(scale).shape, [*q.shape[:-1], 1]):
        raise Declined(f"the {what}'s scale is not one for each row and group")
    if val(scale).device != q.device:
        raise Declined(f"the {what}'s scale is on {val(scale).device} and the value on {q.device}")
    return _Groups(scale, dequant.inverse, size)


def _weight_groups(right: Operand) -> _Groups:
    assert right.dequant is not None
    dequant, moves = right.dequant, right.path.shapes_only()
    if dequant.group_size is not None:
        return _declared_groups(dequant, moves)
    if val(dequant.q).ndim != 3:
        raise Declined(f"the weight has {val(dequant.q).ndim} dimensions, not rows, groups and values")
    groups = _read_groups(dequant, right.path, val(right.node).shape[0], "weight", [aten.permute.default])
    if val(moves[0]).ndim != 2:
        raise Declined("the weight is no matrix after it is dequantized")
    return groups


def _declared_groups(dequant: Dequant, moves: list[Node]) -> _Groups:
    """The groups of a weight [N, K] whose dequant says itself how large they are."""
    q, size, scale = val(dequant.q), dequant.group_size, dequant.scale
    if [node.target for node in moves] != [aten.permute.default] or q.ndim != 2:
        raise Declined("the weight in groups is moved about between the dequant and the linear")
    if size not in GROUP_SIZES:
        raise Declined(f"the weight is in groups of {size}, not of {', '.join(map(str, GROUP_SIZES))}")
    if not isinstance(scale, Node) or not same_shape(val(scale).shape, [q.shape[0], q.shape[1] // size]) or val(scale).device != q.device:
        raise Declined("the weight's scale is not one for each row and group")
    return _Groups(scale, dequant.inverse, size, last=-1)


def _float_activation(left: Operand) -> tuple[Node, Path]:
    """What an activation is widened to float32 from, and how it is viewed after that."""
    node = left.node
    moves: list[Node] = []
    source, path = node, Path()
    while (keeps := keeps_last(node)) is not None and keeps:
        before = node.args[0]
        assert isinstance(before, Node)
        if is_float_cast(node) and val(node).dtype != torch.float32:
            break
        moves.insert(0, node)
        node = before
        if is_float_cast(moves[0]) and val(node).dtype != torch.float32:
            source, path = node, Path(list(moves))
    return source, path


def _read_float(left: Operand, right: Operand, name: str) -> tuple[Node, Path]:
    check_sizes(left.node, right.node, ANY_K)
    source, path = _float_activation(left)
    if val(source).dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Declined(f"the activation is {val(source).dtype}")
    return source, path


def read_int8(left: Operand, right: Operand) -> Reading | None:
    """Weight-only int8, per tensor, per row or in groups; None where the activation is quantized too."""
    b = right.dequant
    if left.dequant is not None or b is None or unpacked(b.q) is not None or val(b.q).dtype != torch.int8:
        return None
    _check(b)
    x, x_path = _read_float(left, right, "int8")
    if val(b.q).ndim == 3 or b.group_size is not None:
        return _int8_groups(x, x_path, right, b)
    if sum(node.target is aten.permute.default for node in right.path.nodes) % 2 == 0:
        raise Declined("the weight is [K, N] in memory, not [N, K]")  # in a training graph: an activation, or the weight of a gradient
    scale, zero_point, _ = weight_factors(b, right.path)
    if zero_point is not None:
        raise Declined("the weight has a zero point")

    def emit(graph: Graph, like: Node) -> dict[str, Any]:
        return {
            "a": x_path.replay(graph, x),
            "b": b.q,
            "b_scale": _vector(graph, like, scale),
        }

    return Reading(WEIGHT_INT8_MM, _weights(b), emit)


def _vector(graph: Graph, like: Node, scale: Factor) -> Node:
    node = scale.emit(graph, like, torch.float32)
    return make(graph, like, aten.reshape.default, node, [-1]) if scale.per_row else node


def _weights(dequant: Dequant, *more: Node) -> tuple[Node, ...]:
    return (dequant.q, *((dequant.scale,) if isinstance(dequant.scale, Node) else ()), *more)


def _int8_groups(x: Node, x_path: Path, right: Operand, b: Dequant) -> Reading:
    groups = _weight_groups(right)
    if _zero_point(b) != 0:
        raise Declined("the weight has a zero point")
    shape = [*val(right.node).shape][::-1]

    def emit(graph: Graph, like: Node) -> dict[str, Any]:
        return {
            "a": x_path.replay(graph, x),
            "b": make(graph, like, aten.reshape.default, b.q, shape),
            "b_scale": groups.emit(graph, like),
            "group_size": groups.size,
        }

    return Reading(WEIGHT_INT8_GROUP_MM, _weights(b), emit)


def read_int4(left: Operand, right: Operand) -> Reading | None:
    """int4 weights, beside floats or int8; None where the weight is no int4."""
    b = right.dequant
    if b is None or (found := unpacked(b.q)) is None:
        return None
    _check(b)
    groups = _weight_groups(right)
    zero_point = _zero_point(b)
    if zero_point is None or found.offset + zero_point != OFFSET:
        shown = "not a number" if zero_point is None else found.offset + zero_point
        raise Declined(f"the zero point of the weight's nibbles is {shown}, not {OFFSET}")
    n, k = val(right.node).shape[1], val(right.node).shape[0]

    def weight(graph: Graph, like: Node) -> dict[str, Any]:
        packed = (
            found.packed if same_shape(val(found.packed).shape, [n, k // 2]) else make(graph, like, aten.reshape.default, found.packed, [n, k // 2])
        )
        return {"b": packed, "b_scale": groups.emit(graph, like), "group_size": groups.size}

    weights = _weights(b, found.packed)
    if left.dequant is None:
        x, x_path = _read_float(left, right, "int4")
        return Reading(WEIGHT_INT4_MM, weights, lambda graph, like: {"a": x_path.replay(graph, x), **weight(graph, like)})
    return _int8_activation(left, left.dequant, right, groups, weights, weight)


def _int8_activation(left: Operand, a: Dequant, right: Operand, groups: _Groups, weights: tuple[Node, ...], weight: Any) -> Reading:
    _check(a)
    check_sizes(left.node, right.node, ANY_K)
    if a.zero_point is not None:
        raise Declined("the activation has a zero point")
    if val(a.q).dtype != torch.int8 or unpacked(a.q) is not None:
        raise Declined(f"the activation is {val(a.q).dtype}, or int4")
    if not same(val(a.q).shape[-1], val(left.node).shape[-1]):
        return _int8_activation_in_groups(left, a, groups, weights, weight)
    scale, _ = activation_factors(a, left.path)

    def emit(graph: Graph, like: Node) -> dict[str, Any]:
        a_scale = scale.emit(graph, like, torch.float32, left.path)
        return {"a": left.path.replay(graph, a.q), "a_scale": a_scale, **weight(graph, like)}

    return Reading(INT8_INT4_MM, weights, emit)


def _int8_activation_in_groups(left: Operand, a: Dequant, groups: _Groups, weights: tuple[Node, ...], weight: Any) -> Reading:
    moves = left.path.shapes_only()
    ends = [node.target for node in moves[1:]]
    if not all(target in VIEWS for target in ends):
        raise Declined("the activation in groups is moved about between the dequant and the linear")
    k = val(left.node).shape[-1]
    mine = _read_groups(a, left.path, k, "activation", ends)
    if mine.size != groups.size:
        raise Declined(f"the activation is in groups of {mine.size} and the weight in groups of {groups.size}")

    def emit(graph: Graph, like: Node) -> dict[str, Any]:
        # The leading dimensions of `a` are the result's; the scales' are only counted.
        return {"a": left.path.replay(graph, a.q), "a_scale": mine.emit(graph, like), **weight(graph, like)}

    return Reading(INT8_INT4_GROUP_MM, weights, emit)


WEIGHT_ONLY = Scheme("weight-only int8", read_int8)
INT4 = Scheme("int4", read_int4)
