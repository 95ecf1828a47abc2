"""One quant for one value: identical quantizations of the same value (Q, K and V of one input, say) are computed once.

Each Int8Linear quantizes its own input, so the graph holds as many copies of that arithmetic as linears read the value. Its nodes that have the
same target and arguments are merged.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from .base import aten, prims
from .dialects import find_quant

__all__ = ["merge_quants"]

_CHEAP = {
    *(aten.amax.default, aten.amin.default, aten.aminmax.default, aten.min.dim, aten.max.dim, aten.full.default, aten.scalar_tensor.default),
    *(aten.view.default, aten.reshape.default, aten.permute.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dims),
    *(aten.clone.default, prims.convert_element_type.default, operator.getitem),
}
"""What quants and their scales are computed with, beside pointwise operators. Nothing dear: a merge makes the first result live longer."""


def _is_cheap(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in _CHEAP:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target.name().startswith(("quantized_decomposed::quantize", "quantized_decomposed::choose_qparams")):
        return True
    tags = node.target.tags
    return node.target.namespace == "aten" and torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _leads_to_quants(graph: Graph) -> set[Node]:
    """The cheap nodes that some quant is computed from, quants included."""
    found: set[Node] = set()
    pending = [node for node in graph.nodes if find_quant(node) is not None]
    while pending:
        node = pending.pop()
        if node not in found and _is_cheap(node):
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def _key(node: Node) -> Any:
    flat, spec = torch.utils._pytree.tree_flatten((node.args, node.kwargs))
    # By type, as 1, 1.0 and True are equal; and floats by what they print, as NaN is not equal to itself, and 0.0 equals -0.0.
    return node.target, tuple((type(value), repr(value) if isinstance(value, float) else value) for value in flat), spec


def merge_quants(graph: Graph) -> None:
    """Merge identical cheap nodes that lead to quants."""
    candidates = _leads_to_quants(graph)
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node not in candidates:
            continue
        first = seen.setdefault(_key(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
