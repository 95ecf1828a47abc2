"""dequant -> linear, for each of SCHEMES; here for W8A8:

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
from .dialects import find_dequant
from .schemes import SCHEMES, Operand, Reading

LINEAR = PatternMatcherPass(pass_name="int8_inductor_linear")


def operand(node: Node) -> Operand:
    """`node` as a side of a product: with the dequant that it comes from over transparent ops, and those ops."""
    path, source = Path(), node
    while isinstance(source, Node):
        if (found := find_dequant(source)) is not None:
            return Operand(node, found, path)
        keeps = keeps_last(source)
        if keeps is None:
            break
        path = Path([source, *path.nodes], path.keeps_last and keeps)
        source = source.args[0]  # type: ignore[assignment]
    return Operand(node, None, Path())


def needs_gradient(graph: Graph, roots: list[Node]) -> bool:
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


def _bias_vector(bias: Any, n: Any) -> None:
    if isinstance(bias, Node):
        shape = list(val(bias).shape)
        if not (shape and same(shape[-1], n) and all(same(size, 1) for size in shape[:-1])):
            raise Declined(f"the bias has shape {shape}, not [{n}]")
        if val(bias).dtype not in reference.OUT_DTYPES:
            raise Declined(f"the bias is {val(bias).dtype}")


def _read(left: Operand, right: Operand) -> Reading:
    """What the first scheme that takes the product makes of it; Declined, with the first reason, where none does."""
    reasons: list[Declined] = []
    for scheme in SCHEMES:
        try:
            reading = scheme.read(left, right)
        except Declined as reason:
            reasons.append(reason)
            continue
        if reading is not None:
            return reading
    raise reasons[0] if reasons else Declined("no scheme reads its operands")


def _rewrite(node: Node, left: Operand, right: Operand, bias: Node | None) -> Node:
    """One of PRODUCTS for a product of a [..., K] and b [K, N]. Declined, before the graph is touched, where that is not what it is."""
    reading = _read(left, right)
    if val(node).dtype not in reference.OUT_DTYPES:
        raise Declined(f"its output is {val(node).dtype}")
    _bias_vector(bias, val(right.node).shape[1])
    bias = None if bias is None else widened(bias)
    graph = node.graph
    if needs_gradient(graph, list(reading.weights)):
        raise Declined("this training graph needs the weight's gradient")
    current().check_kernel(val(node).device)
    with graph.inserting_before(node):
        arguments = reading.emit(graph, node)
        a = arguments["a"]
        rows = a if val(a).ndim == 2 else make(graph, node, aten.reshape.default, a, [-1, val(a).shape[-1]])
        arguments |= {
            "a": rows,
            "bias": bias if bias is None or val(bias).ndim == 1 else make(graph, node, aten.reshape.default, bias, [-1]),
            "out_dtype": val(node).dtype,
            "kernel_preference": current().preference.value,
        }
        product = emit(graph, node, node.name, reading.product.operator, arguments)
        return product if rows is a else make(graph, node, aten.reshape.default, product, [*_leading_sizes(graph, a), -1])


def _leading_sizes(graph: Graph, node: Node) -> list[Any]:
    """The sizes of all dimensions of `node` but the last, as arguments of a node."""
    sizes = val(node).shape[:-1]
    return [size if isinstance(size, int) else make(graph, node, aten.sym_size.int, node, dim) for dim, size in enumerate(sizes)]


def _handle(node: Node, a: Node, b: Node, bias: Any = None, scales: tuple[Any, Any] = (1, 1)) -> None:
    ledger, left, right = current().ledger, operand(a), operand(b)
    if left.dequant is None and right.dequant is None:
        float_linear(ledger, node)
        return
    try:
        if scales != (1, 1):
            raise Declined(f"addmm with beta {scales[0]} and alpha {scales[1]}")
        replacement = _rewrite(node, left, right, bias)
    except Declined as reason:
        ledger.linear(node, LEFT, str(reason))
        return
    ledger.linear(node, REWRITTEN)
    node.replace_all_uses_with(replacement)


def _register(pattern: CallFunction) -> Callable[[Callable[..., None]], Any]:
    return register_graph_pattern(pattern, pass_dict=LINEAR)


@_register(CallFunction(aten.mm.default, KeywordArg("a"), KeywordArg("b"), _users=MULTIPLE))
def rewrite_mm(match: Match, a: Node, b: Node) -> None:
    """mm of dequantized operands."""
    _handle(match.output_node(), a, b)


@_register(CallFunction(aten.addmm.default, KeywordArg("bias"), KeywordArg("a"), KeywordArg("b"), _users=MULTIPLE))
def rewrite_addmm(match: Match, bias: Node, a: Node, b: Node) -> None:
    """addmm of dequantized operands: a product with a bias, where beta and alpha are 1."""
    node = match.output_node()
    _handle(node, a, b, bias, (argument(node, "beta"), argument(node, "alpha")))


@_register(CallFunction(aten.bmm.default, KeywordArg("a"), KeywordArg("b"), _users=MULTIPLE))
def rewrite_bmm(match: Match, a: Node, b: Node) -> None:
    """bmm of dequantized operands where all batches have the same right operand. Another batched product is no linear, and named."""
    node = match.output_node()
    if (weight := _repeated_matrix(b)) is not None:
        _handle(node, a, weight)
    elif operand(a).dequant is not None or operand(b).dequant is not None:
        current().ledger.linear(node, LEFT, "a batched product (bmm) is not a linear")
