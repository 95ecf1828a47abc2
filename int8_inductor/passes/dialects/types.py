"""What a dialect makes of a node: `Quant` and `Dequant`, and the numbers and nodes that they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ... import reference
from ..base import VIEWS, Declined, aten, prims, same_shape, val

Value = Node | float | int


@dataclass(frozen=True)
class Dequant:
    """node = (q - zero_point) * scale; inverse: `scale` is 1 / scale.

    axis: the dimension of q along which a scale and zero point of one dimension lie; None: they broadcast against q.
    problem: why this is not exactly that and must be left alone, or ''. group_size: how many values along the last dimension of q share a scale,
    [..., K / group_size]; None: what broadcasting says.
    """

    node: Node
    q: Node
    scale: Value
    zero_point: Value | None
    inverse: bool = False
    axis: int | None = None
    problem: str = ""
    group_size: int | None = None


@dataclass(frozen=True)
class Quant:
    """node = clamp(round(x / scale) + zero_point, quant_min, quant_max) as int8; inverse, axis and problem as in Dequant."""

    node: Node
    x: Node
    scale: Value
    zero_point: Value | None
    quant_min: float
    quant_max: float
    inverse: bool = False
    axis: int | None = None
    problem: str = ""


@dataclass(frozen=True)
class Dialect:
    """A name and two recognisers: node -> Dequant / Quant, or None when the node is not one."""

    name: str
    dequant: Callable[[Node], Dequant | None]
    quant: Callable[[Node], Quant | None]


def is_single(size: Any) -> bool:
    """Whether a size is known to be 1 without a guard."""
    return isinstance(size, int) and size == 1


def is_number(value: Any) -> bool:
    """Whether a node's argument is a Python number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_integer(value: Any) -> Value:
    """A zero point without the casts around it that keep its value: to float, or to a wider integer."""
    while isinstance(value, Node) and value.target is prims.convert_element_type.default:
        source = value.args[0]
        if not isinstance(source, Node) or val(source).is_floating_point() or val(source).dtype == torch.bool:
            break
        if not val(value).is_floating_point() and val(value).dtype.itemsize < val(source).dtype.itemsize:
            break
        value = source
    return value  # type: ignore[no-any-return]


def unexpanded(value: Value) -> Value:
    """What `value` is expanded from: it broadcasts alike."""
    while isinstance(value, Node) and value.target is aten.expand.default:
        value = value.args[0]  # type: ignore[assignment]
    return value


def constant(value: Value) -> float | int | None:
    """The number that every element of `value` is known to be, or None."""
    if not isinstance(value, Node):
        return value
    if value.target is aten.full.default and is_number(value.args[1]):
        return torch.tensor(value.args[1], dtype=val(value).dtype).item()
    if value.target is prims.convert_element_type.default or value.target in (*VIEWS, aten.expand.default, aten.unsqueeze.default):
        number = constant(value.args[0])  # type: ignore[arg-type]
        return None if number is None else torch.tensor(number, dtype=val(value).dtype).item()
    return None


def simplified(zero_point: Value | None) -> Value | None:
    """A zero point without what changes nothing about it: None when it is known to be 0, a number where it is known to be one."""
    if zero_point is None:
        return None
    zero_point = unexpanded(as_integer(zero_point))
    number = constant(zero_point)
    if number is not None:
        return None if number == 0 else number
    if isinstance(zero_point, Node) and zero_point.op == "get_attr":
        module = zero_point.graph.owning_module
        held = None if module is None else torch.fx.graph_module._get_attr(module, str(zero_point.target))
        return None if isinstance(held, torch.Tensor) and not bool(held.any()) else zero_point
    return zero_point


def is_symbolic(value: Any) -> bool:
    """Whether `value` is a node for a symbolic number, such as a size, and not for a tensor."""
    return isinstance(value, Node) and not isinstance(value.meta.get("val"), torch.Tensor)


def qparams_problem(scale: Value, zero_point: Value | None) -> str:
    """Why a scale and a zero point cannot be operands, or ''. What int8 can hold of a zero point is all that int32 sums have room for."""
    for name, value in (("scale", scale), ("zero point", zero_point)):
        if is_symbolic(value):
            return f"its {name} {value} is a symbolic number"
    if isinstance(zero_point, Node):
        return f"its zero point {zero_point.name} is {val(zero_point).dtype}, not an integer" if val(zero_point).is_floating_point() else ""
    if zero_point is not None and zero_point not in range(reference.INT8_MIN, reference.INT8_MAX + 1):
        return f"its zero point {zero_point} is not an int8 value"
    return ""


def varying_dims(value: Value, axis: int | None, target: Node) -> set[int]:
    """The dimensions of `target` along which a scale or zero point varies; Declined when its shape does not fit."""
    if not isinstance(value, Node):
        return set()
    shape, wanted = list(val(value).shape), val(target).shape
    if axis is not None:
        if not same_shape(shape, [wanted[axis]]):
            raise Declined(f"{value.name} has shape {shape}, not one value for each of {wanted[axis]} channels")
        return set() if is_single(wanted[axis]) else {axis}
    shape = [1] * (len(wanted) - len(shape)) + shape
    varying = {dim for dim, size in enumerate(shape) if not is_single(size)}
    if len(shape) > len(wanted) or not same_shape([shape[d] for d in varying], [wanted[d] for d in varying]):
        raise Declined(f"{value.name} has shape {shape}, which does not fit {list(wanted)}")
    return varying
