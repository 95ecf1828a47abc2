"""A Gluon kernel as one of Inductor's choices: its text, rendered for one product, is a constant of a call in the generated code."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from torch._inductor.select_algorithm import ExternKernelChoice

from . import program
from .program import Launch

__all__ = ["GluonTemplate", "is_gluon", "memory_in_words", "swapped"]

_RUN = ExternKernelChoice(program.run, name="int8_inductor_gluon")
"""`extern_kernels.int8_inductor_gluon`, as generated code calls it; registered wherever this package's lowerings are."""


def is_gluon(choice: Any) -> bool:
    """Whether a choice is one of these kernels."""
    return getattr(choice, "choice", None) is _RUN


def memory_in_words(box: Any) -> str:
    """What memory the kernel of a result takes while it runs, where it is one of these and takes any: words that follow the kernel's."""
    buffer = box.data.data
    if getattr(buffer, "python_kernel_name", None) != _RUN.call_name():
        return ""
    how = Launch.from_json(buffer.kwargs["launch"])
    if how.splits > 1:
        return f", K in {how.splits} parts with {4 * how.sums(int(buffer.get_size()[0]))} bytes of sums"
    return f", the weight unpacked to {how.unpacked} bytes" if how.unpacked else ""


def swapped(statements: Sequence[str]) -> list[str]:
    """A tail's statements for a tile that lies transposed: what was indexed by rows is indexed by columns, and the other way round."""
    flip = {"[:, None]": "[None, :]", "[None, :]": "[:, None]"}
    return [re.sub(r"\[:, None\]|\[None, :\]", lambda match: flip[match.group()], line) for line in statements]


def _constant(value: Any) -> str:
    """A number of the graph as text: `0.5`, or its text already."""
    return value if isinstance(value, str) else repr(value)


@dataclass(frozen=True)
class GluonTemplate:
    """A kernel's text with Jinja's `size(name, dim)` and `stride(name, dim)` of its operands, as TritonTemplate has them, and its constants by name.

    names: of the operands, in order. launch(operands, result dtype, constants) -> Launch.
    """

    source: str
    names: tuple[str, ...]
    launch: Callable[..., Launch]

    def render(self, boxes: Sequence[Any], constants: dict[str, Any]) -> str:
        """The kernel's module for operands with these layouts."""
        by_name = dict(zip(self.names, boxes, strict=True))

        def size(name: str, dim: int) -> str:
            return str(int(by_name[name].get_size()[dim]))

        def stride(name: str, dim: int) -> str:
            return str(int(by_name[name].get_stride()[dim]))

        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        literals = {name: _constant(value) for name, value in constants.items()}
        return environment.from_string(self.source).render(size=size, stride=stride, **literals)

    def maybe_append_choice(
        self, choices: list[Any], input_nodes: Sequence[Any], layout: Any, mutated_inputs: Any, triton_meta: Any = None, **constants: Any
    ) -> None:
        """TritonTemplate's method of that name; nothing is declined here, and a second output is not for these kernels."""
        assert mutated_inputs is None
        how = self.launch(input_nodes, layout, constants)
        text = self.render(input_nodes, constants)
        choices.append(_RUN.bind(list(input_nodes), layout, source=text, launch=how.to_json()))
