"""dequant -> linear.

    mm(dequantize(a), dequantize(b).T)                 ->  scaled_mm(a, b, a_scale, b_scale, out_dtype=...)
    addmm(bias, dequantize(a), dequantize(b).T)        ->  scaled_mm(a, b, a_scale, b_scale, bias=bias, out_dtype=...)
    bmm(dequantize(a), expand(dequantize(b).T))        ->  view(scaled_mm(view(a), b, a_scale, b_scale, out_dtype=...))
    view(mm(view(dequantize(a)), ...)) + bias          ->  (epilogue.py folds that bias in)

in every dialect, with views, permutes and float casts between dequant and linear, a left operand of any rank, and dequants shared by several linears.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, KeywordArg, Match, PatternMatcherPass, register_graph_pattern
from torch.fx import Graph, Node

from .. import reference
from ..explain import LEFT, REWRITTEN
from .base import Declined, Path, argument, aten, emit, float_linear, keeps_last, make, same, same_shape, val, widened
from .context import current
from .dialects import Dequant, find_dequant
from .operands import activation_factors, weight_factors

LINEAR = PatternMatcherPass(pass_name="int8_inductor_linear")


def _dequantized(node: Any) -> tuple[Dequant, Path] | None:
    """The dequant that `node` comes from over transparent ops, and those ops."""
    path = Path()
    while isinstance(node, Node):
        if (found := find_dequant(node)) is not None:
            return found, path
        keeps = keeps_last(node)
        if keeps is None:
            return None
        path = Path([node, *path.nodes], path.keeps_last and keeps)
        node = node.args[0]
    return None


def _needs_gradient(graph: Graph, roots: list[Node]) -> bool:
    """Whether `graph` is a joint training graph that returns a gradient for something that `roots` are computed from."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    primals = [n for n in placeholders if not str(n.target).startswith("tangents_")]
    if len(primals) == len(placeholders):
        return False
    outputs = torch.utils._pytree.tree_leaves(graph.output_node().args, is_leaf=lambda x: x is None)
    gradients = dict(zip(primals, outputs[len(outputs) - len(primals) :], strict=True))
    pending, seen = list(roots), set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if gradients.get(node) is not None:
            return True
        pending.extend(node.all_input_nodes)
    return False


def _repeated_matrix(b: Any) -> Node | None:
    """The matrix [K, N] that every batch of b [B, K, N] is, or None: how a linear of an input that no view makes a matrix ends as a bmm."""
    while isinstance(b, Node) and val(b).ndim > 2:
        source = b.args[0] if keeps_last(b) is not None else None
        if not isinstance(source, Node) or not same_shape(val(source).shape[-2:], val(b).shape[-2:]):
            return None
        b = source
    return b if isinstance(b, Node) and val(b).ndim == 2 else None


def _check_sizes(a: Node, b: Node, zero_points: int) -> None:
    *rows, k = val(a).shape
    for name, sizes in (("M", rows), ("N", val(b).shape[-1:]), ("K", [k])):
        if any(same(size, 0) for size in sizes):
            raise Declined(f"{name} is 0")
    limit = (reference.MAX_K, reference.MAX_K_ZERO_POINT, reference.MAX_K_ZERO_POINTS)[zero_points]
    if not isinstance(k, int):
        raise Declined("K is symbolic")
    if k > limit:
        raise Declined(f"K is {k}: beyond {limit} int32 could overflow")


def _bias_vector(bias: Any, n: Any) -> None:
    if isinstance(bias, Node):
        shape = list(val(bias).shape)
        if not (shape and same(shape[-1], n) and all(same(size, 1) for size in shape[:-1])):
            raise Declined(f"the bias has shape {shape}, not [{n}]")
        if val(bias).dtype not in reference.OUT_DTYPES:
            raise Declined(f"the bias is {val(bias).dtype}")


