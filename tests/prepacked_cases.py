"""What the tests of frozen graphs on a CPU share: products compiled so, the calls of oneDNN's kernel in them, and cases of scaled_mm.

Where this machine's kernel saturates sums of two products (no VNNI), weights are drawn so small that none does.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from hypothesis import assume
from support import Compiled, check_float, check_int8, linear64, run, well_conditioned, with_layout
from torch import Tensor, nn

from int8_inductor import ops, reference
from int8_inductor.onednn import forms, prepacked
from int8_inductor.onednn.forms import UNSIGNED, Form

FORM: Any = forms.form
KERNEL = "torch.ops.onednn.qlinear_pointwise"


def limit() -> int:
    """Weights up to which two products with an activation of 255 stay below 2^15, where that matters."""
    return 127 if FORM() else 64


@pytest.fixture(autouse=True, scope="module")
def prepacks() -> Iterator[None]:
    """The kernel is used on this machine, and for small sizes."""
    with taken(UNSIGNED), pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepacked, "SMALL", 0)
        yield


@contextlib.contextmanager
def taken(form: Form | None) -> Iterator[None]:
    """oneDNN takes activations in that form here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "form", lambda: form)
        yield


def frozen(fn: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Compiled:
    with inductor_config.patch(freezing=True):
        return run(fn, *inputs, cpu_backend="cpp", **kwargs)


def calls(compiled: Compiled) -> list[str]:
    """The calls of oneDNN's kernel, and that there is no other product."""
    assert not any(compiled.has(text) for text in ("_int_mm(", "extern_kernels.mm(", "extern_kernels.addmm("))
    return [line for code in compiled.code for line in code.splitlines() if re.search(rf"{KERNEL}\.\w+\(", line)]


class Product(nn.Module):
    """An operator of some operands as inputs, by name, and of others as buffers. numbers: its other arguments."""

    def __init__(self, inputs: tuple[str, ...], constants: dict[str, Tensor], numbers: dict[str, Any], operator: Any = ops.scaled_mm) -> None:
        super().__init__()
        self.operator = operator
        for name, value in constants.items():
            self.register_buffer(name, value)
        self.inputs, self.constants, self.numbers = inputs, tuple(constants), numbers

    def forward(self, *inputs: Tensor) -> Tensor:
        tensors = dict(zip(self.inputs, inputs, strict=True)) | {name: getattr(self, name) for name in self.constants}
        out: Tensor = self.operator(**tensors, **self.numbers)
        return out


@dataclass(frozen=True)
class Case:
    """A product and how its scales are known."""

    m: int
    n: int
    k: int
    static: bool = True
    zero_point: int | None = None
    bias: torch.dtype | None = None
    activation: str = "none"
    out_dtype: torch.dtype | None = None
    out_scale: float | None = None
    out_zero_point: int | None = None
    quant_min: int = reference.INT8_MIN
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    a_scale: float = 0.01
    b_scale: float = 0.01
    seed: int = 0

    def operands(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        a = torch.randint(-128, 128, (self.m, self.k), dtype=torch.int8, generator=generator)
        b = torch.randint(-limit(), limit() + 1, (self.n, self.k), dtype=torch.int8, generator=generator)
        rows = 1 if self.static else self.m
        found = {"a": with_layout(a, self.layout), "b": with_layout(b, self.weight_layout)}
        found["a_scale"] = (1 + torch.rand(rows, 1, generator=generator)) * self.a_scale
        found["b_scale"] = (1 + torch.rand(self.n, generator=generator)) * self.b_scale
        if self.zero_point is not None:
            found["a_zero_point"] = torch.full((rows, 1), self.zero_point, dtype=torch.int32)
        if self.bias is not None:
            found["bias"] = (torch.randn(self.n, generator=generator) * self.a_scale * self.b_scale * 1000).to(self.bias)
        return found

    def store(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.out_scale is None:
            return {}, {"out_dtype": self.out_dtype}
        constants = {"out_scale": torch.tensor([self.out_scale])}
        if self.out_zero_point is not None:
            constants["out_zero_point"] = torch.tensor([self.out_zero_point], dtype=torch.int32)
        return constants, {"out_quant_min": self.quant_min}

    def check(self, compile_and_run: Callable[..., Compiled] = frozen, **kwargs: Any) -> Compiled:
        """Compile and compare each value with float64."""
        operands, (stored, numbers) = self.operands(), self.store()
        want = linear64(**operands, activation=self.activation)
        if self.out_scale is not None:
            assume(well_conditioned(want, stored["out_scale"]))
        inputs = [name for name in operands if name == "a" or (name in ("a_scale", "a_zero_point") and not self.static)]
        constants = {name: value for name, value in {**operands, **stored}.items() if name not in inputs}
        module = Product(tuple(inputs), constants, {**numbers, "activation": self.activation})
        compiled = compile_and_run(module, *(operands[name] for name in inputs), **kwargs)
        if self.out_scale is None:
            assert compiled.output.dtype == (self.out_dtype or torch.float32)
            check_float(compiled.output, want)
        else:
            check_int8(compiled.output, want, stored["out_scale"], stored.get("out_zero_point"), self.quant_min)
        return compiled
