"""Lowering without templates: the operator's own eager definition, traced and compiled, so that no epilogue is spelled twice.

For scaled_mm it is built around an exact product (int_mm.py), or around what oneDNN computes of a frozen weight (onednn), in which case only the rest
is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import fallback_handler, lowerings, process_subgraph_nodes, register_lowering
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from . import ops
from .calls import Call, last_triton
from .explain import record_kernel
from .onednn.prepacked import Prepacked, Reached
from .operands import argument, computed_once
from .templates.tail import SCALAR

__all__ = ["lower_eager", "lower_torch"]

aten = torch.ops.aten
# A part of what is traced here: called as it is.
register_lowering(torch.ops.int8_inductor.avx2_int_mm, type_promotion_kind=None)(fallback_handler(torch.ops.int8_inductor.avx2_int_mm.default))


def lower_eager(fn: Callable[..., Any], tensors: dict[str, Any], fakes: Mapping[str, Tensor] | None = None) -> Any:
    """Lower `fn(**tensors)`, an eager function, in place: traced on the fake values, decomposed, and run through Inductor's lowerings.

    fakes: the values of those tensors that are not arguments of the node that is lowered.
    """
    from torch._inductor.decomposition import select_decomp_table

    node = V.graph.current_node
    assert isinstance(node, torch.fx.Node)
    names, known = list(tensors), fakes or {}
    values = [known[name] if name in known else argument(node, name).meta["val"] for name in names]

    def positional(*args: Tensor) -> Any:
        return fn(**dict(zip(names, args, strict=True)))

    with V.fake_mode:
        traced = make_fx(positional, decomposition_table=select_decomp_table())(*values)
    return process_subgraph_nodes(traced, [tensors[name] for name in names])


def _definition(call: Call) -> Callable[..., Any]:
    """The eager definition of a call on its tensors, by name; or of what is left of it, given the `sums` of its products or `y` [M, N], float32."""
    given = call.given
    # Constants; the tensors are arguments. A box has a dtype.
    numbers = {name: value for name, value in call.operands.items() if value is not None and not hasattr(value, "get_dtype")}
    stored = {name: given[name] for name in ("out_quant_min", "out_dtype") if name in given}

    def eager(
        *, bias: Tensor | None = None, out_scale: Tensor | None = None, out_zero_point: Tensor | None = None,
        sums: Tensor | None = None, y: Tensor | None = None, **tensors: Tensor,
    ) -> Any:  # fmt: skip
        if y is None:
            product = {} if sums is None else {"int_mm": lambda a, b: sums}
            y = ops.linear_eager(call.lowering.eager(**tensors, **numbers, **product), bias, given["activation"])
        return ops.store_blocks_eager(y, call.block_size) if call.block_size else ops.store_eager(y, out_scale, out_zero_point, **stored)

    return eager


def lower_torch(call: Call) -> Any:
    """Lower the eager definition. What an activation computes is kept, not computed again by each that reads it."""
    node, given = V.graph.current_node, call.given
    prepacked = call.lowering.prepacked(node, given["a"], call.sizes.static_m)
    kernel = str(prepacked) if prepacked is not None else call.lowering.eager_kernel(call.sizes, given["a"].get_device())
    if last_triton(call) is not None:
        kernel += f", chosen for M = {call.sizes.m}"
    record_kernel(node, kernel, call.tail(dict.fromkeys(call.in_tail, SCALAR)).describe())
    if prepacked is not None and prepacked.reached is Reached.STORED:
        return prepacked.box
    result = _rest(call, prepacked)
    if call.block_size:
        # Cut only once it is in memory: Inductor's C++ computes a wrong scale[i // block] where the size of i is no multiple of the block.
        result[0].realize()
        result = lowerings[aten.slice](result[0], 1, 0, given["b"].get_size()[-2]), result[1]
    if given["activation"] != "none":
        for each in result if isinstance(result, (tuple, list)) else (result,):
            each.realize()
    return result


def _rest(call: Call, prepacked: Prepacked | None) -> Any:
    """What is left of a call of which something may have been computed."""
    present = {name: box for name, box in call.given.items() if hasattr(box, "get_dtype")}
    if prepacked is None:
        return lower_eager(_definition(call), present | {name: computed_once(present[name]) for name in ("a", "b")})
    a: Tensor = argument(V.graph.current_node, "a").meta["val"]
    b: Tensor = argument(V.graph.current_node, "b").meta["val"]
    with V.fake_mode:
        value = a.new_empty((a.shape[0], b.shape[0]), dtype=torch.float32)
    if prepacked.reached is Reached.SUMS:
        return lower_eager(_definition(call), {**present, "sums": prepacked.box}, {"sums": value})
    store = {name: box for name, box in present.items() if name in ("out_scale", "out_zero_point")}
    return lower_eager(_definition(call), {**store, "y": prepacked.box}, {"y": value})
