"""Dialects: the ways in which graphs write quantize and dequantize. Each recognises a node and says what it means, without touching the graph.

    (q - zero_point) * scale                          plain aten: what Int8Linear writes, and people by hand
    clamp(round(x / scale) + zero_point).to(int8)     the same, to int8
    quantized_decomposed.dequantize_per_*(q, ...)     PT2E: per tensor, channel, token
    quantized_decomposed.quantize_per_*(x, ...)
torchao's quantize_affine / dequantize_affine decompose to plain aten before the joint graph, with views that do nothing: the first covers them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, KeywordArg, Match, PatternExpr
from torch.fx import Node

from .. import reference
from .base import Declined, argument, aten, is_float_cast, prims, same_shape, val

__all__ = ["DIALECTS", "Dequant", "Dialect", "Quant", "find_dequant", "find_quant"]

Value = Node | float | int


@dataclass(frozen=True)
class Dequant:
    """node = (q - zero_point) * scale. `shape`: how scale and zero point broadcast against q (None: per tensor, a number or one element)."""

    node: Node
    q: Node
    scale: Value
    zero_point: Value | None
    inverse: bool = False
    axis: int | None = None


@dataclass(frozen=True)
class Quant:
    """node = clamp(round(x / scale) + zero_point, quant_min, quant_max) as int8; inverse: `scale` is 1 / scale."""

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


def find_dequant(node: Node) -> Dequant | None:
    """The first dialect's reading of `node` as a dequantize."""
    return next((found for d in DIALECTS if (found := d.dequant(node)) is not None), None)


def find_quant(node: Node) -> Quant | None:
    """The first dialect's reading of `node` as a quantize."""
    return next((found for d in DIALECTS if (found := d.quant(node)) is not None), None)


# Plain aten arithmetic ------------------------------------------------------------------------------------------------------------


def _call(target: Any, *args: Any) -> CallFunction:
    return CallFunction(target, *args, _users=MULTIPLE)


_TO_FLOAT = _call(prims.convert_element_type.default, KeywordArg("q"), KeywordArg("dtype"))
_TO_INT = _call(prims.convert_element_type.default, KeywordArg("q"), KeywordArg("int_dtype"))
_SHIFTED = _call(aten.sub.Tensor, _TO_FLOAT, KeywordArg("zero_point"))
_SHIFTED_INT = _call(
    prims.convert_element_type.default, _call(aten.sub.Tensor, _TO_INT, KeywordArg("zero_point")), KeywordArg("dtype")
)
_STEPS = (_SHIFTED, _SHIFTED_INT, _TO_FLOAT)
DEQUANT_PATTERNS: tuple[tuple[PatternExpr, bool], ...] = tuple(
    (pattern, inverse)
    for steps in _STEPS
    for pattern, inverse in (
        (_call(aten.mul.Tensor, steps, KeywordArg("scale")), False),
        (_call(aten.mul.Tensor, KeywordArg("scale"), steps), False),
        (_call(aten.div.Tensor, steps, KeywordArg("scale")), True),
    )
)
"""Pattern -> whether the factor is the inverse of the scale."""


def _plain_dequant(node: Node) -> Dequant | None:
    if node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    for pattern, inverse in DEQUANT_PATTERNS:
        match = pattern.match(node)
        if isinstance(match, Match) and (found := _read_dequant(node, match.kwargs, inverse)) is not None:
            return found
    return None


def _read_dequant(node: Node, found: dict[str, Any], inverse: bool) -> Dequant | None:
    q = found["q"]
    if not isinstance(q, Node) or val(q).dtype != torch.int8 or found["dtype"] not in reference.OUT_DTYPES:
        return None
    wide = found.get("int_dtype", torch.int32)
    if wide not in (torch.int16, torch.int32, torch.int64):
        return None
    if not same_shape(val(node).shape, val(q).shape):
        return None  # the scale broadcasts q
    zero_point = found.get("zero_point")
    return Dequant(node, q, found["scale"], None if zero_point is None else as_integer(zero_point), inverse)


def as_integer(value: Any) -> Value:
    """A zero point without the cast to float around it."""
    while isinstance(value, Node) and value.target is prims.convert_element_type.default:
        source = value.args[0]
        if not isinstance(source, Node) or val(source).is_floating_point():
            break
        value = source
    return value  # type: ignore[no-any-return]


