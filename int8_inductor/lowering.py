"""Lowering: scaled_mm -> operands -> choices over TEMPLATES -> autotune; or, for KernelPreference.TORCH, aten._int_mm and pointwise code.

The TORCH path compiles the operator's own eager definition (ops.py) around `_int_mm`, so there is no second spelling of any epilogue.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import empty_strided, lowerings, make_pointwise, process_subgraph_nodes, register_lowering
from torch._inductor.select_algorithm import realize_inputs
from torch._inductor.virtualized import V
from torch._inductor.virtualized import ops as inductor_ops
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import ops
from ._compat import size_hint
from .autotune import autotune
from .explain import record_kernel
from .kernels import KernelPreference, parse, resolve
from .templates.problem import INTERPRETER, Device, Problem
from .templates.tail import COLUMN, CONSTANT, ROW, SCALAR, Indexing, Tail

aten = torch.ops.aten

_ROW_OPERANDS = ("a_scale", "a_zero_point", "out_scale", "out_zero_point")
_COLUMN_OPERANDS = ("b_scale", "b_zero_point", "bias")
_OPERAND_ORDER = ("a_scale", "b_scale", "a_zero_point", "b_zero_point", "bias", "out_scale", "out_zero_point")

# cuBLASLt's int8 product wants M > 16 and N and K in multiples of 8.
_INT_MM_MIN_M = 17
_INT_MM_MULTIPLE = 8

TMA_ALIGNMENT = 16
"""Bytes (and int8 elements) that a tensor descriptor's strides and base address are multiples of."""


def _cuda_padding(m: Any, n: Any, k: Any) -> tuple[Any, Any, Any]:
    """How many rows of M, rows of N and columns of K the int8 product lacks on a GPU."""
    return 0 if statically_known_true(m >= _INT_MM_MIN_M) else _INT_MM_MIN_M - 1, -n % _INT_MM_MULTIPLE, -k % _INT_MM_MULTIPLE


def _cpu_padding(m: Any, n: Any, k: Any) -> tuple[Any, Any, Any]:
    """The same on a CPU, where oneDNN leaves the result unwritten when a size is 1 and its stride is not what it expects (pytorch issue 195066)."""
    rows, columns, depth = (0 if statically_known_true(size >= 2) else 1 for size in (m, n, k))
    return rows, columns, depth


def _unexpanded(t: Tensor) -> Tensor:
    """`t` with memory of its own where a stride is 0: oneDNN computes something else then."""
    return t.clone(memory_format=torch.contiguous_format) if any(statically_known_true(stride == 0) for stride in t.stride()) else t


def _row_major(t: Tensor) -> Tensor:
    """`t` with K contiguous, as cuBLASLt wants both operands. Inductor drops a plain .contiguous() where it lays out a padded operand itself."""
    forced: Tensor = torch.ops.prims.inductor_force_stride_order.default(t.contiguous(), (t.shape[1], 1))
    return forced


def _padded_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """aten._int_mm of a [M, K] and b [N, K], with a and b padded by zeros to the sizes for which it works on their device."""
    (m, k), n = a.shape, b.shape[0]
    on_cpu = a.device.type == "cpu"
    rows, columns, depth = (_cpu_padding if on_cpu else _cuda_padding)(m, n, k)
    padded_a = F.pad(a, (0, depth, 0, rows)) if rows or depth else a
    padded_b = F.pad(b, (0, depth, 0, columns)) if columns or depth else b
    if on_cpu:
        product = torch._int_mm(_unexpanded(padded_a), _unexpanded(padded_b).t())
    else:
        product = torch._int_mm(_row_major(padded_a), _row_major(padded_b).t())
    return product[:m, :n] if rows or columns else product


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


def _computed_once(box: Any) -> Any:
    """`box` with what it views in memory. Else each linear that reads a view of one quantized value would have Inductor quantize it anew."""
    box.realize()
    return box


def _lower_torch(eager: Callable[..., Any], a: Any, b: Any, operands: dict[str, Any], activation: str) -> Any:
    """Lower `eager` around `_int_mm`. What an activation computes is kept, not computed again by each that reads it."""
    present = {name: box for name, box in operands.items() if box is not None}
    result = _lower_eager(eager, {"a": _computed_once(a), "b": _computed_once(b), **present})
    if activation != "none":
        for each in result if isinstance(result, (tuple, list)) else (result,):
            each.realize()
    return result


