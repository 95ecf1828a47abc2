"""Linears that read one activation, as one product: Q, K and V of an attention, gate and up of a feed-forward.

    scaled_mm(a, b_0, ...), scaled_mm(a, b_1, ...)   ->   y = scaled_mm_side_by_side(a, [b_0, b_1], ...);  y[:, :N_0], y[:, N_0:]

One launch instead of several, and a grid that fills the chip where each alone would not: a decoder's K and V projection is 8 columns of tiles. No
weight is moved: a program picks the pointer of the weight that its tile lies in. Only neighbours are joined, so that no result is kept for long; the
result must be stored as floats, each weight be contiguous and a multiple of TILE rows, with a scale a row, and a template must run it.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from .. import ops
from ..explain import TAG
from ..kernels import KernelPreference, parse, resolve
from ..side_by_side import scaled_mm_side_by_side
from .base import VIEWS, arguments_of, aten, make, prims, same, val

__all__ = ["lay_side_by_side"]

TILE = 128
"""Columns of the widest tile but one; no tile spans two weights."""
_OF_EACH = ("b", "b_scale", "bias")
_VIEWS = (*VIEWS, aten.permute.default, aten.unsqueeze.default)
MOST = 4
"""How many weights are joined at most: each is a branch in the kernel."""


def lay_side_by_side(graph: Graph) -> None:
    """Join every run of products that read one activation."""
    graph.eliminate_dead_code()  # of what other passes have replaced
    runs: list[list[Node]] = [[]]
    for node in graph.find_nodes(op="call_function", target=ops.scaled_mm, sort=True):
        if runs[-1] and len(runs[-1]) < MOST and _joins(runs[-1][0], node):
            runs[-1].append(node)
        else:
            runs.append([node] if _suits(node) else [])
    for run in runs:
        if len(run) > 1:
            _join(run)


def _suits(node: Node) -> bool:
    """Whether a scaled_mm could lie beside another."""
    given = arguments_of(node)
    zero_points = (given["a_zero_point"], given["b_zero_point"])
    if given["out_scale"] is not None or any(each is not None for each in zero_points):
        return False
    b, (rows, k) = val(given["b"]), val(given["b"]).shape
    if not (isinstance(rows, int) and isinstance(k, int) and rows % TILE == 0 and list(b.stride()) == [k, 1]):
        return False
    per_row = isinstance(given["b_scale"], Node) and same(val(given["b_scale"]).numel(), rows)
    in_triton = resolve(parse(given["kernel_preference"]), val(node).device) is KernelPreference.TRITON
    return per_row and in_triton and all(_movable(given[name]) for name in _OF_EACH)


def _joins(first: Node, node: Node) -> bool:
    """Whether `node` reads the same activation as `first` and stores the same kind of result."""
    if not _suits(node):
        return False
    one, other = arguments_of(first), arguments_of(node)
    biases = [None if each["bias"] is None else val(each["bias"]).dtype for each in (one, other)]
    alike = _same_value(one["a"], other["a"]) and _same_value(one["a_scale"], other["a_scale"])
    return alike and val(first).dtype == val(node).dtype and biases[0] == biases[1]


def _same_value(x: Any, y: Any) -> bool:
    """Whether two arguments are the same, or the same view of the same: each linear has one of its own."""
    if not isinstance(x, Node) or not isinstance(y, Node):
        return bool(x == y)
    if x is y:
        return True
    alike = x.target is y.target and x.target in _VIEWS and len(x.args) == len(y.args) and x.kwargs == y.kwargs
    return alike and all(map(_same_value, x.args, y.args))


def _movable(value: Any) -> bool:
    """Whether an argument is an input of the graph, seen through views and casts alone, so that it can be computed anywhere."""
    while isinstance(value, Node) and value.op not in ("placeholder", "get_attr"):
        if value.target not in (*_VIEWS, prims.convert_element_type.default):
            return False
        value = value.args[0]
    return True


def _hoist(value: Any, before: Node) -> None:
    """Move what a movable argument is made of before a node."""
    if isinstance(value, Node) and before < value:
        _hoist(value.args[0], before)
        before.prepend(value)


def _join(run: list[Node]) -> None:
    first, graph = run[0], run[0].graph
    given = [arguments_of(node) for node in run]
    for each in given[1:]:
        for name in _OF_EACH:
            _hoist(each[name], first)
    b, b_scale, bias = ([each[name] for each in given if each[name] is not None] for name in _OF_EACH)
    store = {"activations": [each["activation"] for each in given], "out_dtype": val(first).dtype}
    with graph.inserting_before(first):
        joined = make(graph, first, scaled_mm_side_by_side, given[0]["a"], b, given[0]["a_scale"], b_scale, bias, **store)
        joined.meta[TAG] = tuple(node.meta[TAG] for node in run)
        column = 0
        for node in run:
            end = column + val(node).shape[1]
            part = make(graph, node, aten.slice.Tensor, joined, 1, column, end)
            node.replace_all_uses_with(part)
            column = end
