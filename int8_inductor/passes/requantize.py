"""product -> quant, folded into the operator.

    quantize(view(cast(scaled_mm(...))), scale)              ->  view(scaled_mm(..., out_scale=scale))               int8 out
    quantize of [..., N / 128, 128] blocks by their own amax  ->  scaled_mm_block_quant(..., block_size=128)          int8 and scales

The first needs a scale that is there before the product is: static, per tensor or per row. Folded away too: the float value between two linears, so
that a chain of them stays int8.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.pattern_matcher import Match, PatternExpr
from torch.fx import Graph, Node

from .. import ops, reference
from .base import VIEWS, Declined, Path, argument, arguments_of, aten, getitem, is_float_cast, make, same, shared, val, walk_back
from .context import current
from .dialects import Quant, find_quant
from .epilogue import refold, trace_pattern
from .operands import Factor, read_factor

__all__ = ["fold_quants"]


def fold_quants(graph: Graph) -> None:
    """Fold every quant of `graph` that follows a product into it; name the others in the ledger, with the reason."""
    for node in list(graph.nodes):
        quant = find_quant(node)
        if quant is None:
            continue
        try:
            _fold(quant)
            reason = ""
        except Declined as declined:
            reason = str(declined)
        current().ledger.found_quant(node, reason)
    graph.eliminate_dead_code()


def _fold(quant: Quant) -> None:
    if quant.problem:
        raise Declined(quant.problem)
    if quant.quant_max != reference.INT8_MAX or quant.quant_min not in (reference.INT8_MIN, reference.SYMMETRIC_MIN):
        raise Declined(f"it clamps to [{quant.quant_min:g}, {quant.quant_max:g}], not to int8's range")
    if (blocks := _match_blocks(quant)) is not None:
        _fold_blocks(quant, blocks)
        return
    product, path = walk_back(quant.x)
    if product.target not in ops.STORING:
        raise Declined("no linear comes right before it")
    for name, value in (("scale", quant.scale), ("zero point", quant.zero_point)):
        if isinstance(value, Node) and _depends_on(value, product):
            raise Declined(f"its {name} is computed from the value that it quantizes")
    other = shared(product, path) or (None if _only_for(quant.x, {quant.node}) else quant.x)
    if other is not None:
        raise Declined(f"the float value {other.name} has another user")
    arguments = arguments_of(product)
    if arguments["out_scale"] is not None:
        raise Declined("the linear stores int8 already")
    rows = set(range(val(quant.x).ndim - 1))
    scale = read_factor(quant.scale, quant.axis, quant.x, rows, "quant's scale", quant.inverse)
    zero_point = None if quant.zero_point is None else read_factor(quant.zero_point, quant.axis, quant.x, rows, "quant's zero point")
    _check_rows([f for f in (scale, zero_point) if f is not None], path, product)
    graph = quant.node.graph
    with graph.inserting_before(quant.node):
        updates: dict[str, Any] = {
            "out_scale": scale.emit(graph, quant.node, torch.float32),
            "out_zero_point": None if zero_point is None else zero_point.emit(graph, quant.node, None),
            "out_quant_min": int(quant.quant_min),
            "out_dtype": None,
        }
        folded = refold(quant.node, product, path, **updates)
        quant.node.replace_all_uses_with(path.replay(graph, folded))


def _check_rows(factors: list[Factor], path: Path, product: Node) -> None:
    """A per-row factor has the rows of what is quantized: they must be the product's, in order."""
    if not any(factor.per_row for factor in factors):
        return
    if not path.keeps_last or any(node.target in (aten.permute.default, aten.transpose.int, aten.expand.default) for node in path.nodes):
        raise Declined("the linear's rows are rearranged before they are quantized row by row")


def _depends_on(node: Node, on: Node) -> bool:
    pending, seen = [node], set()
    while pending:
        each = pending.pop()
        if each is on:
            return True
        if each not in seen:
            seen.add(each)
            pending.extend(each.all_input_nodes)
    return False


@dataclass(frozen=True)
class _Blocks:
    """The quantization of the rows of y in blocks: the scale's root, what fills the last block up, and the sizes [..., N / size, size] of a view."""

    scale: Node
    y: Node
    padding: int
    sizes: list[Any]

    @property
    def size(self) -> int:
        """How many columns a block has."""
        return int(self.sizes[-1])


