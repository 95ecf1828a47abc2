"""Lowering: a product's operator -> operands -> choices over its templates -> autotune; or, for KernelPreference.TORCH, lowering_eager.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import empty_strided, lowerings, make_pointwise, register_lowering
from torch._inductor.select_algorithm import realize_inputs
from torch._inductor.virtualized import V
from torch._inductor.virtualized import ops as inductor_ops

from . import ops
from .ahead import KERNELS, compile_all_ahead
from .autotune import Kernel, autotune, is_beaten
from .calls import Call, last_triton, runs_triton
from .either import either
from .explain import record_kernel, recorded
from .gluon.template import memory_in_words
from .kernels import KernelPreference, parse
from .lowering_eager import lower_eager, lower_torch
from .operands import argument, as_operand, computed_once, has_ptx, is_thorough, problem_of, with_known_strides
from .products import PRODUCTS, Product
from .ranges import described, has_ranges, ranges_of
from .templates.tail import Indexing

aten = torch.ops.aten


def _kernel(call: Call, scales: Any = None) -> Kernel:
    """The kernel that runs a call. scales: a realized box for those of a result quantized in blocks."""
    lowering, given = call.lowering, call.given
    a, b = realize_inputs(computed_once(given["a"])), realize_inputs(computed_once(given["b"]))
    device = a.get_device()
    indexings: dict[str, Indexing] = {}
    literals: dict[str, str] = {}
    inputs = [a, b, *(realize_inputs(given[name]) for name in lowering.loop)]
    for operand, box in call.in_tail.items():
        indexings[operand], value = as_operand(operand, box)
        if indexings[operand].is_argument:
            inputs.append(value)
        else:
            literals[operand.upper()] = value
    mutated = [] if scales is None else [realize_inputs(scales)]
    return Kernel(
        name=call.name,
        templates=lowering.templates,
        tail=call.tail(indexings, ptx=has_ptx(device)),
        problem=with_known_strides(problem_of(a, b, groups=lowering.groups(call.operands)), inputs[2:]),
        device=call.device,
        inputs=inputs + mutated,
        layout=ir.FixedLayout(device, call.dtype, [a.get_size()[0], b.get_size()[-2]]),
        mutated=mutated,
        literals=literals,
        thorough=is_thorough(),
        ranges=ranges_of(*a.get_size(), b.get_size()[-2], most=call.last),
    )


def in_words(kernel: Kernel, lasts: tuple[int | None, ...], last: int | None = None) -> str:
    """What a report calls a kernel, or those for the ranges of M that end there. last: M beyond which something else runs."""
    if len(lasts) > 1 or last is not None:
        return f"triton for {described((*lasts[:-1], last))}"
    static = isinstance(kernel.layout.size[0], (int, sympy.Integer))
    return "triton" if static or kernel.ranges else f"triton, chosen for M = {kernel.problem.m}"


def _lower_triton(call: Call) -> Any:
    compile_all_ahead(call.given["a"].get_device())
    scales = None
    if call.block_size is not None:
        rows, columns = call.given["a"].get_size()[0], call.given["b"].get_size()[-2]
        blocks = (columns + call.block_size - 1) // call.block_size
        scales = empty_strided([rows, blocks], None, dtype=torch.float32, device=call.given["a"].get_device())
        scales.realize()
    kernel = _kernel(call, scales)
    if scales is None and _is_beaten(call, kernel):
        return lower_torch(call)
    result, lasts = autotune(kernel)
    record_kernel(V.graph.current_node, in_words(kernel, lasts, call.last) + memory_in_words(result), kernel.tail.describe())
    return result if scales is None else (result, scales)


def _is_beaten(call: Call, kernel: Kernel) -> bool:
    """Whether AUTO is to take a library's kernels, as they are faster."""
    rival = call.lowering.rival
    return rival is not None and parse(call.given["kernel_preference"]) is KernelPreference.AUTO and is_beaten(kernel, rival)


