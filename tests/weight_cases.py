"""Operands of the weight-only and int4 products, drawn and compiled, and their results in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from kernel_cases import COLUMNS, DEPTHS, ROWS, SIZES
from support import EVALUATION, FLOATS, LAYOUTS, LIPSCHITZ, SUBNORMAL, Bounded, Compiled, U, run, with_layout
from torch import Tensor

from int8_inductor.epilogues import EPILOGUES
from int8_inductor.int4 import GROUP_SIZES, pack_int4
from int8_inductor.products import PRODUCTS
from int8_inductor.templates import LOWERINGS

PRODUCTS_BY_NAME = {product.name: product for product in PRODUCTS}
NAMES = ("weight_int8_mm", "weight_int8_group_mm", "weight_int4_mm", "int8_int4_mm", "int8_int4_group_mm")


def in_triton(name: str) -> list[Any]:
    """The templates of the product `name` that the interpreter can run; those for Hopper are tested in test_hopper.py."""
    return [each for each in LOWERINGS[name].templates if not hasattr(each, "loop") and not hasattr(each, "LOOP")]


@dataclass
class WeightCase:
    """Operands of the product `name`, from a seed. groups: how many groups K has, where the product has them; else K is `k`."""

    name: str
    m: int = 5
    n: int = 33
    k: int = 31
    groups: int = 2
    group_size: int = 64
    seed: int = 0
    a_dtype: torch.dtype = torch.bfloat16
    a_layout: str = "contiguous"
    b_layout: str = "contiguous"
    a_rows: bool = True
    b_rows: bool = True
    b_size: str = "normal"
    bias: torch.dtype | None = None
    activation: str = "none"
    device: str = "cpu"
    generator: torch.Generator = field(default_factory=torch.Generator, init=False, repr=False)

    @property
    def in_groups(self) -> bool:
        return self.name != "weight_int8_mm"

    @property
    def depth(self) -> int:
        return self.groups * self.group_size if self.in_groups else self.k

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.int8, generator=self.generator)

    def operands(self) -> dict[str, Any]:
        """Tensors and numbers by argument name, on the CPU; the same at every call. A scale or two is 0."""
        self.generator.manual_seed(self.seed)
        m, n, k = self.m, self.n, self.depth
        int8 = self.name.startswith("int8_int4")
        a = self.integers(-128, 128, m, k) if int8 else torch.randn(m, k, generator=self.generator).to(self.a_dtype)
        values = self.integers(-8, 8, n, k) if "int4" in self.name else self.integers(-128, 128, n, k)
        b = pack_int4(values) if "int4" in self.name else values
        given: dict[str, Any] = {"a": with_layout(a, self.a_layout), "b": with_layout(b, self.b_layout)}
        if int8:
            shape = (m, self.groups) if self.name == "int8_int4_group_mm" else (m, 1) if self.a_rows else (1,)
            given["a_scale"] = self.rand(*shape) + 0.1
        b_shape = (n, self.groups) if self.in_groups else (n,) if self.b_rows else (1,)
        given["b_scale"] = (self.rand(*b_shape) + 0.1) * SIZES[self.b_size] * (self.rand(*b_shape) > 0.1)
        if self.in_groups:
            given["group_size"] = self.group_size
        if self.bias is not None:
            size = float(self._product(given)[0].abs().mean()) or 1.0
            given["bias"] = ((self.rand(n) - 0.5) * min(size, 1e4)).to(self.bias)
        return given

    def _matrices(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Activation and weight, dequantized, in float64; by arithmetic of their own."""
        a, b = given["a"].double(), given["b"]
        if b.dtype == torch.uint8:
            wide = torch.empty(len(b), 2 * b.shape[1], dtype=torch.float64)
            wide[:, ::2], wide[:, 1::2] = (b % 16).double() - 8, (b // 16).double() - 8
            b = wide
        scales = {name: given[name].double() for name in ("a_scale", "b_scale") if name in given}
        size = given.get("group_size", 0)
        a_scale, b_scale = scales.get("a_scale", torch.ones(1, 1)), scales["b_scale"]
        a_scale = a_scale.repeat_interleave(size, 1) if a_scale.ndim == 2 and a_scale.shape[1] > 1 else a_scale.reshape(-1, 1)
        b_scale = b_scale.repeat_interleave(size, 1) if size else b_scale.reshape(-1, 1)
        return a * a_scale, b.double() * b_scale

    def _product(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        a, b = self._matrices(given)
        return a @ b.t(), a.abs() @ b.abs().t()

    def want(self, narrow: bool = False) -> Bounded:
        """float64, and the error of sums in float32, in any order: U for each of K terms, and a few for scales and bias."""
        given = self.operands()
        value, size = self._product(given)
        bias = given["bias"].double() if "bias" in given else torch.zeros(1, dtype=torch.float64)
        x = value + bias
        error = (self.depth + 6) * U * size + 1.01 * U * x.abs() + SUBNORMAL * (self.depth + 1)
        if self.activation == "none":
            return Bounded(x, error)
        y = EPILOGUES[self.activation].eager(x)
        error = LIPSCHITZ * error + EVALUATION * U * x.abs() + SUBNORMAL
        if narrow and EPILOGUES[self.activation].triton_fast:
            error = error + (1.3e-4 * y.abs()).clamp(max=1.6e-5) + 2.5e-8 * ((y.abs() < 1e-6) & (x < -1))
        return Bounded(y, error)

    def compiled(self, kernel: str, store: dict[str, Any] | None = None, *, blocks: bool = False, **compile_kwargs: Any) -> Compiled:
        """The operator compiled for these operands; `store` says how to store the result."""
        product = PRODUCTS_BY_NAME[self.name]
        operator = product.block_quant if blocks else product.operator
        everything = self.operands() | (store or {})
        tensors = {name: value for name, value in everything.items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in everything.items() if not isinstance(value, Tensor)}
        names = list(tensors)

        def fn(*args: Tensor) -> Any:
            named = dict(zip(names, args, strict=True))
            return operator(**named, **constants, activation=self.activation, kernel_preference=kernel)

        compiled = run(fn, *(t.to(self.device) for t in tensors.values()), **compile_kwargs)
        templates = [name for name in compiled.kernels if name.startswith("triton_tem_")]
        assert len(templates) == (kernel != "torch"), compiled.kernels
        assert templates == compiled.kernels[-1:] or kernel == "torch", compiled.kernels
        compiled.output = torch.utils._pytree.tree_map(lambda t: t.cpu(), compiled.output)
        return compiled


@st.composite
def weight_cases(draw: st.DrawFn) -> WeightCase:
    activation = draw(st.sampled_from(sorted(EPILOGUES)))
    b_size = draw(st.sampled_from(["normal", "normal", "tiny", "huge"])) if activation in ("none", "relu") else "normal"
    return WeightCase(
        draw(st.sampled_from(NAMES)), draw(ROWS), draw(COLUMNS), draw(DEPTHS), draw(st.integers(1, 5)), draw(st.sampled_from(GROUP_SIZES)),
        draw(st.integers(0, 2**31)), draw(st.sampled_from(FLOATS)), draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS)),
        draw(st.booleans()), draw(st.booleans()), b_size, draw(st.sampled_from([None, *FLOATS])), activation,
    )  # fmt: skip