@functools.cache
def _block_scale_pattern() -> PatternExpr:
    return trace_pattern(lambda x: reference.choose_scale_blocks(x, [-1]), 4, 2, 128)


def _match_blocks(quant: Quant) -> _Blocks | None:
    """The dynamic per-row-block quantization of reference.quantize_blocks, or None."""
    shape = val(quant.x).shape
    if not isinstance(quant.scale, Node) or len(shape) < 2 or quant.zero_point is not None or quant.inverse or not isinstance(shape[-1], int):
        return None
    match = _block_scale_pattern().match(quant.scale)
    if not isinstance(match, Match) or match.kwargs["x"] is not quant.x:
        return None
    # Back over casts to the view that makes the blocks, and over what fills the last of them up with zeros.
    view = quant.x
    while is_float_cast(view):
        view = view.all_input_nodes[0]
    if view.target not in VIEWS:
        return None
    y, sizes, padding = view.args[0], view.args[1], 0
    assert isinstance(y, Node)
    assert isinstance(sizes, Sequence)
    if y.target is aten.constant_pad_nd.default and argument(y, "value") == 0 and len(argument(y, "pad")) == 2 and argument(y, "pad")[0] == 0:
        padding, y = argument(y, "pad")[1], y.args[0]
        assert isinstance(y, Node)
    if not (isinstance(padding, int) and same(shape[-2] * shape[-1], val(y).shape[-1] + padding)):
        return None
    return _Blocks(quant.scale, y, padding, list(sizes))


def _fold_blocks(quant: Quant, blocks: _Blocks) -> None:
    product, path = walk_back(blocks.y)
    if product.target not in ops.STORING:
        raise Declined("no linear comes right before it")
    if blocks.size not in ops.BLOCK_SIZES:
        raise Declined(f"it quantizes blocks of {blocks.size} columns, not of {', '.join(map(str, ops.BLOCK_SIZES))}")
    if not path.keeps_last or blocks.padding >= blocks.size or quant.quant_min != reference.SYMMETRIC_MIN:
        raise Declined("its blocks are not blocks of the linear's columns")
    if shared(product, path) is not None or not _only_for(blocks.y, {quant.node, blocks.scale}):
        raise Declined("the float value has another user")
    if arguments_of(product)["out_scale"] is not None:
        raise Declined("the linear stores int8 already")
    graph = quant.node.graph
    with graph.inserting_before(blocks.scale):
        both = refold(blocks.scale, product, path, ops.STORING[product.target].block_quant, block_size=blocks.size)
        q = path.replay(graph, getitem(graph, both, 0))
        scales = path.replay(graph, getitem(graph, both, 1), width=blocks.sizes[-2])
        scale_blocks = make(graph, blocks.scale, aten.reshape.default, scales, [*blocks.sizes[:-1], 1])
    _replace_values(quant.node, q, blocks)
    blocks.scale.replace_all_uses_with(scale_blocks)


def _replace_values(values: Node, q: Node, blocks: _Blocks) -> None:
    """Let q [..., N] stand for int8 `values` [..., N / size, size]; with no detour over a full last block where they are cut to N columns again."""
    graph, n = values.graph, val(q).shape[-1]
    wholes = [user for user in values.users if user.target in VIEWS]
    for whole in wholes:
        wholes += [user for user in whole.users if user.target in VIEWS]
        for cut in [user for user in whole.users if user.target is aten.slice.Tensor and blocks.padding]:
            if argument(cut, "dim") % val(cut).ndim == val(cut).ndim - 1 and argument(cut, "start") in (None, 0) and same(val(cut).shape[-1], n):
                leading: Any = whole.args[1]
                with graph.inserting_before(cut):
                    cut.replace_all_uses_with(make(graph, cut, aten.reshape.default, q, [*leading[:-1], n]))
    with graph.inserting_before(values):
        filled = make(graph, values, aten.constant_pad_nd.default, q, [0, blocks.padding]) if blocks.padding else q
        values.replace_all_uses_with(make(graph, values, aten.reshape.default, filled, blocks.sizes))


def _only_for(value: Node, ends: set[Node]) -> bool:
    """Whether every use of `value` leads to `ends` and nowhere else."""
    pending, seen = list(value.users), set()
    while pending:
        node = pending.pop()
        if node in ends or node in seen:
            continue
        seen.add(node)
        if not node.users or node.op == "output":
            return False
        pending.extend(node.users)
    return True
