"""From a dequant to operands: scales and zero points as the vectors that operators take, or a reason why they cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from ..products.scaled_mm import ZERO_POINT_DTYPES
from .base import Declined, Path, aten, make, prims, same, val
from .dialects import Dequant, Value, varying_dims

__all__ = ["Factor", "activation_factors", "check_sizes", "read_factor", "weight_factors"]


@dataclass(frozen=True)
class Factor:
    """A scale or zero point: its value, whether it is per row (else per tensor), and whether the value is the inverse of the scale.

    axis: the dimension of the quantized value, which has `ndim` of them, along which a value of one dimension lies; None: it broadcasts against it.
    """

    value: Value
    per_row: bool
    inverse: bool = False
    axis: int | None = None
    ndim: int = 2

    def emit(self, graph: Graph, like: Node, dtype: torch.dtype | None, path: Path | None = None) -> Node:
        """A tensor for it: [1], or [rows, 1] for a per-row one, whose rows `path` moves about as it does the quantized value's.

        dtype: what to cast to; None: an integer dtype that the operator takes.
        """
        if not isinstance(self.value, Node):
            number = 1.0 / self.value if self.inverse else self.value
            return make(graph, like, aten.full.default, [1], number, dtype=dtype or torch.int32, device=val(like).device)
        node = self.value
        if dtype is None:
            dtype = val(node).dtype if val(node).dtype in ZERO_POINT_DTYPES else torch.int32
        if val(node).dtype != dtype:
            node = make(graph, like, prims.convert_element_type.default, node, dtype)
        if self.inverse:
            node = make(graph, like, aten.reciprocal.default, node)
        if not self.per_row:
            return node if list(val(node).shape) == [1] else make(graph, like, aten.reshape.default, node, [1])
        if path is not None:
            node = path.replay(graph, self._aligned(graph, like, node), width=1)
        return node if val(node).ndim == 2 else make(graph, like, aten.reshape.default, node, [-1, 1])

    def _aligned(self, graph: Graph, like: Node, node: Node) -> Node:
        """`node` with as many dimensions as the quantized value has."""
        if self.axis is not None:
            for _ in range(self.ndim - 1 - self.axis):
                node = make(graph, like, aten.unsqueeze.default, node, -1)
        while val(node).ndim < self.ndim:
            node = make(graph, like, aten.unsqueeze.default, node, 0)
        return node


def read_factor(value: Value, axis: int | None, target: Node, rows: set[int], what: str, inverse: bool = False) -> Factor:
    """A Factor that varies along all of the dimensions `rows` of `target`, or along none; Declined otherwise."""
    if isinstance(value, Node):
        if val(value).device != val(target).device:
            raise Declined(f"the {what} is on {val(value).device} and the value on {val(target).device}")
        varying = varying_dims(value, axis, target)
    else:
        varying = set()
    if not varying:
        return Factor(value, False, inverse)
    long = {dim for dim in rows if not same(val(target).shape[dim], 1)}
    if varying != long:
        raise Declined(f"the {what} varies along dimensions {sorted(varying)} of {list(val(target).shape)}, not along {sorted(rows)}")
    return Factor(value, True, inverse, axis, val(target).ndim)


def activation_factors(dequant: Dequant, path: Path) -> tuple[Factor, Factor | None]:
    """Scale and zero point of a left operand: per tensor, or per row of everything but the last dimension."""
    rows = set(range(val(dequant.q).ndim - 1))
    scale = read_factor(dequant.scale, dequant.axis, dequant.q, rows, "activation's scale", dequant.inverse)
    zero_point = None
    if dequant.zero_point is not None:
        zero_point = read_factor(dequant.zero_point, dequant.axis, dequant.q, rows, "activation's zero point")
    if not path.keeps_last:
        raise Declined("the activation's rows are rearranged between the dequant and the linear")
    return scale, zero_point


def weight_factors(dequant: Dequant, path: Path) -> tuple[Factor, Factor | None, bool]:
    """Scale and zero point of a right operand [K, N], and whether it is the transpose of the int8 weight (which is then [N, K])."""
    if val(dequant.q).ndim != 2:
        raise Declined(f"the weight has {val(dequant.q).ndim} dimensions")
    transposed = False
    for node in path.shapes_only():
        dims: Any = node.args[1]
        if node.target is aten.permute.default:
            transposed ^= [d % 2 for d in dims] == [1, 0]
        else:
            raise Declined(f"the weight is reshaped by {node.name} between the dequant and the linear")
    rows = {0} if transposed else {1}
    scale = read_factor(dequant.scale, dequant.axis, dequant.q, rows, "weight's scale", dequant.inverse)
    if dequant.zero_point is None:
        return scale, None, transposed
    zero_point = read_factor(dequant.zero_point, dequant.axis, dequant.q, rows, "weight's zero point")
    if dequant.axis is None or not isinstance(zero_point.value, Node):
        raise Declined("the weight has a zero point")
    return scale, zero_point, transposed


def check_sizes(a: Node, b: Node, limit: int | None) -> None:
    """Declined where a product of a [..., K] and b [K, N] is empty, or K is unknown or beyond `limit`, where int32 could overflow (None: never)."""
    *rows, k = val(a).shape
    for name, sizes in (("M", rows), ("N", val(b).shape[-1:]), ("K", [k])):
        if any(same(size, 0) for size in sizes):
            raise Declined(f"{name} is 0")
    if not isinstance(k, int):
        raise Declined("K is symbolic")
    if limit is not None and k > limit:
        raise Declined(f"K is {k}: beyond {limit} int32 could overflow")
