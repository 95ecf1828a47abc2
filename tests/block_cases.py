"""Operands of block_scaled_mm, drawn and compiled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from kernel_cases import SIZES, sizes
from support import FLOATS, LAYOUTS, Bounded, block_linear64, run, with_layout
from torch import Tensor

from int8_inductor.epilogues import EPILOGUES
from int8_inductor.products.block_scaled_mm import BLOCK_SCALED_MM

# Around a block and a tile, primes, and 1.
ROWS = st.sampled_from([1, 2, 5, 17, 67])
COLUMNS = st.sampled_from([1, 3, 31, 33, 61, 64, 130])
DEPTHS = st.sampled_from([1, 7, 32, 33, 64, 97, 129, 260])


@dataclass
class BlockCase:
    """Operands of block_scaled_mm, from a seed."""

    m: int = 5
    n: int = 33
    k: int = 97
    scale_block: int = 32
    seed: int = 0
    a_layout: str = "contiguous"
    b_layout: str = "contiguous"
    scale_layout: str = "contiguous"
    a_size: str = "normal"
    b_size: str = "normal"
    bias: torch.dtype | None = None
    activation: str = "none"
    device: str = "cpu"
    generator: torch.Generator = field(default_factory=torch.Generator, init=False, repr=False)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def int8(self, *shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=self.generator)

    def operands(self) -> dict[str, Tensor]:
        """The tensors by argument name, on the CPU; the same at every call. One scale in eight is 0."""
        self.generator.manual_seed(self.seed)
        m, n, k, blocks = self.m, self.n, self.k, -(-self.k // self.scale_block)

        def scales(rows: int, size: str) -> Tensor:
            values = (self.rand(rows, blocks) + 0.1) * SIZES[size]
            return with_layout(torch.where(self.rand(rows, blocks) < 0.125, 0.0, values), self.scale_layout)

        tensors = {
            "a": with_layout(self.int8(m, k), self.a_layout),
            "b": with_layout(self.int8(n, k), self.b_layout),
            "a_scale": scales(m, self.a_size),
            "b_scale": scales(-(-n // self.scale_block), self.b_size),
        }
        if self.bias is not None:
            size = float(block_linear64(*tensors.values(), self.scale_block).value.abs().mean()) or 1.0
            tensors["bias"] = ((self.rand(n) - 0.5) * min(size, 1e4)).to(self.bias)
        return tensors

    def want(self, narrow: bool = False) -> Bounded:
        tensors = self.operands()
        bias = tensors.pop("bias", None)
        return block_linear64(*tensors.values(), self.scale_block, bias, self.activation, narrow)

    def compiled(self, kernel: str, operator: Any = None, store: dict[str, Any] | None = None, **compile_kwargs: Any) -> Any:
        """The operator compiled for these operands; `store` holds tensors and constants that say how to store the result."""
        tensors = self.operands() | {name: value for name, value in (store or {}).items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in (store or {}).items() if not isinstance(value, Tensor)}
        names, target = list(tensors), operator or BLOCK_SCALED_MM.operator

        def fn(*args: Tensor) -> Any:
            named = dict(zip(names, args, strict=True))
            return target(**named, **constants, scale_block=self.scale_block, activation=self.activation, kernel_preference=kernel)

        placed = {name: t.to(self.device) for name, t in tensors.items()}
        compiled = run(fn, *placed.values(), **compile_kwargs)
        if kernel == "triton":
            # Inductor gives a template a copy of a matrix none of whose strides is 1.
            copied = [name for name in ("a", "b", "a_scale", "b_scale") if 1 not in placed[name].stride()]
            assert len(compiled.kernels) <= len(copied) + 1, (compiled.kernels, copied)
            assert compiled.kernels[-1].startswith("triton_tem_")
        compiled.output = torch.utils._pytree.tree_map(lambda t: t.cpu(), compiled.output)
        return compiled


@st.composite
def block_cases(draw: st.DrawFn) -> BlockCase:
    activation = draw(st.sampled_from(sorted(EPILOGUES)))
    a_size, b_size = draw(sizes) if activation in ("none", "relu") else ("normal", "normal")
    return BlockCase(
        draw(ROWS), draw(COLUMNS), draw(DEPTHS), draw(st.sampled_from([32, 64, 128])), draw(st.integers(0, 2**31)),
        draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(["contiguous", "transposed", "sliced"])), a_size, b_size,
        draw(st.sampled_from([None, *FLOATS])), activation,
    )  # fmt: skip
