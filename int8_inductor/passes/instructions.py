"""Quantizing in fewer instructions, where Inductor's pointwise code is Triton. The values are the same, bit for bit.

clamp(where(r == r, r, 0), low, 127).to(int8), r = round(t)  ->  round_to_int8(t, low)
    One conversion of a GPU rounds, saturates and makes NaN 0; Inductor's clamp alone is six instructions, as it lets NaN through.
amax(abs(x))  ->  amax(abs(x) as int32) as float32
    Floats without a sign order as their bits do, NaN last, so that the maximum of the bits passes NaN on by itself.

A kernel that quantizes rows of 14336 bfloat16 takes 27 us instead of 36 for 2048 of them (H200, the launch included).
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, KeywordArg, Match, PatternMatcherPass, register_graph_pattern
from torch.fx import Graph, Node

from .. import ops, reference
from ..kernels import runs_triton
from .base import aten, make, prims, val

__all__ = ["use_fewer_instructions"]

INSTRUCTIONS = PatternMatcherPass(pass_name="int8_inductor_instructions")

_ROUND = CallFunction(aten.round.default, KeywordArg("t"), _users=MULTIPLE)
_IS_NUMBER = CallFunction(aten.eq.Tensor, _ROUND, _ROUND, _users=MULTIPLE)
_NUMBER = CallFunction(aten.where.self, _IS_NUMBER, _ROUND, KeywordArg("zero"), _users=MULTIPLE)
_RAISED = CallFunction(aten.clamp_min.default, _NUMBER, KeywordArg("low"), _users=MULTIPLE)
_CLAMPED = CallFunction(aten.clamp_max.default, _RAISED, KeywordArg("high"), _users=MULTIPLE)


def _is_zero(node: Any) -> bool:
    constants = (aten.scalar_tensor.default, aten.full.default)
    return isinstance(node, Node) and node.target in constants and bool(node.args[-1] == 0)


@register_graph_pattern(CallFunction(prims.convert_element_type.default, _CLAMPED, torch.int8, _users=MULTIPLE), pass_dict=INSTRUCTIONS)
def round_once(match: Match, t: Node, zero: Any, low: Any, high: Any) -> None:
    """The whole of rounding and saturating float32 steps."""
    root = match.output_node()
    suits = val(t).dtype == torch.float32 and _is_zero(zero) and low in (reference.INT8_MIN, reference.SYMMETRIC_MIN) and high == reference.INT8_MAX
    if not suits or not runs_triton(val(t).device):
        return
    with root.graph.inserting_before(root):
        root.replace_all_uses_with(make(root.graph, root, ops.round_to_int8, t, int(low)))


_MAGNITUDE = CallFunction(aten.abs.default, KeywordArg("x"), _users=MULTIPLE)


@register_graph_pattern(
    CallFunction(aten.amax.default, _MAGNITUDE, KeywordArg("dims"), KeywordArg("keepdim"), _users=MULTIPLE), pass_dict=INSTRUCTIONS
)
def largest_bits(match: Match, x: Node, dims: Any, keepdim: Any) -> None:
    """The largest magnitude of float32 values, NaN if there is one."""
    root = match.output_node()
    if val(x).dtype != torch.float32 or not runs_triton(val(x).device):
        return
    with root.graph.inserting_before(root):
        bits = make(root.graph, root, aten.view.dtype, make(root.graph, root, aten.abs.default, x), torch.int32)
        largest = make(root.graph, root, aten.amax.default, bits, dims, keepdim)
        root.replace_all_uses_with(make(root.graph, root, aten.view.dtype, largest, torch.float32))


def use_fewer_instructions(graph: Graph) -> None:
    """Run the patterns over a graph that has one of our products; one with nothing quantized stays as it is."""
    if any(graph.find_nodes(op="call_function", target=target) for target in ops.OPERATORS):
        INSTRUCTIONS.apply(graph)
