"""Lowering: a product's operator -> operands -> choices over its templates -> autotune; or, for KernelPreference.TORCH, aten and pointwise code.

The TORCH path compiles the operator's own eager definition (for scaled_mm, around `_int_mm`), so there is no second spelling of any epilogue.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import empty_strided, lowerings, make_pointwise, process_subgraph_nodes, register_lowering
from torch._inductor.select_algorithm import realize_inputs
from torch._inductor.virtualized import V
from torch._inductor.virtualized import ops as inductor_ops
from torch.fx.experimental.proxy_tensor import make_fx

from . import ops, reference
from ._compat import size_hint
from .ahead import KERNELS, compile_all_ahead
from .autotune import Kernel, autotune, is_beaten
from .either import either
from .explain import record_kernel, recorded
from .gluon.template import memory_in_words
from .kernels import KernelPreference, parse, resolve
from .operands import argument, as_operand, computed_once, device_of, has_ptx, is_thorough, problem_of, static_size, with_known_strides
from .products import PRODUCTS, Product
from .ranges import described, has_ranges, last_without, ranges_of
from .templates import LOWERINGS, Lowering
from .templates.problem import Device, Problem
from .templates.tail import OPERANDS, SCALAR, Indexing, Tail
from .templates.types import never

aten = torch.ops.aten

def _lower_eager(fn: Callable[..., Any], tensors: dict[str, Any]) -> Any:
    """Lower `fn(**tensors)`, an eager function, in place: traced on the fake values, decomposed, and run through Inductor's lowerings."""
    from torch._inductor.decomposition import select_decomp_table

    node = V.graph.current_node
    assert isinstance(node, torch.fx.Node)
    names = list(tensors)
    fakes = [argument(node, name).meta["val"] for name in names]

    def positional(*args: Tensor) -> Any:
        return fn(**dict(zip(names, args, strict=True)))

    with V.fake_mode:
        traced = make_fx(positional, decomposition_table=select_decomp_table())(*fakes)
    return process_subgraph_nodes(traced, [tensors[name] for name in names])


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of one of a product's operators: its arguments by name, as Inductor's boxes and numbers, and what they say about the result.

    last: M beyond which something else runs.
    """

    product: Product
    operator: torch._ops.OpOverload
    given: dict[str, Any]
    last: int | None = None

    @property
    def lowering(self) -> Lowering:
        return LOWERINGS[self.product.name]

    @property
    def name(self) -> str:
        """Of its kernels."""
        return f"int8_{self.operator._schema.name.split('::')[1]}"

    @property
    def operands(self) -> dict[str, Any]:
        """The product's own tensors and numbers."""
        return ops.operands_of(self.given)

    @property
    def device(self) -> Device:
        """What its templates need to know of the device."""
        a = self.given["a"]
        return device_of(a.get_device(), a.get_size()[0])

    @property
    def sizes(self) -> Problem:
        """The product's sizes, of operands that may not be laid out yet."""
        a, ((m, k), n) = self.given["a"], (self.given["a"].get_size(), self.given["b"].get_size()[-2])
        return Problem(size_hint(m), size_hint(n), size_hint(k), None, False, a_bytes=a.get_dtype().itemsize, static_m=static_size(m))

    @property
    def in_tail(self) -> dict[str, Any]:
        """The tensors that the tail reads, those that are there, in its order."""
        return {name: box for name in OPERANDS if name not in self.lowering.loop and (box := self.given.get(name)) is not None}

    @property
    def block_size(self) -> int | None:
        return self.given.get("block_size")

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.block_size is not None else ops.stored_dtype(self.given)

    def tail(self, indexings: Mapping[str, Indexing], *, ptx: bool = False) -> Tail:
        """The tail that reads its operands like that."""
        return dataclasses.replace(
            Tail.of(indexings),
            activation=self.given["activation"],
            out_quant_min=self.given.get("out_quant_min", reference.SYMMETRIC_MIN),
            block_size=self.block_size,
            fast=self.dtype != torch.float32,
            ptx=ptx,
        )


def _kernel(call: _Call, scales: Any = None) -> Kernel:
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


def _lower_triton(call: _Call) -> Any:
    compile_all_ahead(call.given["a"].get_device())
    scales = None
    if call.block_size is not None:
        rows, columns = call.given["a"].get_size()[0], call.given["b"].get_size()[-2]
        blocks = (columns + call.block_size - 1) // call.block_size
        scales = empty_strided([rows, blocks], None, dtype=torch.float32, device=call.given["a"].get_device())
        scales.realize()
    kernel = _kernel(call, scales)
    if scales is None and _is_beaten(call, kernel):
        return _lower_torch(call)
    result, lasts = autotune(kernel)
    record_kernel(V.graph.current_node, in_words(kernel, lasts, call.last) + memory_in_words(result), kernel.tail.describe())
    return result if scales is None else (result, scales)


def _is_beaten(call: _Call, kernel: Kernel) -> bool:
    """Whether AUTO is to take a library's kernels, as they are faster."""
    rival = call.lowering.rival
    return rival is not None and parse(call.given["kernel_preference"]) is KernelPreference.AUTO and is_beaten(kernel, rival)


