"""One quant for one value: identical quantizations of the same value (Q, K and V of one input, say) are computed once.

Each Int8Linear quantizes its own input, so the graph holds as many copies of that arithmetic as linears read the value. Nodes of pure arithmetic that
lead to an int8 cast and have the same target and arguments are merged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from .base import aten, prims
from .dialects import STEPS, find_quant

__all__ = ["merge_quants"]

_PURE = {
    *STEPS,
    *(aten.abs.default, aten.amax.default, aten.amin.default, aten.div.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.reciprocal.default),
    *(aten.lt.Scalar, aten.scalar_tensor.default, aten.full.default, aten.isnan.default, aten.rsub.Scalar),
    *(aten.view.default, aten.permute.default, aten.unsqueeze.default, aten.clone.default, prims.convert_element_type.default),
}


def _is_pure(node: Node) -> bool:
    if node.op != "call_function":
        return False
    name = node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""
    is_getitem = getattr(node.target, "__name__", "") == "getitem"
    return node.target in _PURE or is_getitem or name.startswith(("quantized_decomposed::quantize", "quantized_decomposed::choose_qparams"))


def _leads_to_quants(graph: Graph) -> set[Node]:
    """The pure nodes that some quant is computed from, quants included."""
    found: set[Node] = set()
    pending = [node for node in graph.nodes if find_quant(node) is not None]
    while pending:
        node = pending.pop()
        if node not in found and _is_pure(node):
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def _key(node: Node) -> Any:
    flat, spec = torch.utils._pytree.tree_flatten((node.args, node.kwargs))
    # The type goes in too: 1, 1.0 and True are equal.
    return node.target, tuple((type(value), value) for value in flat), spec


def merge_quants(graph: Graph) -> None:
    """Merge identical pure nodes that lead to quants."""
    candidates = _leads_to_quants(graph)
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node not in candidates:
            continue
        first = seen.setdefault(_key(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