def _argument(node: torch.fx.Node, name: str) -> Any:
    """The argument `name` of a call to one of our operators, however it was passed."""
    assert isinstance(node.target, torch._ops.OpOverload)
    normalized = dict(node.kwargs)
    for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
        normalized[argument.name] = value
    return normalized.get(name)


def _constant(name: str) -> float | None:
    """The value of a scale or zero point that the graph holds as a constant (aten.full), or None."""
    value = _argument(V.graph.current_node, name)
    if isinstance(value, torch.fx.Node) and value.target is aten.full.default and isinstance(value.args[1], (int, float)):
        return float(value.args[1])
    return None


def _is_one(size: Any) -> bool:
    return bool(V.graph.sizevars.statically_known_equals(size, 1))


def _as_operand(name: str, box: Any) -> tuple[Indexing, Any]:
    """How a tail reads operand `name`, and what is passed: a realized vector, or a literal."""
    if (value := _constant(name)) is not None:
        return CONSTANT, repr(value)
    size = box.get_size()
    numel = functools.reduce(lambda x, y: x * y, size, sympy.S.One)
    vector = realize_inputs(lowerings[aten.reshape](box, [numel]))
    if _is_one(numel):
        return SCALAR, vector
    return (ROW if name in _ROW_OPERANDS else COLUMN), vector


def _device(device: torch.device) -> Device:
    # Inductor's C++ wrapper (AOTInductor) gives all programs of a launch the memory for one program's descriptors (torch 2.11 to 2.13).
    python_launches = not V.graph.cpp_wrapper
    if device.type == "cpu":
        return dataclasses.replace(INTERPRETER, tma=python_launches)
    properties: Any = torch.cuda.get_device_properties(device)
    tma = properties.major >= 9 and python_launches
    return Device(int(properties.shared_memory_per_block_optin), int(properties.multi_processor_count), tma)


def _has_ptx(device: torch.device) -> bool:
    """Whether kernels for `device` may hold a GPU's own instructions; the interpreter on a CPU knows none."""
    return device.type == "cuda"


def _fits_tma(matrix: Any) -> bool:
    """Whether a tensor descriptor can name an int8 matrix, whatever its symbolic sizes are: 16-byte steps from row to row, and to the first."""
    sizevars, (row, step), columns = V.graph.sizevars, matrix.get_stride(), matrix.get_size()[1]
    multiples = all(sizevars.statically_known_multiple_of(each, TMA_ALIGNMENT) for each in (row, columns, matrix.get_layout().offset))
    rows_apart = sizevars.statically_known_geq(row, columns)
    # Inductor promises nothing of a CPU's memory, and the interpreter asks nothing of it.
    aligned = matrix.get_device().type == "cpu" or matrix.get_name() not in V.graph.unaligned_buffers
    return multiples and rows_apart and aligned and _is_one(step)


def _problem(a: Any, b: Any) -> Problem:
    (m, k), n = a.get_size(), b.get_size()[0]
    static_k = int(k) if isinstance(k, (int, sympy.Integer)) else None
    return Problem(size_hint(m), size_hint(n), size_hint(k), static_k, tma=_fits_tma(a) and _fits_tma(b), one_row=_is_one(m))