def _lower_torch(call: _Call) -> Any:
    """Lower the eager definition. What an activation computes is kept, not computed again by each that reads it."""
    given = call.given
    # Constants; the tensors are arguments of `eager`. A box has a dtype.
    numbers = {name: value for name, value in call.operands.items() if value is not None and not hasattr(value, "get_dtype")}
    stored = {name: given[name] for name in ("out_quant_min", "out_dtype") if name in given}

    def eager(*, bias: Tensor | None = None, out_scale: Tensor | None = None, out_zero_point: Tensor | None = None, **tensors: Tensor) -> Any:
        y = ops.linear_eager(call.lowering.eager(**tensors, **numbers), bias, given["activation"])
        return ops.store_blocks_eager(y, call.block_size) if call.block_size else ops.store_eager(y, out_scale, out_zero_point, **stored)

    present = {name: box for name, box in given.items() if hasattr(box, "get_dtype")}
    present |= {name: computed_once(present[name]) for name in ("a", "b")}
    kernel = call.lowering.eager_kernel(call.sizes, call.given["a"].get_device())
    if _last_triton(call) is not None:
        kernel += f", chosen for M = {call.sizes.m}"
    record_kernel(V.graph.current_node, kernel, call.tail(dict.fromkeys(call.in_tail, SCALAR)).describe())
    result = _lower_eager(eager, present)
    if call.block_size:
        # Cut only once it is in memory: Inductor's C++ computes a wrong scale[i // block] where the size of i is no multiple of the block.
        result[0].realize()
        result = lowerings[aten.slice](result[0], 1, 0, given["b"].get_size()[-2]), result[1]
    if given["activation"] != "none":
        for each in result if isinstance(result, (tuple, list)) else (result,):
            each.realize()
    return result


def _runs_triton(call: _Call) -> bool:
    preference = parse(call.given["kernel_preference"])
    kernel = resolve(preference, call.given["a"].get_device())
    expands = preference is KernelPreference.AUTO and call.lowering.expands(call.sizes, call.device)
    return kernel is KernelPreference.TRITON and not expands


def _last_triton(call: _Call) -> int | None:
    """The last M for which a template runs, where that depends on a symbolic M."""
    given = call.given
    m, preference = given["a"].get_size()[0], parse(given["kernel_preference"])
    if call.lowering.expands is never or preference is not KernelPreference.AUTO or isinstance(m, (int, sympy.Integer)):
        return None
    if resolve(preference, given["a"].get_device()) is not KernelPreference.TRITON:
        return None
    return last_without(m, lambda rows: call.lowering.expands(dataclasses.replace(call.sizes, m=rows), call.device))


def _branches(call: _Call) -> int | None:
    """The same, where M is asked at run time."""
    return _last_triton(call) if has_ranges(*call.given["a"].get_size(), call.given["b"].get_size()[-2]) else None


LAST = "int8_inductor_last"
"""Key of a product node's meta: M beyond which something else runs."""


def _lower_either(call: _Call, last: int) -> Any:
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
    call = _Call(product, operator, ops.bound(operator, args, kwargs), V.graph.current_node.meta.get(LAST))
    if (last := _branches(call)) is not None:
        return _lower_either(call, last)
    return _lower_triton(call) if _runs_triton(call) else _lower_torch(call)


def _kernel_ahead(product: Product, operator: torch._ops.OpOverload, given: dict[str, Any], box_like: Callable[[Tensor], Any]) -> Kernel | None:
    """The kernel that will run a call with these arguments, or None; scales that it will write are what `box_like` makes."""
    call, value = _Call(product, operator, given), V.graph.current_node.meta["val"]
    call = dataclasses.replace(call, last=_branches(call))
    if call.last is None and not _runs_triton(call):
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
    values, scales = _lower_eager(fn, {"q": q, "scale": scale})
    columns = q.get_size()[-1]
    values.realize()  # cut in memory alone: see _lower_torch
    return lowerings[aten.slice](values, len(q.get_size()) - 1, 0, columns), scales


@register_lowering(ops.round_to_int8, type_promotion_kind=None)
def _lower_round_to_int8(t: Any, quant_min: int = -128) -> Any:
    """On a GPU the conversion that rounds to nearest even, saturates and makes NaN 0, by itself; elsewhere the eager definition."""
    if not has_ptx(t.get_device()):
        return _lower_eager(functools.partial(ops.round_to_int8_eager, quant_min=quant_min), {"t": t})

    def convert(x: Any) -> Any:
        asm = f"cvt.rni.sat.s8.f32 $0, $1; max.s32 $0, $0, {quant_min};"
        steps = inductor_ops.inline_asm_elementwise(x, asm=asm, constraints="=r,f", dtype=torch.int32, is_pure=True, pack=1)
        return inductor_ops.to_dtype(steps, torch.int8)

    return make_pointwise(convert, override_return_dtype=torch.int8)(t)
