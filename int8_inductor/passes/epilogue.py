"""product -> bias -> activation -> cast, folded into the operator.

    view(scaled_mm(...)) + bias        ->  view(scaled_mm(..., bias=bias))
    gelu(cast(view(scaled_mm(...))))   ->  view(scaled_mm(..., activation="gelu"))
    scaled_mm(...).to(bfloat16)        ->  scaled_mm(..., out_dtype=bfloat16)

The activations are those of EPILOGUES: each one's pattern is its eager function (and its other spellings), traced and decomposed as Inductor does
it with the model. A product whose own value something else needs too (a backward pass, say) is left as it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.pattern_matcher import (
    MULTIPLE,
    CallFunction,
    KeywordArg,
    Match,
    PatternExpr,
    PatternMatcherPass,
    fx_to_pattern,
    register_graph_pattern,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from .. import ops, reference
from ..epilogues import EPILOGUES, Epilogue
from ..explain import TAG
from .base import Path, arguments_of, aten, emit, is_exact, is_float_cast, make, prims, same, shared, used_only_by, val, walk_back, widened

BIAS = PatternMatcherPass(pass_name="int8_inductor_bias")
OUT_DTYPE = PatternMatcherPass(pass_name="int8_inductor_out_dtype")


def producer(node: Node, users: list[Node]) -> tuple[Node, Path] | None:
    """The product that `node` shows through transparent ops, when nothing but `users` (of `node`) and the path between needs its value."""
    source, path = walk_back(node)
    if source.target not in ops.STORING or not used_only_by(node, users) or shared(source, path) is not None:
        return None
    return source, path


def refold(root: Node, product: Node, path: Path, target: Any = None, **updates: Any) -> Node:
    """A product with changed arguments just before `root`; on the old path, its value stands for root's. target: another operator of it."""
    arguments = {**arguments_of(product), **updates}
    return emit(root.graph, root, product.meta[TAG], target or product.target, arguments)


def _replace(root: Node, product: Node, path: Path, **updates: Any) -> None:
    graph = root.graph
    with graph.inserting_before(root):
        folded = refold(root, product, path, out_dtype=val(root).dtype, **updates)
        root.replace_all_uses_with(path.replay(graph, folded))


def _plain(product: Node) -> bool:
    """Whether nothing follows the bias yet."""
    arguments = arguments_of(product)
    return arguments["activation"] == "none" and arguments["out_scale"] is None


def _fold_bias(root: Node, x: Any, bias: Any) -> bool:
    if not (isinstance(x, Node) and isinstance(bias, Node)) or x is bias or val(root).dtype not in reference.OUT_DTYPES:
        return False
    found = producer(x, [root])
    if found is None:
        return False
    product, path = found
    shape = list(val(bias).shape)
    vector = bool(shape) and same(shape[-1], val(product).shape[1]) and all(same(size, 1) for size in shape[:-1])
    if not (vector and path.keeps_last and val(bias).dtype in reference.OUT_DTYPES and val(bias).device == val(root).device):
        return False
    if len(shape) > val(x).ndim or not _plain(product) or arguments_of(product)["bias"] is not None:
        return False
    bias = widened(bias)
    with root.graph.inserting_before(root):
        vector_bias = bias if len(shape) == 1 else make(root.graph, root, aten.reshape.default, bias, [-1])
    _replace(root, product, path, bias=vector_bias)
    return True


@register_graph_pattern(CallFunction(aten.add.Tensor, KeywordArg("x"), KeywordArg("bias"), _users=MULTIPLE), pass_dict=BIAS)
def fold_bias(match: Match, x: Any, bias: Any) -> None:
    """product + bias [N], in either order."""
    root = match.output_node()
    if not is_exact(match):
        return
    if not _fold_bias(root, x, bias):
        _fold_bias(root, bias, x)


@register_graph_pattern(CallFunction(prims.convert_element_type.default, KeywordArg("x"), KeywordArg("dtype"), _users=MULTIPLE), pass_dict=OUT_DTYPE)
def fold_cast(match: Match, x: Node, dtype: torch.dtype) -> None:
    """product -> cast to a narrower float dtype: stored as that dtype."""
    root = match.output_node()
    if not is_float_cast(root):
        return
    found = producer(x, [root])
    if found is None or any(is_float_cast(node) for node in found[1].nodes):
        return
    product, path = found
    # To a narrower dtype only: a wider one would cost memory traffic, and undo the rounding that the model asked for.
    if arguments_of(product)["out_scale"] is None and dtype.itemsize < val(product).dtype.itemsize:
        _replace(root, product, path)


def trace_pattern(fn: Callable[..., Any], *shape: int, dtype: torch.dtype = torch.float32) -> PatternExpr:
    """The pattern that `fn` of one tensor leaves in a graph after Inductor's decompositions; the tensor is `x` in the match."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import remove_noop_ops

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.empty(shape, dtype=dtype))
        traced = make_fx(lambda x: fn(x), decomposition_table=select_decomp_table())(fake)
    remove_noop_ops(traced.graph)
    _open_nans(traced.graph)
    return fx_to_pattern(traced, argnames=["x", "nan"], exclusive_arg_names=())


def _open_nans(graph: Graph) -> None:
    """Make NaN constants, which equal nothing and may have any number of users, an argument `nan` of the pattern: `is_nan` checks it."""
    (x,) = graph.find_nodes(op="placeholder")
    for node in list(graph.nodes):
        if is_nan(node):
            with graph.inserting_after(x):
                node.replace_all_uses_with(graph.placeholder("nan"))
            graph.erase_node(node)


def is_nan(node: Any) -> bool:
    """Whether `node` makes the constant NaN."""
    return isinstance(node, Node) and node.op == "call_function" and any(isinstance(arg, float) and math.isnan(arg) for arg in node.args)


def _fold_activation(epilogue: Epilogue, match: Match, x: Node) -> None:
    root = match.output_node()
    found = producer(x, match.nodes)
    if found is None or not is_exact(match) or not _plain(found[0]) or val(root).dtype not in reference.OUT_DTYPES:
        return
    _replace(root, *found, activation=epilogue.name)


@functools.cache
def activations() -> PatternMatcherPass:
    """The pass that folds EPILOGUES; built on first use, as it traces their eager functions."""
    passes = PatternMatcherPass(pass_name="int8_inductor_activation")
    for epilogue in EPILOGUES.values():
        if epilogue.name == "none":
            continue
        seen: set[str] = set()
        for spelling in (epilogue.eager, *epilogue.spellings):
            # Half precision adds casts inside a decomposition; float32 patterns cover the rest, casts outside being transparent.
            for dtype in reference.OUT_DTYPES:
                pattern = trace_pattern(spelling, 4, 8, dtype=dtype)
                if repr(pattern) in seen:
                    continue
                seen.add(repr(pattern))
                register_graph_pattern(pattern, pass_dict=passes)(functools.partial(_fold_activation, epilogue))
    return passes


def fold_activations(graph: Graph) -> int:
    """Run the activation patterns over `graph`."""
    return int(activations().apply(graph))
