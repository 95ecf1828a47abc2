"""One of two calls of an operator, by a size: `if M <= 191: ... else: ...` in Inductor's wrapper, for calls that are lowered to more than one kernel.

Each is lowered as a graph of its own, which becomes a function in the generated module. What follows is not fused into either (branches.py does that
where both are one kernel), but a CUDA graph, recorded for each M, holds the call of that M: Inductor's own node for torch.cond ends a CUDA graph.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.utils import convert_shape_to_inductor
from torch._inductor.virtualized import V

from .branches import indent

__all__ = ["either"]

ALIGNMENT = 16
"""Bytes at whose multiples Inductor has tensors begin."""


class _Either(ir.ExternKernel):
    """The buffer of the results, in Inductor's graph."""

    def __init__(self, condition: sympy.Expr, operands: Sequence[Any], symbols: Sequence[sympy.Symbol], graphs: Sequence[ir.Subgraph]) -> None:
        layout = ir.MultiOutputLayout(device=operands[0].get_device())
        super().__init__(name=None, layout=layout, inputs=list(operands), constant_args=tuple(symbols))
        self.condition, self.operands, self.symbols, self.graphs = condition, operands, symbols, graphs
        self.name = V.graph.register_buffer(self)
        V.graph.register_operation(self)

    def codegen(self, wrapper: Any) -> None:
        arguments = ", ".join([*map(str, self.symbols), *(each.codegen_reference() for each in self.operands)])
        for graph in self.graphs:
            wrapper.codegen_subgraph_common(graph)
            wrapper.pop_codegened_graph()
        for head, graph in zip((f"if {wrapper.codegen_python_sizevar(self.condition)}:", "else:"), self.graphs, strict=True):
            assert graph.graph is not None
            with indent(wrapper, head):
                wrapper.writeline(f"{self.get_name()} = {graph.graph.name}([{arguments}])")


def _symbols(tensors: Sequence[Tensor], *others: sympy.Expr) -> list[sympy.Symbol]:
    """Those of all sizes and strides of `tensors`, and of others."""
    sizes = [each for t in tensors for each in convert_shape_to_inductor((*t.size(), *t.stride()))]
    return sorted({symbol for each in (*sizes, *others) for symbol in sympy.sympify(each).free_symbols}, key=str)


def _graph(target: Any, inputs: Sequence[Any], names: Sequence[str], constants: Mapping[str, Any], meta: Mapping[str, Any]) -> torch.fx.GraphModule:
    """A graph that calls `target`; the last of its inputs are the arguments `names`."""
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(f"input_{i}") for i in range(len(inputs))]
    for node, value in zip(nodes, inputs, strict=True):
        node.meta["val"] = value
    call = graph.call_function(target, (), {**constants, **dict(zip(names, nodes[-len(names) :], strict=True))})
    call.meta.update(meta)
    results = [call]
    if not isinstance(meta["val"], Tensor):
        results = [graph.call_function(operator.getitem, (call, i)) for i in range(len(meta["val"]))]
        for node, value in zip(results, meta["val"], strict=True):
            node.meta["val"] = value
    graph.output(tuple(results))
    return torch.fx.GraphModule({}, graph)


def _lowered(name: str, module: torch.fx.GraphModule, inputs: Sequence[Any], unaligned: Sequence[bool], results: Sequence[Tensor]) -> ir.Subgraph:
    """The graph lowered, with results that have the strides of `results`."""
    graph = V.graph.make_subgraph(module, list(inputs), name)
    placeholders = [graph.qualify_name(node.name) for node in module.graph.nodes if node.op == "placeholder"]
    graph.unaligned_buffers.update(each for each, is_unaligned in zip(placeholders[-len(unaligned) :], unaligned, strict=True) if is_unaligned)
    with V.set_graph_handler(graph):
        graph.run(*inputs)
        outputs = zip(results, graph.graph_outputs, strict=True)
        graph.graph_outputs = [_with_strides_of(result, ir.TensorBox(output)) for result, output in outputs]
    return ir.Subgraph(name=graph.name, graph_module=module, graph=graph)


def _with_strides_of(value: Tensor, box: Any) -> Any:
    return ir.ExternKernel.require_exact_strides(box, convert_shape_to_inductor(value.stride()))


def _is_unaligned(box: Any) -> bool:
    offset = box.get_layout().offset * box.get_dtype().itemsize
    return box.get_name() in V.graph.unaligned_buffers or not V.graph.sizevars.statically_known_multiple_of(offset, ALIGNMENT)


def either(
    condition: sympy.Expr,
    target: Any,
    boxes: Mapping[str, tuple[Any, Tensor]],
    calls: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> tuple[list[Any], list[torch.fx.Node]]:
    """The results of the first of two calls of the operator `target` where `condition` holds, else of the second; and the nodes of both calls.

    boxes: the tensors among its arguments, by name, and the graph's values for them. calls: other arguments and meta of each.
    """
    values = [value for _, value in boxes.values()]
    operands = [_with_strides_of(value, ir.ExternKernel.realize_input(box)) for box, value in boxes.values()]
    symbols, shape_env = _symbols(values, condition), V.graph.sizevars.shape_env
    hints = [int(hint) if (hint := shape_env.backed_var_to_val.get(symbol)) is not None else None for symbol in symbols]
    inputs = [*(shape_env.create_symintnode(symbol, hint=hint) for symbol, hint in zip(symbols, hints, strict=True)), *values]
    value = V.graph.current_node.meta["val"]
    results = [value] if isinstance(value, Tensor) else list(value)
    unaligned = list(map(_is_unaligned, operands))
    graphs: list[ir.Subgraph] = []
    for constants, meta in calls:
        module = _graph(target, inputs, list(boxes), constants, {**meta, "val": value})
        graphs.append(_lowered(f"either_{V.graph.current_node.name}_{len(graphs)}", module, inputs, unaligned, results))
    buffer = _Either(condition, operands, symbols, graphs)
    outputs = [
        ir.MultiOutput(
            ir.FixedLayout(each.device, each.dtype, convert_shape_to_inductor(each.size()), convert_shape_to_inductor(each.stride())),
            buffer,
            [(list, i)],
        )
        for i, each in enumerate(results)
    ]
    nodes = [next(node for node in graph.graph_module.graph.nodes if node.target is target) for graph in graphs]
    return [ir.TensorBox.create(output) for output in outputs], nodes
