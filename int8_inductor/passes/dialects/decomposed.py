"""The dialect of torch.ops.quantized_decomposed, which PT2E writes: quantize_per_tensor, _per_channel, _per_token and their counterparts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ... import reference
from ..base import argument, val
from .types import Dequant, Dialect, Quant, Value, qparams_problem, simplified, unexpanded

__all__ = ["QUANTIZED_DECOMPOSED", "choose_qparams_per_token"]

_NAMESPACE = "quantized_decomposed::"
_GRANULARITIES = {
    "per_tensor": ("scale", "zero_point"),
    "per_tensor.tensor": ("scale", "zero_point"),
    "per_channel": ("scales", "zero_points"),
    "per_token": ("scales", "zero_points"),
}
"""What follows quantize_ and dequantize_ in an operator's name -> its arguments for scale and zero point."""


_GROUPS = "per_channel_group"


def choose_qparams_per_token(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What quantized_decomposed.choose_qparams_per_token computes, in the dtypes that its meta function says: float64 scales, int64 zero points.

    Its eager kernel returns float32 for both (torch 2.11 to 2.15), and compiled code that calls it reads them as what they are not.
    """
    if dtype != torch.int8:
        raise ValueError(f"choose_qparams_per_token: dtype must be torch.int8, got {dtype}")
    largest = x.abs().amax(dim=-1, keepdim=True)
    scale = (largest.float() if largest.dtype == torch.float16 else largest).clamp(min=1e-5).div(reference.INT8_MAX)
    return scale.double(), torch.zeros_like(scale, dtype=torch.int64)


def _granularity(node: Node, verb: str) -> str | None:
    """What follows `verb` in the name of a quantized_decomposed operator, or None when `node` is not one."""
    name = node.target.name() if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) else ""
    start = f"{_NAMESPACE}{verb}_"
    return name.removeprefix(start) if name.startswith(start) else None


def _qparams(node: Node, granularity: str) -> tuple[Value, Value | None, int | None]:
    """Scale, zero point (None when known to be 0) and channel axis."""
    scale, zero_point = (argument(node, name) for name in _GRANULARITIES[granularity])
    axis = argument(node, "axis") % val(node).ndim if granularity == "per_channel" else None
    return unexpanded(scale), simplified(zero_point), axis


def _dequant(node: Node) -> Dequant | None:
    granularity = _granularity(node, "dequantize")
    if granularity is None:
        return None
    q = argument(node, "input")
    if val(q).dtype != torch.int8:
        return None
    if granularity == _GROUPS:
        return _dequant_groups(node, q)
    if granularity not in _GRANULARITIES:
        return Dequant(node, q, 1.0, None, problem=f"quantized_decomposed.dequantize_{granularity} is not one that is matched")
    scale, zero_point, axis = _qparams(node, granularity)
    return Dequant(node, q, scale, zero_point, axis=axis, problem=_dequant_problem(node, granularity, scale, zero_point))


def _dequant_groups(node: Node, q: Node) -> Dequant:
    scales, zero_points = argument(node, "scales"), simplified(argument(node, "zero_points"))
    problem = f"it dequantizes to {val(node).dtype}" if val(node).dtype not in reference.OUT_DTYPES else qparams_problem(scales, zero_points)
    return Dequant(node, q, scales, zero_points, problem=problem, group_size=argument(node, "group_size"))


def _dequant_problem(node: Node, granularity: str, scale: Value, zero_point: Value | None) -> str:
    if val(node).dtype not in reference.OUT_DTYPES:
        return f"it dequantizes to {val(node).dtype}"
    if granularity in ("per_channel", "per_token") and isinstance(zero_point, Node) and val(zero_point).dtype == torch.int8:
        return f"its zero points {zero_point.name} are int8, and the difference wraps around"
    return qparams_problem(scale, zero_point)


def _quant(node: Node) -> Quant | None:
    granularity = _granularity(node, "quantize")
    if granularity is None or val(node).dtype != torch.int8:
        return None
    x = argument(node, "input")
    if granularity not in _GRANULARITIES:
        problem = f"quantized_decomposed.quantize_{granularity} is not one that is matched"
        return Quant(node, x, 1.0, None, reference.INT8_MIN, reference.INT8_MAX, problem=problem)
    scale, zero_point, axis = _qparams(node, granularity)
    low, high = float(argument(node, "quant_min")), float(argument(node, "quant_max"))
    problem = qparams_problem(scale, zero_point)
    if granularity == "per_token" and zero_point is not None:
        problem = "it adds the zero point before it rounds"
    return Quant(node, x, scale, zero_point, low, high, axis=axis, problem=problem)


QUANTIZED_DECOMPOSED = Dialect("quantized_decomposed", _dequant, _quant)
