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
from .autotune import Kernel, autotune
from .explain import record_kernel
from .kernels import KernelPreference, parse, resolve
from .products import PRODUCTS, Product
from .templates import LOWERINGS, Lowering
from .templates.problem import INTERPRETER, Device, Problem
from .templates.tail import COLUMN, CONSTANT, OPERANDS, ROW, ROW_OPERANDS, SCALAR, Indexing, Tail

aten = torch.ops.aten

TMA_ALIGNMENT = 16
"""Bytes that a tensor descriptor's strides and base address are multiples of."""


def _lower_eager(fn: Callable[..., Any], tensors: dict[str, Any]) -> Any:
    """Lower `fn(**tensors)`, an eager function, in place: traced on the fake values, decomposed, and run through Inductor's lowerings."""
    from torch._inductor.decomposition import select_decomp_table

    node = V.graph.current_node
    assert isinstance(node, torch.fx.Node)
    names = list(tensors)
    fakes = [_argument(node, name).meta["val"] for name in names]

    def positional(*args: Tensor) -> Any:
        return fn(**dict(zip(names, args, strict=True)))

    with V.fake_mode:
        traced = make_fx(positional, decomposition_table=select_decomp_table())(*fakes)
    return process_subgraph_nodes(traced, [tensors[name] for name in names])


def computed_once(box: Any) -> Any:
    """`box` with what it views in memory. Else each linear that reads a view of one quantized value would have Inductor quantize it anew."""
    box.realize()
    return box


def _argument(node: torch.fx.Node, name: str) -> Any:
    """The argument `name` of a call to one of our operators, however it was passed."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return ops.bound(node.target, node.args, node.kwargs)[name]


def _constant(name: str) -> float | None:
    """The value of a scale or zero point that the graph holds as a constant (aten.full), or None."""
    value = _argument(V.graph.current_node, name)
    if isinstance(value, torch.fx.Node) and value.target is aten.full.default and isinstance(value.args[1], (int, float)):
        return float(value.args[1])
    return None


def _is_one(size: Any) -> bool:
    return bool(V.graph.sizevars.statically_known_equals(size, 1))


def as_operand(name: str, box: Any) -> tuple[Indexing, Any]:
    """How a tail reads operand `name`, and what is passed: a realized vector, or a literal."""
    if (value := _constant(name)) is not None:
        return CONSTANT, repr(value)
    size = box.get_size()
    numel = functools.reduce(lambda x, y: x * y, size, sympy.S.One)
    vector = realize_inputs(lowerings[aten.reshape](box, [numel]))
    if _is_one(numel):
        return SCALAR, vector
    return (ROW if name in ROW_OPERANDS else COLUMN), vector


def device_of(device: torch.device) -> Device:
    """What templates need to know of a device."""
    # Inductor's C++ wrapper (AOTInductor) gives all programs of a launch the memory for one program's descriptors (torch 2.11 to 2.13).
    python_launches = not V.graph.cpp_wrapper
    if device.type == "cpu":
        return dataclasses.replace(INTERPRETER, tma=python_launches)
    properties: Any = torch.cuda.get_device_properties(device)
    tma = properties.major >= 9 and python_launches
    return Device(int(properties.shared_memory_per_block_optin), int(properties.multi_processor_count), tma)


def has_ptx(device: torch.device) -> bool:
    """Whether kernels for `device` may hold a GPU's own instructions; the interpreter on a CPU knows none."""
    return device.type == "cuda"


def fits_tma(matrix: Any) -> bool:
    """Whether a tensor descriptor can name a matrix, or a stack of them, whatever its symbolic sizes are: rows begin at multiples of 16 bytes."""
    sizevars, (*outer, row, step), columns = V.graph.sizevars, matrix.get_stride(), matrix.get_size()[-1]
    alignment = TMA_ALIGNMENT // matrix.get_dtype().itemsize
    multiples = all(sizevars.statically_known_multiple_of(each, alignment) for each in (*outer, row, columns, matrix.get_layout().offset))
    rows_apart = sizevars.statically_known_geq(row, columns)
    # Inductor promises nothing of a CPU's memory, and the interpreter asks nothing of it.
    aligned = matrix.get_device().type == "cpu" or matrix.get_name() not in V.graph.unaligned_buffers
    return multiples and rows_apart and aligned and _is_one(step)