def _branches(call: Call) -> int | None:
    """The same, where M is asked at run time."""
    return last_triton(call) if has_ranges(*call.given["a"].get_size(), call.given["b"].get_size()[-2]) else None


LAST = "int8_inductor_last"
"""Key of a product node's meta: M beyond which something else runs."""


def _lower_either(call: Call, last: int) -> Any:
    """Templates for M up to `last`, the eager definition beyond."""
    compile_all_ahead(call.given["a"].get_device())
    node = V.graph.current_node
    boxes = {name: (box, argument(node, name).meta["val"]) for name, box in call.given.items() if hasattr(box, "get_dtype")}
    numbers = {name: value for name, value in call.given.items() if name not in boxes}
    calls = [({**numbers, "kernel_preference": kernel}, meta) for kernel, meta in (("triton", {LAST: last}), ("torch", {}))]
    results, nodes = either(call.given["a"].get_size()[0] <= last, call.operator, boxes, calls)
    (few, epilogue), (many, _) = (recorded(each) for each in nodes)
    record_kernel(node, f"{few}; above, {many}", epilogue)
    return results[0] if len(results) == 1 else tuple(results)


def _lower(product: Product, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    call = Call(product, operator, ops.bound(operator, args, kwargs), V.graph.current_node.meta.get(LAST))
    if (last := _branches(call)) is not None:
        return _lower_either(call, last)
    return _lower_triton(call) if runs_triton(call) else lower_torch(call)


def _kernel_ahead(product: Product, operator: torch._ops.OpOverload, given: dict[str, Any], box_like: Callable[[Tensor], Any]) -> Kernel | None:
    """The kernel that will run a call with these arguments, or None; scales that it will write are what `box_like` makes."""
    call, value = Call(product, operator, given), V.graph.current_node.meta["val"]
    call = dataclasses.replace(call, last=_branches(call))
    if call.last is None and not runs_triton(call):
        return None
    return _kernel(call, None if isinstance(value, Tensor) else box_like(value[1]))


def register(product: Product) -> None:
    """Register the lowerings of the two operators of `product`, which LOWERINGS has."""
    for operator in (product.operator, product.block_quant):
        register_lowering(operator, type_promotion_kind=None)(functools.partial(_lower, product, operator))
        KERNELS[operator] = functools.partial(_kernel_ahead, product, operator)


for _product in PRODUCTS:
    register(_product)


@register_lowering(ops.block_requantize, type_promotion_kind=None)
def _lower_block_requantize(q: Any, scale: Any, activation: str = "none", block_size: int = 128) -> Any:
    """The eager definition, in one kernel, whose rows are blocks."""
    fn = functools.partial(ops.requantized_in_whole_blocks, activation=activation, block_size=block_size)
    values, scales = lower_eager(fn, {"q": q, "scale": scale})
    columns = q.get_size()[-1]
    values.realize()  # cut in memory alone: see lower_torch
    return lowerings[aten.slice](values, len(q.get_size()) - 1, 0, columns), scales


@register_lowering(ops.round_to_int8, type_promotion_kind=None)
def _lower_round_to_int8(t: Any, quant_min: int = -128) -> Any:
    """On a GPU the conversion that rounds to nearest even, saturates and makes NaN 0, by itself; elsewhere the eager definition."""
    if not has_ptx(t.get_device()):
        return lower_eager(functools.partial(ops.round_to_int8_eager, quant_min=quant_min), {"t": t})

    def convert(x: Any) -> Any:
        asm = f"cvt.rni.sat.s8.f32 $0, $1; max.s32 $0, $0, {quant_min};"
        steps = inductor_ops.inline_asm_elementwise(x, asm=asm, constraints="=r,f", dtype=torch.int32, is_pure=True, pack=1)
        return inductor_ops.to_dtype(steps, torch.int8)

    return make_pointwise(convert, override_return_dtype=torch.int8)(t)
