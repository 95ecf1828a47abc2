"""The unpacking of int4 weights, as a graph has it: two nibbles a byte, low nibble first, stacked along a new last dimension and viewed as rows.

    view(stack([p & 15, p >> 4], -1)) - 8     ->  p, 8

with casts to other integers, views, and the subtraction (of a number) anywhere between the nibbles and the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .base import VIEWS, aten, prims, val

__all__ = ["Unpacked", "unpacked"]

_SHIFTS = (aten.__rshift__.Scalar, aten.bitwise_right_shift.Tensor_Scalar)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NIBBLE, _BITS = 15, 4


@dataclass(frozen=True)
class Unpacked:
    """packed: uint8 [..., K / 2]. offset: what is subtracted from each nibble."""

    packed: Node
    offset: int


def unpacked(node: Any) -> Unpacked | None:
    """What `node`, integers of any shape in the order of the weight's rows, is unpacked from; None: it is not."""
    whole = _peeled(node, views=True)
    stacked = whole.node
    if stacked is None or stacked.target is not aten.cat.default:
        return None
    halves, dim = stacked.args[0], stacked.args[1] if len(stacked.args) > 1 else 0
    if not isinstance(halves, (list, tuple)) or len(halves) != 2 or dim not in (-1, val(stacked).ndim - 1):
        return None
    low, high = _half(halves[0], shifted=False), _half(halves[1], shifted=True)
    if low is None or high is None or low != high or (whole.unsigned and low.offset):
        return None
    return Unpacked(low.packed, whole.offset + low.offset)


def _half(node: Any, *, shifted: bool) -> Unpacked | None:
    """The low nibbles of a packed weight, or, `shifted`, the high ones, with a new last dimension."""
    outer = _peeled(node, views=False)
    at = outer.node
    if at is None or at.target is not aten.unsqueeze.default or at.args[1] not in (-1, val(at).ndim - 1):
        return None
    inner = _peeled(at.args[0], views=False)
    at = inner.node
    masked = at is not None and at.target is aten.bitwise_and.Scalar and at.args[1] == _NIBBLE
    bits: Any = at.args[0] if at is not None and masked and shifted else at
    wanted = bits.target in _SHIFTS and bits.args[1] == _BITS if shifted and isinstance(bits, Node) else masked
    packed: Any = bits.args[0] if wanted else None
    if not isinstance(packed, Node) or val(packed).dtype != torch.uint8 or (outer.unsigned and inner.offset):
        return None
    return Unpacked(packed, outer.offset + inner.offset)


@dataclass(frozen=True)
class _Peeled:
    """A node without casts between integers, subtractions of a number and views around it. offset: the sum of what is subtracted.
    unsigned: whether the result is a uint8 on its way, in which what is negative would be something else.
    """

    node: Node | None
    offset: int
    unsigned: bool


_NOTHING = _Peeled(None, 0, False)


def _peeled(node: Any, *, views: bool) -> _Peeled:
    offset, unsigned = 0, False
    while isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor) and val(node).dtype in _INTEGERS:
        unsigned |= val(node).dtype == torch.uint8
        if node.target is prims.convert_element_type.default or (views and node.target in VIEWS):
            node = node.args[0]
        elif node.target in (aten.sub.Tensor, aten.add.Tensor) and isinstance(node.args[1], int) and node.kwargs.get("alpha", 1) == 1:
            if unsigned:
                return _NOTHING
            offset += node.args[1] if node.target is aten.sub.Tensor else -node.args[1]
            node = node.args[0]
        else:
            return _Peeled(node, offset, unsigned)
    return _NOTHING
