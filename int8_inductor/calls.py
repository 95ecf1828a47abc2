"""One call of a product's operator, as Inductor lowers it: what it is given, and which kind of kernel runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import sympy
import torch

from . import ops, reference
from ._compat import size_hint
from .kernels import KernelPreference, parse, resolve
from .operands import device_of, static_size
from .products import Product
from .ranges import last_without
from .templates import LOWERINGS, Lowering
from .templates.problem import Device, Problem
from .templates.tail import OPERANDS, Indexing, Tail
from .templates.types import never

__all__ = ["Call", "last_triton", "runs_triton"]


@dataclasses.dataclass(frozen=True)
class Call:
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


def last_triton(call: Call) -> int | None:
    """The last M for which a template runs, where that depends on a symbolic M."""
    given = call.given
    m, preference = given["a"].get_size()[0], parse(given["kernel_preference"])
    if call.lowering.expands is never or preference is not KernelPreference.AUTO or isinstance(m, (int, sympy.Integer)):
        return None
    if resolve(preference, given["a"].get_device()) is not KernelPreference.TRITON:
        return None
    return last_without(m, lambda rows: call.lowering.expands(dataclasses.replace(call.sizes, m=rows), call.device))


def runs_triton(call: Call) -> bool:
    """Whether a template runs a call, of this M."""
    preference = parse(call.given["kernel_preference"])
    kernel = resolve(preference, call.given["a"].get_device())
    expands = preference is KernelPreference.AUTO and call.lowering.expands(call.sizes, call.device)
    return kernel is KernelPreference.TRITON and not expands