@dataclass
class _Chain:
    """What the walk from an int8 cast back to the quantized value has met."""

    order: list[str] = field(default_factory=list)
    low: float = float("-inf")
    high: float = float("inf")
    zero_point: Value | None = None
    scale: Value = 1.0
    inverse: bool = False


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _clamp_min(chain: _Chain, node: Node) -> Node | None:
    if not _number(node.args[1]):
        return None
    chain.low = max(chain.low, float(node.args[1]))  # type: ignore[arg-type]
    return node.args[0]  # type: ignore[return-value]


def _clamp_max(chain: _Chain, node: Node) -> Node | None:
    if not _number(node.args[1]):
        return None
    chain.high = min(chain.high, float(node.args[1]))  # type: ignore[arg-type]
    return node.args[0]  # type: ignore[return-value]


def _same_node(chain: _Chain, node: Node) -> Node | None:
    return node.args[0]  # type: ignore[return-value]


def _nan_guard(chain: _Chain, node: Node) -> Node | None:
    """where(isnan(x), 0, x)."""
    test, zero, x = node.args
    is_nan = isinstance(test, Node) and test.target is aten.isnan.default and test.args[0] is x
    is_zero = isinstance(zero, Node) and zero.target in (aten.scalar_tensor.default, aten.full.default) and 0 in zero.args
    return x if is_nan and is_zero else None  # type: ignore[return-value]


def _add_zero_point(chain: _Chain, node: Node) -> Node | None:
    x, zero_point = node.args
    if chain.zero_point is not None or node.kwargs.get("alpha", 1) != 1:
        return None
    if isinstance(zero_point, Node) and val(zero_point).ndim == val(node).ndim and isinstance(x, Node) and val(x).ndim < val(zero_point).ndim:
        x, zero_point = zero_point, x
    zero_point = as_integer(zero_point)
    if isinstance(zero_point, Node) and val(zero_point).is_floating_point():
        return None  # nothing says that it is a whole number
    if isinstance(zero_point, float) and not zero_point.is_integer():
        return None
    chain.zero_point = zero_point
    return x  # type: ignore[return-value]


STEPS: dict[Any, tuple[str, Callable[[_Chain, Node], Node | None]]] = {
    aten.clamp_min.default: ("clamp", _clamp_min),
    aten.clamp_max.default: ("clamp", _clamp_max),
    aten.round.default: ("round", _same_node),
    aten.floor.default: ("floor", _same_node),
    aten.ceil.default: ("ceil", _same_node),
    aten.trunc.default: ("trunc", _same_node),
    aten.where.self: ("nan", _nan_guard),
    aten.add.Tensor: ("zero point", _add_zero_point),
}
"""Target -> (what the step is called, how to read it: the node before it, or None when it is no such step)."""