def _rewrite(node: Node, a: Node, b: Node, bias: Node | None) -> Node:
    """The scaled_mm for a product of dequantized a [..., K] and b [K, N]. Declined, before the graph is touched, where that is not what it is."""
    left, right = _dequantized(a), _dequantized(b)
    if left is None or right is None:
        side, other = ("activation", "weight") if left is None else ("weight", "activation")
        raise Declined(f"its {other} is dequantized from int8 and its {side} is not")
    (a_dequant, a_path), (b_dequant, b_path) = left, right
    for dequant in (a_dequant, b_dequant):
        if dequant.problem:
            raise Declined(f"{dequant.node.name} is no dequantize that is matched: {dequant.problem}")
    if val(node).dtype not in reference.OUT_DTYPES:
        raise Declined(f"its output is {val(node).dtype}")
    a_scale, a_zero = activation_factors(a_dequant, a_path)
    b_scale, b_zero, transposed = weight_factors(b_dequant, b_path)
    _check_sizes(a, b, (a_zero is not None) + (b_zero is not None))
    _bias_vector(bias, val(b).shape[1])
    bias = None if bias is None else widened(bias)
    graph = node.graph
    roots = [b_dequant.q, *(f.value for f in (b_scale, b_zero) if f is not None and isinstance(f.value, Node))]
    if _needs_gradient(graph, roots):
        raise Declined("this training graph needs the weight's gradient")
    current().check_kernel(val(node).device)
    with graph.inserting_before(node):
        q_a = a_path.replay(graph, a_dequant.q)
        rows = q_a if val(q_a).ndim == 2 else make(graph, node, aten.reshape.default, q_a, [-1, val(q_a).shape[-1]])
        q_b = b_dequant.q if transposed else make(graph, node, aten.permute.default, b_dequant.q, [1, 0])
        arguments: dict[str, Any] = {
            "a": rows,
            "b": q_b,
            "a_scale": a_scale.emit(graph, node, torch.float32, a_path),
            "b_scale": b_scale.emit(graph, node, torch.float32),
            "a_zero_point": None if a_zero is None else a_zero.emit(graph, node, None, a_path),
            "b_zero_point": None if b_zero is None else b_zero.emit(graph, node, None),
            "bias": bias if bias is None or val(bias).ndim == 1 else make(graph, node, aten.reshape.default, bias, [-1]),
            "out_dtype": val(node).dtype,
            "kernel_preference": current().preference.value,
        }
        for name, columns in (("b_scale", b_scale), ("b_zero_point", b_zero)):
            if columns is not None and columns.per_row:
                arguments[name] = make(graph, node, aten.reshape.default, arguments[name], [-1])
        product = emit(graph, node, node.name, arguments)
        return product if rows is q_a else make(graph, node, aten.reshape.default, product, [*_leading_sizes(graph, q_a), -1])


def _leading_sizes(graph: Graph, node: Node) -> list[Any]:
    """The sizes of all dimensions of `node` but the last, as arguments of a node."""
    sizes = val(node).shape[:-1]
    return [size if isinstance(size, int) else make(graph, node, aten.sym_size.int, node, dim) for dim, size in enumerate(sizes)]


def _handle(node: Node, a: Any, b: Any, bias: Any = None, scales: tuple[Any, Any] = (1, 1)) -> None:
    ledger = current().ledger
    if _dequantized(a) is None and _dequantized(b) is None:
        float_linear(ledger, node)
        return
    try:
        if scales != (1, 1):
            raise Declined(f"addmm with beta {scales[0]} and alpha {scales[1]}")
        replacement = _rewrite(node, a, b, bias)
    except Declined as reason:
        ledger.linear(node, LEFT, str(reason))
        return
    ledger.linear(node, REWRITTEN)
    node.replace_all_uses_with(replacement)


def _register(pattern: CallFunction) -> Callable[[Callable[..., None]], Any]:
    return register_graph_pattern(pattern, pass_dict=LINEAR)


@_register(CallFunction(aten.mm.default, KeywordArg("a"), KeywordArg("b"), _users=MULTIPLE))
def rewrite_mm(match: Match, a: Node, b: Node) -> None:
    """mm of dequantized operands -> scaled_mm."""
    _handle(match.output_node(), a, b)


@_register(CallFunction(aten.addmm.default, KeywordArg("bias"), KeywordArg("a"), KeywordArg("b"), _users=MULTIPLE))
def rewrite_addmm(match: Match, bias: Node, a: Node, b: Node) -> None:
    """addmm of dequantized operands -> scaled_mm with a bias, where beta and alpha are 1."""
    node = match.output_node()
    _handle(node, a, b, bias, (argument(node, "beta"), argument(node, "alpha")))


@_register(CallFunction(aten.bmm.default, KeywordArg("a"), KeywordArg("b"), _users=MULTIPLE))
def rewrite_bmm(match: Match, a: Node, b: Node) -> None:
    """bmm of dequantized operands -> scaled_mm where all batches have the same right operand. Another batched product is no linear, and named."""
    node = match.output_node()
    if (weight := _repeated_matrix(b)) is not None:
        _handle(node, a, weight)
    elif _dequantized(a) is not None or _dequantized(b) is not None:
        current().ledger.linear(node, LEFT, "a batched product (bmm) is not a linear")
