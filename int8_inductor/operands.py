"""Operands of a product, as Inductor's boxes: how a tail reads them, and what a template is to know of them and of their device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import sympy
import torch
from torch._inductor.lowering import lowerings
from torch._inductor.select_algorithm import realize_inputs
from torch._inductor.virtualized import V

from . import ops
from ._compat import size_hint, writes_python
from .gluon.program import CAPABILITY
from .launching import launches_dependents
from .templates.problem import INTERPRETER, Device, Problem
from .templates.tail import COLUMN, CONSTANT, ROW, ROW_OPERANDS, SCALAR, Indexing

__all__ = [
    "argument",
    "as_operand",
    "computed_once",
    "device_of",
    "fits_tma",
    "has_ptx",
    "is_thorough",
    "problem_of",
    "static_size",
    "with_known_strides",
]

aten = torch.ops.aten

TMA_ALIGNMENT = 16
"""Bytes that a tensor descriptor's strides and base address are multiples of."""


def computed_once(box: Any) -> Any:
    """`box` with what it views in memory. Else each linear that reads a view of one quantized value would have Inductor quantize it anew."""
    box.realize()
    return box


def argument(node: torch.fx.Node, name: str) -> Any:
    """The argument `name` of a call to one of our operators, however it was passed."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return ops.bound(node.target, node.args, node.kwargs)[name]


def _constant(name: str) -> float | None:
    """The value of a scale or zero point that the graph holds as a constant (aten.full), or None."""
    value = argument(V.graph.current_node, name)
    if isinstance(value, torch.fx.Node) and value.target is aten.full.default and isinstance(value.args[1], (int, float)):
        return float(value.args[1])
    return None


def is_one(size: Any) -> bool:
    return bool(V.graph.sizevars.statically_known_equals(size, 1))


def as_operand(name: str, box: Any) -> tuple[Indexing, Any]:
    """How a tail reads operand `name`, and what is passed: a realized vector, or a literal."""
    if (value := _constant(name)) is not None:
        return CONSTANT, repr(value)
    size = box.get_size()
    numel = functools.reduce(lambda x, y: x * y, size, sympy.S.One)
    vector = realize_inputs(lowerings[aten.reshape](box, [numel]))
    if is_one(numel):
        return SCALAR, vector
    return (ROW if name in ROW_OPERANDS else COLUMN), vector


def device_of(device: torch.device, m: Any) -> Device:
    """What templates need to know of a device that multiplies M rows. A branch on M is of Inductor's own templates alone (branches.py)."""
    # Inductor's C++ wrapper (AOTInductor) gives all programs of a launch the memory for one program's descriptors (torch 2.11 to 2.13).
    python_launches = not V.graph.cpp_wrapper
    if device.type == "cpu":
        return dataclasses.replace(INTERPRETER, tma=python_launches, dependent=launches_dependents(device))
    properties: Any = torch.cuda.get_device_properties(device)
    return Device(
        int(properties.shared_memory_per_block_optin),
        int(properties.multi_processor_count),
        tma=properties.major >= 9 and python_launches,
        warpgroups=(properties.major, properties.minor) == CAPABILITY and writes_python() and static_size(m) is not None,
        dependent=launches_dependents(device),
    )


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
    return multiples and rows_apart and aligned and is_one(step)


def static_size(size: Any) -> int | None:
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
        static_k=static_size(k),
        tma=all(map(fits_tma, (a, *weights))),
        one_row=is_one(m),
        groups=groups,
        a_bytes=a.get_dtype().itemsize,
        side_by_side=tuple(rows) if len(rows) > 1 else (),
        static_m=static_size(m),
    )


def with_known_strides(problem: Problem, boxes: list[Any]) -> Problem:
    """`problem`, without tensor descriptors where a stride of what else the kernel reads is symbolic: those templates write strides as numbers."""
    known = all(isinstance(stride, (int, sympy.Integer)) for box in boxes for stride in box.get_stride())
    return problem if known else dataclasses.replace(problem, tma=False)


def is_thorough() -> bool:
    """Whether every legal config is to be timed."""
    from torch._inductor import config as inductor_config

    return bool(inductor_config.max_autotune or inductor_config.max_autotune_gemm)
