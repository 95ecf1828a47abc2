"""Operands of scaled_mm, drawn and compiled, for the tests of the compiled operators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from support import FLOATS, LAYOUTS, Bounded, linear64, run, with_layout
from torch import Tensor

from int8_inductor import ops
from int8_inductor.epilogues import EPILOGUES

KERNELS = ("triton", "torch", "auto")
kernels = pytest.mark.parametrize("kernel", KERNELS)

# Around the tile sizes (16 to 256), primes, and 1.
ROWS = st.sampled_from([1, 2, 5, 16, 17, 31, 67])
COLUMNS = st.sampled_from([1, 3, 8, 16, 33, 61, 64, 130])
DEPTHS = st.sampled_from([1, 2, 7, 16, 31, 64, 97, 129, 260])
SIZES = {"normal": 0.01, "tiny": 1e-30, "huge": 1e25}
"""Magnitudes of a_scale and b_scale. A huge one goes with one that is not, so that no step overflows."""


@dataclass
class Case:
    """Operands of scaled_mm, from a seed."""

    m: int = 5
    n: int = 33
    k: int = 31
    seed: int = 0
    a_layout: str = "contiguous"
    b_layout: str = "contiguous"
    a_rows: bool = True
    b_rows: bool = True
    a_size: str = "normal"
    b_size: str = "normal"
    a_zero_point: torch.dtype | None = None
    b_zero_point: torch.dtype | None = None
    bias: torch.dtype | None = None
    activation: str = "none"
    device: str = "cpu"
    generator: torch.Generator = field(default_factory=torch.Generator, init=False, repr=False)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def int8(self, *shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=self.generator)

    def operands(self) -> dict[str, Tensor]:
        """The tensors by argument name, on the CPU; the same at every call."""
        self.generator.manual_seed(self.seed)
        m, n, k = self.m, self.n, self.k
        rows, columns = (m, 1) if self.a_rows else (1,), (n,) if self.b_rows else (1,)
        tensors = {
            "a": with_layout(self.int8(m, k), self.a_layout),
            "b": with_layout(self.int8(n, k), self.b_layout),
            "a_scale": (self.rand(*rows) + 0.1) * SIZES[self.a_size],
            "b_scale": (self.rand(*columns) + 0.1) * SIZES[self.b_size],
        }
        if self.a_zero_point is not None:
            tensors["a_zero_point"] = self.int8(*rows).to(self.a_zero_point)
        if self.b_zero_point is not None:
            tensors["b_zero_point"] = self.int8(*columns).to(self.b_zero_point)
        if self.bias is not None:
            # As large as the product, so that a bias that is lost or misplaced shows.
            size = float(linear64(**tensors).value.abs().mean()) or 1.0
            tensors["bias"] = ((self.rand(n) - 0.5) * min(size, 1e4)).to(self.bias)
        return tensors

    def want(self, narrow: bool = False) -> Bounded:
        return linear64(**self.operands(), activation=self.activation, narrow=narrow)

    def scaled_mm(self, kernel: str, operator: Any = ops.scaled_mm, store: dict[str, Any] | None = None, **compile_kwargs: Any) -> Any:
        """The operator compiled for these operands; `store` holds tensors and constants that say how to store the result."""
        tensors = self.operands() | {name: value for name, value in (store or {}).items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in (store or {}).items() if not isinstance(value, Tensor)}
        names = list(tensors)

        def fn(*args: Tensor) -> Any:
            named = dict(zip(names, args, strict=True))
            return operator(**named, **constants, activation=self.activation, kernel_preference=kernel)

        placed = {name: t.to(self.device) for name, t in tensors.items()}
        compiled = run(fn, *placed.values(), **compile_kwargs)
        if kernel != "torch" and compile_kwargs.get("cpu_backend") != "cpp":
            # Inductor gives a template a copy of a matrix none of whose strides is 1.
            copied = [name for name in ("a", "b") if 1 not in placed[name].stride()]
            assert len(compiled.kernels) == len(copied) + 1, (compiled.kernels, copied)
            assert compiled.kernels[-1].startswith("triton_tem_")
        else:
            assert compiled.has("_int_mm")
        compiled.output = torch.utils._pytree.tree_map(lambda t: t.cpu(), compiled.output)
        return compiled


sizes = st.sampled_from([("normal", "normal"), ("normal", "normal"), ("tiny", "tiny"), ("tiny", "huge"), ("huge", "tiny"), ("huge", "normal")])
zero_point_dtypes = st.sampled_from([None, None, torch.int8, torch.int16, torch.int32, torch.int64])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    activation = draw(st.sampled_from(sorted(EPILOGUES)))
    # The curved ones have something to say about moderate values; sizes go with those that do not change them.
    a_size, b_size = draw(sizes) if activation in ("none", "relu") else ("normal", "normal")
    return Case(
        draw(ROWS), draw(COLUMNS), draw(DEPTHS), draw(st.integers(0, 2**31)),
        draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS)), draw(st.booleans()), draw(st.booleans()), a_size, b_size,
        draw(zero_point_dtypes), draw(zero_point_dtypes), draw(st.sampled_from([None, *FLOATS])), activation,
    )  # fmt: skip


def out_scale(case: Case, want: Bounded, per_row: bool) -> Tensor:
    """Scales under which the largest values saturate and most do not."""
    largest = want.value.abs().amax(-1, keepdim=True) if per_row else want.value.abs().max().reshape(1)
    return (largest.float() / 127 * (0.3 + case.rand(*largest.shape))).clamp(min=1e-37)
