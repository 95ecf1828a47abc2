"""A residual sum in oneDNN's kernel, which adds its result to a matrix in place.

    x + scaled_mm(a, b, ...).reshape(...)  ->  onednn.qlinear_pointwise.binary(a, packed b, x, ..., "sum")

What reads the sum, a norm most often, then reads one tensor instead of two. x must be float32 that this graph has computed and nothing reads later.
The sum's node comes after the product's: it is given its value while the product is lowered, and Inductor's interpreter, which skips a node whose
value is known, does not lower it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import V
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from .constants import VIEWS

__all__ = ["Residual", "residual_of"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Residual:
    """The node of a sum of a product and of another value, whose box is `matrix` [M, N]."""

    node: Node
    matrix: Any

    def settle(self, total: Any) -> None:
        """The box [M, N] of the sum is known."""
        V.graph.env[self.node] = lowerings[aten.reshape](total, list(self.node.meta["val"].shape))


def residual_of(product: Node) -> Residual | None:
    """The sum that alone reads a product, where its other term may be overwritten, or None."""
    found = _sum_of(product)
    if found is None:
        return None
    node, other = found
    box = V.graph.env.get(other)
    if not isinstance(box, ir.TensorBox):
        return None
    data = _data(box)
    if (isinstance(data, ir.Buffer) and _is_given(data.get_name())) or _is_read_later(data, product, node):
        return None
    matrix = lowerings[aten.reshape](box, list(product.meta["val"].shape))
    matrix.realize()
    return Residual(node, matrix)


def _sum_of(product: Node) -> tuple[Node, Node] | None:
    """The addition and its other term."""
    value = product
    while len(value.users) == 1 and (user := next(iter(value.users))).target in VIEWS:
        value = user
    if len(value.users) != 1:
        return None
    node = next(iter(value.users))
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1 or _is_kept(node):
        return None
    terms = [each for each in node.args if each is not value]
    if len(terms) != 1 or not isinstance(terms[0], Node):
        return None
    vals = [each.meta["val"] for each in (value, terms[0], node)]
    same = all(isinstance(val, torch.Tensor) and val.dtype == torch.float32 and val.shape == vals[0].shape for val in vals)
    return (node, terms[0]) if same and all(val.is_contiguous() for val in vals) else None


def _is_kept(node: Node) -> bool:
    """Whether a value, or a view of it, is returned or written into another tensor: Inductor asks something of such a value's memory."""
    for user in node.users:
        if user.op == "output" or (isinstance(user.target, torch._ops.OpOverload) and user.target._schema.is_mutable):
            return True
        if user.target in VIEWS and _is_kept(user):
            return True
    return False


def _is_given(name: str) -> bool:
    """Whether a buffer is an input or a constant of the graph."""
    return name in V.graph.graph_inputs or name in V.graph.constants


def _data(box: ir.TensorBox) -> ir.IRNode:
    """What a box or a view is of: a buffer, or the computation that will fill one."""
    data: Any = box.data
    while isinstance(data, (ir.BaseView, ir.MutableBox)):
        data = data.data
    return data  # type: ignore[no-any-return]


def _touches(data: ir.IRNode, buffer: ir.IRNode) -> bool:
    """Whether `data` is that buffer, which may have to be filled yet, or a computation that will read it."""
    if data is buffer or not isinstance(buffer, ir.Buffer):
        return data is buffer
    return data.get_name() == buffer.get_name() if isinstance(data, ir.Buffer) else buffer.get_name() in data.get_read_names()


def _is_read_later(buffer: ir.IRNode, product: Node, total: Node) -> bool:
    """Whether anything but the sum, after the product, reads a value that is in that buffer or will be computed from it."""
    for node, value in V.graph.env.items():
        if any(user is not total and product < user for user in node.users):
            boxes = (each for each in tree_leaves(value) if isinstance(each, ir.TensorBox))
            if any(_touches(_data(each), buffer) for each in boxes):
                return True
    return False
