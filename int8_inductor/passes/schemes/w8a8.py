"""W8A8: both operands dequantized from int8, with scales and zero points per tensor or per row.

mm(dequantize(a), dequantize(b).T)  ->  scaled_mm(a, b, a_scale, b_scale, a_zero_point, b_zero_point)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from ... import reference
from ...products.scaled_mm import SCALED_MM
from ..base import Declined, aten, make, val
from ..operands import Factor, activation_factors, check_sizes, weight_factors
from .types import Operand, Reading, Scheme

__all__ = ["W8A8"]


def read(left: Operand, right: Operand) -> Reading:
    """A scaled_mm, or Declined: nothing is too general for this scheme."""
    a, b, a_path = left.dequant, right.dequant, left.path
    if a is None or b is None:
        side, other = ("activation", "weight") if a is None else ("weight", "activation")
        raise Declined(f"its {other} is dequantized from int8 and its {side} is not")
    for dequant in (a, b):
        if dequant.problem:
            raise Declined(f"{dequant.node.name} is no dequantize that is matched: {dequant.problem}")
        if dequant.group_size is not None:
            raise Declined(f"{dequant.node.name} has its scales in groups")
        if val(dequant.q).dtype != torch.int8:
            raise Declined(f"{dequant.node.name} dequantizes {val(dequant.q).dtype}, not int8")
    a_scale, a_zero = activation_factors(a, a_path)
    b_scale, b_zero, transposed = weight_factors(b, right.path)
    limits = (reference.MAX_K, reference.MAX_K_ZERO_POINT, reference.MAX_K_ZERO_POINTS)
    check_sizes(left.node, right.node, limits[(a_zero is not None) + (b_zero is not None)])
    columns = {name: factor for name, factor in (("b_scale", b_scale), ("b_zero_point", b_zero)) if factor is not None}

    def emit(graph: Graph, like: Node) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "a": a_path.replay(graph, a.q),
            "b": b.q if transposed else make(graph, like, aten.permute.default, b.q, [1, 0]),
            "a_scale": a_scale.emit(graph, like, torch.float32, a_path),
            "a_zero_point": None if a_zero is None else a_zero.emit(graph, like, None, a_path),
        }
        for name, factor in columns.items():
            arguments[name] = _emit_columns(graph, like, factor, torch.float32 if name == "b_scale" else None)
        return arguments

    weights = (b.q, *(factor.value for factor in columns.values() if isinstance(factor.value, Node)))
    return Reading(SCALED_MM, weights, emit)


def _emit_columns(graph: Graph, like: Node, factor: Factor, dtype: torch.dtype | None) -> Node:
    """A weight's factor: [1], or [N] for a per-row one."""
    node = factor.emit(graph, like, dtype)
    return make(graph, like, aten.reshape.default, node, [-1]) if factor.per_row else node


W8A8 = Scheme("w8a8", read)