def _static(size: Any) -> int | None:
    """A size that is known at compile time, or None."""
    return int(size) if isinstance(size, (int, sympy.Integer)) else None


def problem_of(a: Any, *weights: Any, groups: tuple[int, ...] = ()) -> Problem:
    """The Problem of realized boxes a [M, K] and a weight, or several that lie side by side."""
    m, k = a.get_size()
    rows = [size_hint(b.get_size()[-2]) for b in weights]
    return Problem(
        size_hint(m),
        sum(rows),
        size_hint(k),
        static_k=_static(k),
        tma=all(map(fits_tma, (a, *weights))),
        one_row=_is_one(m),
        groups=groups,
        a_bytes=a.get_dtype().itemsize,
        side_by_side=tuple(rows) if len(rows) > 1 else (),
        static_m=_static(m),
    )


def is_thorough() -> bool:
    """Whether every legal config is to be timed."""
    from torch._inductor import config as inductor_config

    return bool(inductor_config.max_autotune or inductor_config.max_autotune_gemm)


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of one of a product's operators: its arguments by name, as Inductor's boxes and numbers, and what they say about the result."""

    lowering: Lowering
    name: str
    given: dict[str, Any]

    @property
    def operands(self) -> dict[str, Any]:
        """The product's own tensors and numbers."""
        return ops.operands_of(self.given)

    @property
    def sizes(self) -> Problem:
        """The product's sizes, of operands that may not be laid out yet."""
        a, ((m, k), n) = self.given["a"], (self.given["a"].get_size(), self.given["b"].get_size()[-2])
        return Problem(size_hint(m), size_hint(n), size_hint(k), None, False, a_bytes=a.get_dtype().itemsize)

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
        problem=problem_of(a, b, groups=lowering.groups(call.operands)),
        device=device_of(device),
        inputs=inputs + mutated,
        layout=ir.FixedLayout(device, call.dtype, [a.get_size()[0], b.get_size()[-2]]),
        mutated=mutated,
        literals=literals,
        thorough=is_thorough(),
    )


def _lower_triton(call: _Call) -> Any:
    compile_all_ahead(call.given["a"].get_device())
    scales = None
    if call.block_size is not None:
        rows, columns = call.given["a"].get_size()[0], call.given["b"].get_size()[-2]
        blocks = (columns + call.block_size - 1) // call.block_size
        scales = empty_strided([rows, blocks], None, dtype=torch.float32, device=call.given["a"].get_device())
        scales.realize()
    kernel = _kernel(call, scales)
    result = autotune(kernel)
    record_kernel(V.graph.current_node, "triton", kernel.tail.describe())
    return result if scales is None else (result, scales)


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
    kernel = call.lowering.eager_kernel(call.sizes)
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


def _call(product: Product, operator: torch._ops.OpOverload, given: dict[str, Any]) -> _Call:
    return _Call(LOWERINGS[product.name], f"int8_{operator._schema.name.split('::')[1]}", given)


def _runs_triton(call: _Call) -> bool:
    preference = parse(call.given["kernel_preference"])
    kernel = resolve(preference, call.given["a"].get_device())
    expands = preference is KernelPreference.AUTO and call.lowering.expands(call.sizes)
    return kernel is KernelPreference.TRITON and not expands


def _lower(product: Product, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    call = _call(product, operator, ops.bound(operator, args, kwargs))
    return _lower_triton(call) if _runs_triton(call) else _lower_torch(call)


def _kernel_ahead(product: Product, operator: torch._ops.OpOverload, given: dict[str, Any], box_like: Callable[[Tensor], Any]) -> Kernel | None:
    """The kernel that will run a call with these arguments, or None; scales that it will write are what `box_like` makes."""
    call, value = _call(product, operator, given), V.graph.current_node.meta["val"]
    return _kernel(call, None if isinstance(value, Tensor) else box_like(value[1])) if _runs_triton(call) else None


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
