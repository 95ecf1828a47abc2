"""Experts: products grouped by expert, and layers of experts that a graph has as our operator already.

    _grouped_mm(dequantize(a), dequantize(b).transpose(1, 2), offs)  ->  scaled_grouped_mm(a, b, a_scale, b_scale, offs, out_dtype=...)
    moe_experts(...)                                                 ->  moe_experts(..., kernel_preference=...), and named in the report

a [S, K], its rows sorted by expert, with a scale per row or one for all; b [E, N, K] with a scale per row [E, N] or one for all; float casts between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from .. import reference
from ..experts import ops
from ..explain import LEFT, REWRITTEN, TAG
from .base import Declined, argument, aten, emit, float_linear, make, same, val
from .context import current
from .linear import needs_gradient, operand
from .operands import Factor, activation_factors, read_factor
from .schemes import Operand

__all__ = ["note_experts", "rewrite_grouped"]


def note_experts(graph: Graph) -> None:
    """Enter the layers of experts in the ledger, and hand them the kernel preference in force where they have none."""
    for node in graph.find_nodes(op="call_function", target=ops.moe_experts):
        current().check_kernel(val(node).device)
        if node.kwargs.get("kernel_preference", "auto") == "auto":
            node.kwargs = {**node.kwargs, "kernel_preference": current().preference.value}
        node.meta[TAG] = node.name
        current().ledger.linear(node, REWRITTEN)


def _check_dequant(side: str, found: Operand, other: str) -> None:
    if found.dequant is None:
        raise Declined(f"its {other} is dequantized from int8 and its {side} is not")
    if found.dequant.problem:
        raise Declined(f"{found.dequant.node.name} is no dequantize that is matched: {found.dequant.problem}")


def _weight_scale(right: Operand) -> Factor:
    """The scale of experts b [E, N, K], of which the product takes the transpose of each."""
    dequant = right.dequant
    assert dequant is not None
    q = dequant.q
    if val(q).ndim != 3:
        raise Declined(f"the experts have {val(q).ndim} dimensions, not 3")
    transposed = False
    for node in right.path.shapes_only():
        dims: Any = node.args[1]
        if node.target is not aten.permute.default or [d % 3 for d in dims] not in ([0, 1, 2], [0, 2, 1]):
            raise Declined(f"the experts are rearranged by {node.name} between the dequant and the product")
        transposed ^= dims[1] % 3 == 2
    if not transposed or not val(q).is_contiguous():
        raise Declined("the int8 experts are not contiguous as [E, N, K]")
    if dequant.zero_point is not None:
        raise Declined("the experts have a zero point")
    return read_factor(dequant.scale, dequant.axis, q, {0, 1}, "experts' scale", dequant.inverse)


def _columns(graph: Graph, like: Node, scale: Factor, experts: Node) -> Node:
    """The scale of experts [E, N, K] as [E, N]."""
    node = scale.emit(graph, like, torch.float32)
    sizes = list(val(experts).shape[:2])
    if scale.per_row:
        return make(graph, like, aten.reshape.default, node, sizes)
    return make(graph, like, aten.expand.default, make(graph, like, aten.reshape.default, node, [1, 1]), sizes)


def _rewrite(node: Node, left: Operand, right: Operand, offs: Any, bias: Any) -> Node:
    """scaled_grouped_mm for a grouped product. Declined, before the graph is touched, where that is not what it is."""
    _check_dequant("activation", left, "weight")
    _check_dequant("weight", right, "activation")
    a, b = left.dequant, right.dequant
    assert a is not None
    assert b is not None
    if not isinstance(offs, Node) or val(left.node).ndim != 2 or val(right.node).ndim != 3 or bias is not None:
        raise Declined("a grouped product other than of rows [S, K] by experts [E, K, N] with offsets and no bias")
    a_scale, a_zero = activation_factors(a, left.path)
    if a_zero is not None:
        raise Declined("the activation has a zero point")
    b_scale = _weight_scale(right)
    k = val(b.q).shape[2]
    if not isinstance(k, int) or k > reference.MAX_K:
        raise Declined(f"K is {k}: beyond {reference.MAX_K} int32 could overflow")
    if any(same(size, 0) for size in val(b.q).shape):
        raise Declined(f"the experts have shape {list(val(b.q).shape)}")
    if val(node).dtype not in reference.OUT_DTYPES or val(offs).dtype != torch.int32:
        raise Declined(f"its output is {val(node).dtype} and its offsets are {val(offs).dtype}")
    graph = node.graph
    if needs_gradient(graph, [b.q, *([b_scale.value] if isinstance(b_scale.value, Node) else [])]):
        raise Declined("this training graph needs the weight's gradient")
    current().check_kernel(val(node).device)
    with graph.inserting_before(node):
        scale = a_scale.emit(graph, node, torch.float32, left.path)
        arguments = {
            "a": left.path.replay(graph, a.q),
            "b": b.q,
            "a_scale": make(graph, node, aten.reshape.default, scale, [-1, 1]),
            "b_scale": _columns(graph, node, b_scale, b.q),
            "offs": offs,
            "out_dtype": val(node).dtype,
            "kernel_preference": current().preference.value,
        }
        return emit(graph, node, node.name, ops.scaled_grouped_mm, arguments)


def rewrite_grouped(graph: Graph) -> None:
    """Grouped products of dequantized operands -> scaled_grouped_mm."""
    ledger = current().ledger
    for node in graph.find_nodes(op="call_function", target=aten._grouped_mm.default):
        a, b, offs, bias = (argument(node, name) for name in ("self", "mat2", "offs", "bias"))
        left, right = operand(a), operand(b)
        if left.dequant is None and right.dequant is None:
            float_linear(ledger, node)
            continue
        try:
            replacement = _rewrite(node, left, right, offs, bias)
        except Declined as reason:
            ledger.linear(node, LEFT, str(reason))
            continue
        ledger.linear(node, REWRITTEN)
        node.replace_all_uses_with(replacement)