def _lower_triton(
    name: str, a: Any, b: Any, operands: dict[str, Any], dtype: torch.dtype, *, activation: str, out_quant_min: int, block_size: int | None
) -> Any:
    from torch._inductor import config as inductor_config

    a, b = realize_inputs(_computed_once(a)), realize_inputs(_computed_once(b))
    m, n = a.get_size()[0], b.get_size()[0]
    device = a.get_device()
    indexings: dict[str, Indexing] = {}
    literals: dict[str, str] = {}
    inputs = [a, b]
    for operand, box in operands.items():
        if box is None:
            continue
        indexings[operand], value = _as_operand(operand, box)
        if indexings[operand].is_argument:
            inputs.append(value)
        else:
            literals[operand.upper()] = value
    tail = dataclasses.replace(
        Tail.of(indexings),
        activation=activation,
        out_quant_min=out_quant_min,
        block_size=block_size,
        fast=dtype != torch.float32,
        ptx=_has_ptx(device),
    )
    mutated = []
    if block_size is not None:
        scales = empty_strided([m, n // block_size], None, dtype=torch.float32, device=device)
        scales.realize()
        mutated = [realize_inputs(scales)]
        inputs += mutated
    layout = ir.FixedLayout(device, dtype, [m, n])
    thorough = bool(inductor_config.max_autotune or inductor_config.max_autotune_gemm)
    result = autotune(name, tail, _problem(a, b), _device(device), inputs, layout, mutated, literals, thorough=thorough)
    record_kernel(V.graph.current_node, "triton", tail.describe())
    return (result, scales) if block_size is not None else result


def _kernel(preference: str, a: Any) -> KernelPreference:
    return resolve(parse(preference), a.get_device())


def _present(boxes: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(_OPERAND_ORDER, boxes, strict=True))


def _describe(operands: dict[str, Any], activation: str, block_size: int | None = None) -> str:
    """The epilogue in words, for reports, as the templates have it."""
    present = {name: SCALAR for name, box in operands.items() if box is not None}
    return dataclasses.replace(Tail.of(present), activation=activation, block_size=block_size).describe()


@register_lowering(ops.scaled_mm, type_promotion_kind=None)
def _lower_scaled_mm(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    a_zero_point: Any = None,
    b_zero_point: Any = None,
    bias: Any = None,
    *,
    activation: str = "none",
    kernel_preference: str = "auto",
    out_scale: Any = None,
    out_zero_point: Any = None,
    out_quant_min: int = -128,
    out_dtype: torch.dtype | None = None,
) -> Any:
    operands = _present((a_scale, b_scale, a_zero_point, b_zero_point, bias, out_scale, out_zero_point))
    dtype = torch.int8 if out_scale is not None else out_dtype or torch.float32
    if _kernel(kernel_preference, a) is KernelPreference.TRITON:
        return _lower_triton("int8_scaled_mm", a, b, operands, dtype, activation=activation, out_quant_min=out_quant_min, block_size=None)

    def eager(*, out_scale: Tensor | None = None, out_zero_point: Tensor | None = None, **linear: Any) -> Tensor:
        y = ops.linear_eager(**linear, activation=activation, int_mm=_padded_int_mm)
        return ops.store_eager(y, out_scale, out_zero_point, out_quant_min, out_dtype)

    record_kernel(V.graph.current_node, "aten._int_mm", _describe(operands, activation))
    return _lower_torch(eager, a, b, operands, activation)


@register_lowering(ops.scaled_mm_block_quant, type_promotion_kind=None)
def _lower_scaled_mm_block_quant(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    a_zero_point: Any = None,
    b_zero_point: Any = None,
    bias: Any = None,
    *,
    activation: str = "none",
    kernel_preference: str = "auto",
    block_size: int = 128,
) -> Any:
    operands = _present((a_scale, b_scale, a_zero_point, b_zero_point, bias, None, None))
    if _kernel(kernel_preference, a) is KernelPreference.TRITON:
        return _lower_triton(
            "int8_scaled_mm_block_quant", a, b, operands, torch.int8, activation=activation, out_quant_min=-127, block_size=block_size
        )

    def eager(**linear: Any) -> tuple[Tensor, Tensor]:
        from .reference import quantize_blocks

        return quantize_blocks(ops.linear_eager(**linear, activation=activation, int_mm=_padded_int_mm), block_size)

    record_kernel(V.graph.current_node, "aten._int_mm", _describe(operands, activation, block_size))
    return _lower_torch(eager, a, b, operands, activation)


@register_lowering(ops.round_to_int8, type_promotion_kind=None)
def _lower_round_to_int8(t: Any, quant_min: int = -128) -> Any:
    """On a GPU the conversion that rounds to nearest even, saturates and makes NaN 0, by itself; elsewhere the eager definition."""
    if not _has_ptx(t.get_device()):
        return _lower_eager(functools.partial(ops.round_to_int8_eager, quant_min=quant_min), {"t": t})

    def convert(x: Any) -> Any:
        asm = f"cvt.rni.sat.s8.f32 $0, $1; max.s32 $0, $0, {quant_min};"
        steps = inductor_ops.inline_asm_elementwise(x, asm=asm, constraints="=r,f", dtype=torch.int32, is_pure=True, pack=1)
        return inductor_ops.to_dtype(steps, torch.int8)

    return make_pointwise(convert, override_return_dtype=torch.int8)(t)
