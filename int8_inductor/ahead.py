"""Compiling ahead: when a graph's first product is lowered, the kernels of all its products are made for stand-ins of their operands.

A stand-in is a buffer with the sizes and strides that the graph says the operand will have. What Inductor renders for it is, letter for letter, what
it renders for the operand, so the workers' result is found when the product's turn comes; where Inductor has laid the operand out otherwise, the
kernel is compiled then, as it would have been.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.utils import convert_shape_to_inductor
from torch._inductor.virtualized import V

from . import ops
from .autotune import Kernel, compile_ahead

__all__ = ["KERNELS", "compile_all_ahead"]

_GRAPHS: weakref.WeakSet[Any] = weakref.WeakSet()
"""Inductor's graphs whose kernels are under way."""


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Inside the block stand-ins count as inputs of the graph, and are forgotten after it."""
    with mock.patch.dict(V.graph.graph_inputs), mock.patch.object(V.graph, "unaligned_buffers", V.graph.unaligned_buffers.copy()):
        yield


def _stands_for(node: torch.fx.Node) -> Any:
    """A box for what `node` computes; as Inductor knows it to be aligned or not, where it is an input."""
    box = stand_in(node.meta["val"])
    while isinstance(node.target, torch._ops.OpOverload) and node.target.is_view and isinstance(node.args[0], torch.fx.Node):
        node = node.args[0]
    if node.name in V.graph.unaligned_buffers:
        V.graph.unaligned_buffers.add(box.get_name())
    return box


def stand_in(value: Tensor) -> Any:
    """A box for a buffer like the fake tensor `value`."""
    names = (f"ahead{i}" for i in itertools.count(len(V.graph.graph_inputs)))
    name = next(name for name in names if name not in V.graph.graph_inputs)
    sizes, strides = convert_shape_to_inductor(value.size()), convert_shape_to_inductor(value.stride())
    layout = ir.FixedLayout(value.device, value.dtype, sizes, strides, value.storage_offset())
    box = ir.TensorBox.create(ir.InputBuffer(name=name, layout=layout))
    V.graph.graph_inputs[name] = box
    return box


KERNELS: dict[Any, Callable[[dict[str, Any], Callable[[Tensor], Any]], Kernel | None]] = {}
"""Operator -> which kernel will run a call of it, from its arguments by name and what makes a box like a fake tensor; None: no template."""


def compile_all_ahead(device: torch.device) -> None:
    """Start compiling what the products of the graph in progress may need, once a graph; the interpreter on a CPU compiles nothing.

    What a graph calls by M (either.py) is lowered in graphs of their own, for which the graph itself has done it.
    """
    if V.graph in _GRAPHS or getattr(V.graph, "parent", None) in _GRAPHS or device.type == "cpu":
        return
    _GRAPHS.add(V.graph)
    with _stand_ins():
        compile_ahead(_kernels(V.graph.graph))


def _kernels(graph: torch.fx.Graph) -> Iterator[Kernel]:
    """The kernels of a graph's products, on stand-ins, in the order in which they will be asked for."""
    for node in graph.nodes:
        if node.target not in KERNELS:
            continue
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), _stands_for)
        with V.graph.set_current_node(node):
            kernel = KERNELS[node.target](ops.bound(node.target, args, kwargs), stand_in)
        if kernel is not None:
            yield kernel
