"""What the arguments of a node of a frozen graph are: constants, or the same as another's."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._inductor.virtualized import V
from torch.fx import Node

from .. import ops

__all__ = ["VIEWS", "frozen", "is_same", "named", "number"]

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def named(node: Node) -> dict[str, Any]:
    """The arguments of a call of one of our operators."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return ops.bound(node.target, node.args, node.kwargs)


def frozen(value: Any) -> Tensor | None:
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


def number(value: Tensor | None) -> float | None:
    """The value of a constant of one element, or None."""
    return float(value.item()) if value is not None and value.numel() == 1 else None


def is_same(x: Any, y: Any) -> bool:
    """Whether two arguments of nodes have the same value: the same node, equal constants, or the same operator on the same values. Linears of one
    activation have scales of their own, which calibration has made equal.
    """
    if not isinstance(x, Node) or not isinstance(y, Node):
        return type(x) is type(y) and bool(x == y)
    if x is y:
        return True
    one, two = frozen(x), frozen(y)
    if one is not None and two is not None:
        return one.dtype == two.dtype and torch.equal(one, two)
    pure = x.op == "call_function" and x.target is y.target and isinstance(x.target, torch._ops.OpOverload) and not x.is_impure()
    if not pure or torch.Tag.nondeterministic_seeded in x.target.tags:  # type: ignore[union-attr]
        return False
    return len(x.args) == len(y.args) and x.kwargs == y.kwargs and all(map(is_same, x.args, y.args))
