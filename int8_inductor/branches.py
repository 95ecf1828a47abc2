"""A template's result that one of several kernels computes, picked by a size: `if M <= 16: ... elif M <= 64: ... else: ...` in Inductor's wrapper.

To Inductor's scheduler it is one template's buffer: what follows is fused into each of the kernels, memory is planned once, second outputs are what
they are for one kernel, and a CUDA graph, recorded for each M, holds the kernel of that M. torch.cond would do none of that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch._inductor.codegen.simd import SIMDScheduling
from torch._inductor.codegen.wrapper import WrapperLine
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

__all__ = ["branch", "indent"]

_KERNELS = "_int8_inductor_kernels"
"""An attribute of a template's buffer: the kernels to pick from, as pairs of the largest size that each is for (None: any) and what renders it."""
_SIZE = "_int8_inductor_size"
"""The size that picks."""


def branch(choices: Sequence[tuple[int | None, Any]], size: Any) -> Any:
    """The TensorBox of a result that the first of `choices`, Inductor's TritonTemplateCallers, computes for which `size` is not too large."""
    last, choice = choices[-1]
    assert last is None, "the last kernel must be for any size"
    box = choice.output_node()
    if len(choices) > 1:
        _install()
        buffer = box.data.data
        setattr(buffer, _KERNELS, [(last, each.make_kernel_render) for last, each in choices])
        setattr(buffer, _SIZE, size)
    return box


@dataclass
class _Indent(WrapperLine):
    """The wrapper's lines from here on stand so many steps further in."""

    steps: int

    def codegen(self, code: Any) -> None:
        code.do_indent(self.steps)


@contextmanager
def indent(wrapper: Any, head: str) -> Iterator[None]:
    """What is written to Inductor's wrapper inside the block stands below the line `head`."""
    wrapper.writeline(head)
    wrapper.writeline(_Indent(1))
    yield
    wrapper.writeline(_Indent(-1))


def _install() -> None:
    """Have Inductor write the branch where it writes a template's kernel."""
    stock = SIMDScheduling.codegen_template
    if hasattr(stock, _KERNELS):
        return

    @functools.wraps(stock)
    def codegen_template(self: Any, template_node: Any, epilogue_nodes: Any, prologue_nodes: Any, **kwargs: Any) -> Any:
        # For its source alone, which Inductor times, one kernel stands for all.
        if not hasattr(template_node.node, _KERNELS) or kwargs.get("only_gen_src_code"):
            return stock(self, template_node, epilogue_nodes, prologue_nodes, **kwargs)
        return _write(self, template_node, epilogue_nodes, prologue_nodes)

    setattr(codegen_template, _KERNELS, True)
    SIMDScheduling.codegen_template = codegen_template  # type: ignore[method-assign]


def _write(scheduling: Any, template_node: Any, epilogue_nodes: Any, prologue_nodes: Any) -> None:
    """Define the kernels with what is fused into them, allocate what they write, and call the one for the size."""
    node = template_node.node
    kernels = []
    for last, make_kernel_render in getattr(node, _KERNELS):
        kernel, render = make_kernel_render(node)
        kernels.append((last, scheduling._codegen_single_template(kernel, render, template_node, epilogue_nodes, prologue_nodes)))
    scheduling.codegen_comment([*prologue_nodes, template_node, *epilogue_nodes], kernels[0][1].kernel_name)
    _write_calls(kernels, node, V.graph.wrapper_code)
    V.graph.removed_buffers |= OrderedSet.intersection(*(kernel.removed_buffers for _, kernel in kernels))
    V.graph.inplaced_to_remove |= OrderedSet.intersection(*(kernel.inplaced_to_remove for _, kernel in kernels))
    scheduling.free_buffers_in_scheduler()


def _write_calls(kernels: Sequence[tuple[int | None, Any]], node: Any, wrapper: Any) -> None:
    size = wrapper.codegen_python_sizevar(getattr(node, _SIZE))
    for i, (last, kernel) in enumerate(kernels):
        with indent(wrapper, "else:" if last is None else f"{'el' if i else ''}if {size} <= {last}:"):
            kernel.call_kernel(kernel.kernel_name, node)
