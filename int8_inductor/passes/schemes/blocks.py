"""Block-scaled W8A8: an activation dequantized from int8 in blocks of 1 x B, a weight in blocks of B x B.

mm(a * repeat(a_scale), (b * repeat(b_scale)).T)  ->  block_scaled_mm(a, b, a_scale, b_scale, B)

`repeat` is any of the ways in which passes/blocks.py can follow a scale: unsqueeze, expand and reshape (as Int8BlockLinear and repeat_interleave
have it), or a product in a view of the value in blocks (as torchao's affine ops have it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from ...granularity import SQUARE_BLOCKS
from ...products.block_scaled_mm import BLOCK_SCALED_MM
from ..base import Declined, argument, aten, make, prims, same, same_shape, val
from ..blocks import Repeated, follow
from ..dialects import Dequant
from ..operands import check_sizes
from .types import Operand, Reading, Scheme

__all__ = ["BLOCKS"]


def read(left: Operand, right: Operand) -> Reading | None:
    """A block_scaled_mm where the activation's scales are repeated along K, or the weight's along N; None where neither are."""
    if left.dequant is None or right.dequant is None:
        return None
    a, b = follow(left.dequant, left.path), follow(right.dequant, right.path)
    k, n = val(left.node).shape[-1], val(right.node).shape[1]
    blocks = [_block(each, axis) for each, axis in ((a, -1), (b, 1), (b, 0))]
    found = {size for size in blocks if size is not None}
    if not any(blocks[:2]) and (found or not (_is_repeated(left.dequant, a) or _is_repeated(right.dequant, b))):
        return None
    check_sizes(left.node, right.node, limit=None)
    if a is None or b is None or len(found) > 1:
        shown = ", ".join(map(str, sorted(found)))
        raise Declined(f"its scales are in blocks, of {shown or 'no known number of'} values, and not of 1 x B and B x B with one B")
    size = found.pop() if found else _one_block(k, n)
    if size not in SQUARE_BLOCKS:
        raise Declined(f"its scales are in blocks of {size}, not of {', '.join(map(str, SQUARE_BLOCKS))}")
    for operand, repeated in ((left, a), (right, b)):
        _check_dequant(operand, repeated)
    _check_axis("activation", a, -1, size, k)
    _check_axis("weight", b, 0, size, k)
    _check_axis("weight", b, 1, size, n)
    _check_rows(a, left)
    swapped = _check_columns(b)

    weight, length = _without_zeros(_quantized(right), right, size)

    def emit(graph: Graph, like: Node) -> dict[str, Any]:
        rows = left.path.replay(graph, _quantized(left))
        columns = make(graph, like, aten.permute.default, right.path.replay(graph, _quantized(right)), [1, 0])
        if weight is not None:
            rows, columns = make(graph, like, aten.slice.Tensor, rows, -1, 0, length), weight
        b_scale = _scale(graph, like, right, b, [b.extent(0), b.extent(1)] if swapped else [b.extent(1), b.extent(0)])
        return {
            "a": rows,
            "b": columns,
            "a_scale": _scale(graph, like, left, a, [-1, a.extent(-1)]),
            "b_scale": make(graph, like, aten.permute.default, b_scale, [1, 0]) if swapped else b_scale,
            "scale_block": size,
        }

    return Reading(BLOCK_SCALED_MM, (_quantized(right), b.scale), emit)


def _quantized(operand: Operand) -> Node:
    assert operand.dequant is not None
    return operand.dequant.q


def _without_zeros(q: Node, right: Operand, size: int) -> tuple[Node | None, int]:
    """The weight [N, K] that zeros were put behind to fill its last block of columns up, and K; None where that is not what `q` is."""
    moved = right.path.shapes_only()
    transposed = len(moved) == 1 and moved[0].target is aten.permute.default and val(q).ndim == 2
    if q.target is not aten.constant_pad_nd.default or not transposed or argument(q, "value") != 0:
        return None, 0
    padding, source = argument(q, "pad"), q.args[0]
    if not isinstance(source, Node) or len(padding) != 2 or padding[0] != 0 or not 0 < padding[1] < size:
        return None, 0
    return source, int(val(source).shape[1])


def _block(repeated: Repeated | None, axis: int) -> int | None:
    """How many elements along a dimension share a scale, where there are several scales and each is repeated."""
    if repeated is None or same(repeated.extent(axis), 1):
        return None
    repeat = repeated.axes[axis].repeat
    return repeat if isinstance(repeat, int) and repeat > 1 else None


def _is_repeated(dequant: Dequant, repeated: Repeated | None) -> bool:
    """Whether a scale was repeated to one for each element of the quantized value, which another scheme would not look through."""
    if repeated is None or repeated.scale is dequant.scale or not isinstance(dequant.scale, Node):
        return False
    return same_shape(val(dequant.scale).shape, val(dequant.q).shape)


def _one_block(k: Any, n: Any) -> int:
    """The smallest block that holds the whole weight, where neither dimension has more than one scale."""
    for size in SQUARE_BLOCKS:
        if isinstance(n, int) and max(k, n) <= size:
            return size
    raise Declined(f"its scales are one for all of the weight's {n} rows and {k} columns, not one for each {SQUARE_BLOCKS[-1]}")


def _check_dequant(operand: Operand, repeated: Repeated) -> None:
    dequant = operand.dequant
    assert dequant is not None
    if dequant.problem:
        raise Declined(f"{dequant.node.name} is no dequantize that is matched: {dequant.problem}")
    if dequant.zero_point is not None:
        raise Declined("its scales are in blocks and it has a zero point")
    if val(repeated.scale).device != val(dequant.q).device:
        raise Declined(f"the scale is on {val(repeated.scale).device} and the value on {val(dequant.q).device}")


def _check_axis(what: str, repeated: Repeated, axis: int, size: int, length: Any) -> None:
    """Along a dimension there must be a scale for every `size` elements, or one where there are no more than that."""
    extent = repeated.extent(axis)
    if same(extent, 1):
        short = isinstance(length, int) and length <= size
        if not short:
            raise Declined(f"the {what}'s scale is one for all {length} values of a dimension, not one for each {size}")
        return
    if not same(repeated.axes[axis].repeat, size) or not same(extent, -(-length // size)):
        raise Declined(f"the {what}'s scale is not one for each {size} values of a dimension of {length}")


def _varying(repeated: Repeated) -> list[int]:
    return [dim for dim, size in enumerate(val(repeated.scale).shape) if not same(size, 1)]


def _check_rows(a: Repeated, left: Operand) -> None:
    """Every row of the activation must have scales of its own, in the order of the rows."""
    order = [dim for axis in a.axes for dim in axis.dims if not same(val(a.scale).shape[dim], 1)]
    rows = zip(a.axes[:-1], val(left.node).shape[:-1], strict=True)
    of_its_own = all(same(size, 1) or (axis.dims and same(axis.repeat, 1)) for axis, size in rows)
    if order != _varying(a) or not of_its_own:
        raise Declined("the activation's scale is not one for each row and block of its columns, in their order")


def _check_columns(b: Repeated) -> bool:
    """Whether the weight's scale lies with K before N."""
    k_dims, n_dims = ([dim for dim in b.axes[axis].dims if not same(val(b.scale).shape[dim], 1)] for axis in (0, 1))
    if sorted(k_dims + n_dims) != _varying(b) or len(k_dims) > 1 or len(n_dims) > 1:
        raise Declined("the weight's scale is not one for each block of its rows and columns")
    return bool(k_dims and n_dims and k_dims < n_dims)


def _scale(graph: Graph, like: Node, operand: Operand, repeated: Repeated, shape: list[Any]) -> Node:
    """The scale as a float32 matrix."""
    node = repeated.scale
    assert operand.dequant is not None
    if val(node).dtype != torch.float32:
        node = make(graph, like, prims.convert_element_type.default, node, torch.float32)
    if operand.dequant.inverse:
        node = make(graph, like, aten.reciprocal.default, node)
    if val(node).ndim == 2 and all(same(x, y) for x, y in zip(val(node).shape[-len(shape) :], shape, strict=True) if y != -1):
        return node
    return make(graph, like, aten.reshape.default, node, shape)


BLOCKS = Scheme("blocks", read)