def _read_scale(chain: _Chain, node: Node) -> Node | None:
    """The multiplication or division by the scale that a quantize starts with; None when `node` is not one."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    x, factor = node.args
    if node.target is aten.mul.Tensor and isinstance(x, Node) and isinstance(factor, Node) and val(x).numel() != val(node).numel():
        x, factor = factor, x
    if not isinstance(x, Node) or not same_shape(val(x).shape, val(node).shape):
        return None
    if isinstance(factor, Node) and same_shape(val(factor).shape, val(node).shape) and not _is_single(val(node).numel()):
        return None  # two whole tensors: arithmetic, not a scale
    chain.inverse = node.target is aten.mul.Tensor
    while isinstance(factor, Node):
        if factor.target is aten.mul.Tensor and factor.args[1] == 1.0:
            factor = factor.args[0]
        elif factor.target is aten.reciprocal.default:
            factor, chain.inverse = factor.args[0], not chain.inverse
        else:
            break
    chain.scale = factor  # type: ignore[assignment]
    return x


def _is_single(numel: Any) -> bool:
    return isinstance(numel, int) and numel == 1


def _plain_quant(node: Node) -> Quant | None:
    if node.target is not prims.convert_element_type.default or node.args[1] != torch.int8:
        return None
    chain, at = _Chain(), node.args[0]
    while isinstance(at, Node):
        before: Node | None = None
        if at.target in STEPS:
            name, read = STEPS[at.target]
            before = read(chain, at)
            chain.order.append(name)
        elif is_float_cast(at) and "scale" not in chain.order:
            before, name = at.args[0], ""  # type: ignore[assignment]
        if before is None:
            break
        at = before
    rounding = [name for name in chain.order if name in ("round", "floor", "ceil", "trunc")]
    if not isinstance(at, Node) or not rounding:
        return None
    x = _read_scale(chain, at) or at
    return Quant(node, x, chain.scale, chain.zero_point, chain.low, chain.high, chain.inverse, problem=_problem(chain, rounding))


def _problem(chain: _Chain, rounding: list[str]) -> str:
    """Why the steps, last first, are not clamp(round(x / scale) + zero_point), or ''."""
    steps = [name for name in reversed(chain.order) if name != "nan"]
    if rounding != ["round"]:
        return f"it rounds by {' and '.join(rounding)}, not to nearest even"
    if "clamp" not in steps:
        return "it does not clamp before the cast to int8"
    if "zero point" in steps and "clamp" in steps[: steps.index("zero point")]:
        return "it clamps before it adds the zero point"
    if not (chain.low.is_integer() and chain.high.is_integer()):
        return f"it clamps to [{chain.low}, {chain.high}], not to whole numbers"
    return ""


# torch.ops.quantized_decomposed ---------------------------------------------------------------------------------------------------


def _op_name(node: Node) -> str:
    return node.target.name() if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) else ""


_DECOMPOSED = "quantized_decomposed::"
_GRANULARITIES = {
    "per_tensor": ("scale", "zero_point"),
    "per_tensor.tensor": ("scale", "zero_point"),
    "per_channel": ("scales", "zero_points"),
    "per_token": ("scales", "zero_points"),
}


def _decomposed(node: Node, verb: str) -> tuple[Value, Value | None, int | None] | None:
    """Scale, zero point and channel axis of a quantized_decomposed op, or None when `node` is none."""
    suffix = _op_name(node).removeprefix(f"{_DECOMPOSED}{verb}_")
    if suffix not in _GRANULARITIES:
        return None
    scale, zero_point = (argument(node, name) for name in _GRANULARITIES[suffix])
    axis = argument(node, "axis") % val(node).ndim if suffix == "per_channel" else None
    return scale, known_zero(zero_point), axis


def known_zero(zero_point: Value | None) -> Value | None:
    """None for a zero point whose value is known to be 0."""
    if _number(zero_point) and zero_point == 0:
        return None
    if isinstance(zero_point, Node):
        if zero_point.target in (aten.full.default, aten.zeros.default):
            return None if zero_point.target is aten.zeros.default or zero_point.args[1] == 0 else zero_point
        if zero_point.op == "get_attr":
            module = zero_point.graph.owning_module
            held = None if module is None else torch.fx.graph_module._get_attr(module, str(zero_point.target))
            return None if isinstance(held, torch.Tensor) and not bool(held.any()) else zero_point
    return zero_point


def _decomposed_dequant(node: Node) -> Dequant | None:
    read = _decomposed(node, "dequantize")
    if read is None:
        return None
    q = argument(node, "input")
    if val(q).dtype != torch.int8 or val(node).dtype not in reference.OUT_DTYPES:
        return None
    scale, zero_point, axis = read
    return Dequant(node, q, scale, zero_point, axis=axis)


def _decomposed_quant(node: Node) -> Quant | None:
    read = _decomposed(node, "quantize")
    if read is None or val(node).dtype != torch.int8:
        return None
    scale, zero_point, axis = read
    low, high = float(argument(node, "quant_min")), float(argument(node, "quant_max"))
    return Quant(node, argument(node, "input"), scale, zero_point, low, high, axis=axis)


DIALECTS = (
    Dialect("aten", _plain_dequant, _plain_quant),
    Dialect("quantized_decomposed", _decomposed_dequant, _decomposed_quant),
)


def varying_dims(value: Value, axis: int | None, target: Node) -> set[int]:
    """The dimensions of `target` along which a scale or zero point varies; Declined when its shape does not fit."""
    if not isinstance(value, Node):
        return set()
    shape, wanted = list(val(value).shape), val(target).shape
    if axis is not None:
        if not same_shape(shape, [wanted[axis]]):
            raise Declined(f"{value.name} has shape {shape}, not one value for each of {wanted[axis]} channels")
        return set() if _is_single(wanted[axis]) else {axis}
    shape = [1] * (len(wanted) - len(shape)) + shape
    varying = {dim for dim, size in enumerate(shape) if not _is_single(size)}
    if len(shape) > len(wanted) or not same_shape([shape[d] for d in varying], [wanted[d] for d in varying]):
        raise Declined(f"{value.name} has shape {shape}, which does not fit {list(wanted)}")
    return varying
