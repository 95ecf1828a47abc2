"""The dialect of plain aten arithmetic: what Int8Linear writes, what torchao's affine operators decompose to, and what people write by hand.

(q - zero_point) * scale                          with the casts of q, and division by the inverse, as they come
clamp(round(x / scale) + zero_point).to(int8)     with clamp and round in either order, and multiplication by the inverse
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, KeywordArg, Match, PatternExpr
from torch.fx import Node

from ... import reference
from ..base import aten, is_exact, is_float_cast, prims, same_shape, val
from ..unpack import unpacked
from .types import Dequant, Dialect, Quant, Value, is_number, is_single, is_symbolic, qparams_problem, simplified, unexpanded

__all__ = ["PLAIN_ATEN", "STEPS"]


# Dequantize -----------------------------------------------------------------------------------------------------------------------


def _call(target: Any, *args: Any) -> CallFunction:
    return CallFunction(target, *args, _users=MULTIPLE)


_TO_FLOAT = _call(prims.convert_element_type.default, KeywordArg("q"), KeywordArg("dtype"))
_TO_INT = _call(prims.convert_element_type.default, KeywordArg("q"), KeywordArg("int_dtype"))
_SHIFTED = _call(aten.sub.Tensor, _TO_FLOAT, KeywordArg("zero_point"))
_SHIFTED_INT = _call(prims.convert_element_type.default, _call(aten.sub.Tensor, _TO_INT, KeywordArg("zero_point")), KeywordArg("dtype"))
_VIA_INT = _call(prims.convert_element_type.default, _TO_INT, KeywordArg("dtype"))
DEQUANT_PATTERNS: tuple[tuple[PatternExpr, bool], ...] = tuple(
    (pattern, inverse)
    for steps in (_SHIFTED, _SHIFTED_INT, _VIA_INT, _TO_FLOAT)
    for pattern, inverse in (
        (_call(aten.mul.Tensor, steps, KeywordArg("scale")), False),
        (_call(aten.mul.Tensor, KeywordArg("scale"), steps), False),
        (_call(aten.div.Tensor, steps, KeywordArg("scale")), True),
    )
)
"""Pattern -> whether the factor is the inverse of the scale."""


def _dequant(node: Node) -> Dequant | None:
    if node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    for pattern, inverse in DEQUANT_PATTERNS:
        match = pattern.match(node)
        if isinstance(match, Match) and is_exact(match) and (found := _read_dequant(node, match.kwargs, inverse)) is not None:
            return found
    return None


def _read_dequant(node: Node, found: dict[str, Any], inverse: bool) -> Dequant | None:
    q = found["q"]
    if not isinstance(q, Node) or not found["dtype"].is_floating_point or (val(q).dtype != torch.int8 and unpacked(q) is None):
        return None
    if found.get("int_dtype", torch.int32) not in (torch.int16, torch.int32, torch.int64):
        return None
    if not same_shape(val(node).shape, val(q).shape):
        return None  # the scale broadcasts q
    scale, inverse = _uninverted(found["scale"], inverse)
    zero_point = simplified(found.get("zero_point"))
    problem = qparams_problem(scale, zero_point)
    if val(node).dtype not in reference.OUT_DTYPES:
        problem = f"it dequantizes to {val(node).dtype}"
    return Dequant(node, q, scale, zero_point, inverse, problem=problem)


def _uninverted(factor: Any, inverse: bool) -> tuple[Value, bool]:
    """A factor without the reciprocals around it, and whether what is left is the inverse of the scale."""
    while isinstance(factor, Node):
        if factor.target is aten.mul.Tensor and factor.args[1] == 1.0:
            factor = factor.args[0]
        elif factor.target is aten.reciprocal.default:
            factor, inverse = factor.args[0], not inverse
        else:
            break
    return unexpanded(factor), inverse


# Quantize -------------------------------------------------------------------------------------------------------------------------


@dataclass
class _Chain:
    """What the walk from an int8 cast back to the quantized value has met, last step first."""

    order: list[str] = field(default_factory=list)
    low: float = float("-inf")
    high: float = float("inf")
    zero_point: Value | None = None


def _clamp_min(chain: _Chain, node: Node) -> Any:
    x, low = node.args[:2]
    if not is_number(low):
        return None
    chain.low = max(chain.low, float(low))  # type: ignore[arg-type]
    return x


def _clamp_max(chain: _Chain, node: Node) -> Any:
    x, high = node.args[:2]
    if not is_number(high):
        return None
    chain.high = min(chain.high, float(high))  # type: ignore[arg-type]
    return x


def _first_argument(chain: _Chain, node: Node) -> Any:
    return node.args[0]


_NAN_TESTS = (aten.eq.Tensor, aten.isnan.default)


def _nan_guard(chain: _Chain, node: Node) -> Any:
    """where(x == x, x, 0) or where(isnan(x), 0, x)."""
    test, *branches = node.args
    if not isinstance(test, Node) or test.target not in _NAN_TESTS:
        return None
    x, zero = branches if test.target is aten.eq.Tensor else reversed(branches)
    tests_x = all(each is x for each in test.args)
    is_zero = isinstance(zero, Node) and zero.target in (aten.scalar_tensor.default, aten.full.default) and 0 in zero.args
    return x if tests_x and is_zero else None


def _add_zero_point(chain: _Chain, node: Node) -> Any:
    x: Any
    zero_point: Any
    x, zero_point = node.args
    if "zero point" in chain.order or node.kwargs.get("alpha", 1) != 1:
        return None
    if _broadcasts(x, node) or (not _broadcasts(zero_point, node) and _is_step(zero_point) and not _is_step(x)):
        x, zero_point = zero_point, x
    chain.zero_point = simplified(zero_point)
    return x


def _broadcasts(x: Any, node: Node) -> bool:
    return isinstance(x, Node) and (is_symbolic(x) or not same_shape(val(x).shape, val(node).shape))


def _is_step(x: Any) -> bool:
    return isinstance(x, Node) and x.target in STEPS


STEPS: dict[Any, tuple[str, Callable[[_Chain, Node], Any]]] = {
    aten.clamp_min.default: ("clamp", _clamp_min),
    aten.clamp_max.default: ("clamp", _clamp_max),
    aten.round.default: ("round", _first_argument),
    aten.floor.default: ("floor", _first_argument),
    aten.ceil.default: ("ceil", _first_argument),
    aten.trunc.default: ("trunc", _first_argument),
    aten.where.self: ("nan", _nan_guard),
    aten.add.Tensor: ("zero point", _add_zero_point),
}
"""Target -> (what the step is called, how to read it: the node before it, or None when it is no such step)."""
ROUNDINGS = ("round", "floor", "ceil", "trunc")


def _quant(node: Node) -> Quant | None:
    if node.target is not prims.convert_element_type.default or node.args[1] != torch.int8:
        return None
    chain, at = _walk(node)
    if not isinstance(at, Node) or not (any(name in ROUNDINGS for name in chain.order) or _spans_int8(chain)):
        return None
    x, scale, inverse = _read_scale(at) or (at, 1.0, False)
    problem = _problem(chain) or qparams_problem(scale, chain.zero_point)
    return Quant(node, x, scale, chain.zero_point, chain.low, chain.high, inverse, problem=problem)


def _spans_int8(chain: _Chain) -> bool:
    return chain.low in (reference.INT8_MIN, reference.SYMMETRIC_MIN) and chain.high == reference.INT8_MAX


def _walk(node: Node) -> tuple[_Chain, Any]:
    """From an int8 cast back over STEPS, and the float casts between them."""
    chain, at = _Chain(), node.args[0]
    while isinstance(at, Node):
        before: Any = None
        if at.target in STEPS:
            name, read = STEPS[at.target]
            before = read(chain, at)
            if before is not None:
                chain.order.append(name)
        elif is_float_cast(at):
            before = at.args[0]
        if before is None:
            break
        at = before
    return chain, at


def _read_scale(node: Node) -> tuple[Node, Value, bool] | None:
    """x, the factor, and whether that is the inverse of the scale, of the product or quotient that a quantize starts with; None: it is neither."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    x, factor = node.args
    is_product = node.target is aten.mul.Tensor
    if is_product and isinstance(factor, Node) and _broadcasts(x, node):
        x, factor = factor, x
    if not isinstance(x, Node) or _broadcasts(x, node):
        return None
    if isinstance(factor, Node) and not _broadcasts(factor, node) and not is_single(val(node).shape[-1] if val(node).ndim else 1):
        return None  # two whole tensors: arithmetic, not a scale
    return x, *_uninverted(factor, is_product)


def _problem(chain: _Chain) -> str:
    """Why the steps are not clamp(round(x / scale) + zero_point), or ''."""
    steps = chain.order[::-1]
    rounding = [name for name in steps if name in ROUNDINGS]
    if not rounding:
        return "it does not round before the cast to int8"
    if rounding != ["round"]:
        return f"it rounds by {' and '.join(rounding)}, not to nearest even"
    if "clamp" not in steps:
        return "it does not clamp before the cast to int8"
    if "zero point" in steps:
        shift = steps.index("zero point")
        if "clamp" in steps[:shift]:
            return "it clamps before it adds the zero point"
        if "round" in steps[shift:]:
            return "it adds the zero point before it rounds"
        if "nan" in steps[shift:]:
            return "NaN becomes 0 in it, not the zero point"
    if not (chain.low.is_integer() and chain.high.is_integer()):
        return f"it clamps to [{chain.low}, {chain.high}], not to whole numbers"
    return ""


PLAIN_ATEN = Dialect("aten", _dequant, _quant)
