"""The patch embedding as a linear: the same values, one convolution less, and convolutions that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import Compiled, run
from torch import Tensor

from int8_inductor import ops

WEIGHT = torch.randint(-127, 128, (16, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Convolution:
    """A convolution of an image [batch, channels, *size] in a graph that has an int8 product."""

    batch: int = 2
    channels: int = 3
    outputs: int = 32
    size: tuple[int, int] = (32, 48)
    patch: tuple[int, int] = (16, 16)
    bias: bool = True
    dtype: torch.dtype = torch.bfloat16
    stride: tuple[int, int] | None = None
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    weight_format: torch.memory_format = torch.contiguous_format
    beside: bool = True

    def operands(self, device: str) -> tuple[Any, ...]:
        make = torch.Generator().manual_seed(1)
        x = torch.randn(self.batch, self.channels, *self.size, generator=make)
        w = torch.randn(self.outputs, self.channels // self.groups, *self.patch, generator=make)
        bias = torch.randn(self.outputs, generator=make)
        return tuple(each.to(device, self.dtype) for each in (x, w.to(memory_format=self.weight_format), bias))

    def __call__(self, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        stride = self.stride or self.patch
        y = F.conv2d(x, w, bias if self.bias else None, stride, self.padding, self.dilation, self.groups)
        return y.flatten(2).transpose(1, 2) * 2.0

    def compiled(self, device: str, **options: Any) -> Compiled:
        weight, one = WEIGHT.to(device), torch.ones(1, device=device)

        def both(x: Tensor, w: Tensor, bias: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
            return self(x, w, bias), ops.scaled_mm(q, weight, one, one) if self.beside else q

        return run(both, *self.operands(device), torch.zeros(2, 64, dtype=torch.int8, device=device), **options)

    def check(self, got: Tensor) -> None:
        """Against float64: products of K values are summed in float32, and rounded once or twice to the dtype, and the doubling is exact."""
        x, w, bias = (each.double() for each in self.operands("cpu"))
        want = self(x, w, bias)
        step = 2.0**-8 if self.dtype == torch.bfloat16 else 2.0**-11
        k = self.channels * self.patch[0] * self.patch[1]
        sums = self(x.abs(), w.abs(), bias.abs())
        assert got.shape == want.shape
        assert got.dtype == self.dtype
        assert (got.cpu().double() - want).abs().le(2 * step * want.abs() + 2.0 * k * 2.0**-24 * sums + 4 * step).all()


CASES = {
    "with a bias": Convolution(),
    "without": Convolution(bias=False),
    "float16": Convolution(dtype=torch.float16),
    "patches that are not square": Convolution(patch=(8, 12), size=(24, 36)),
    "one patch": Convolution(size=(16, 16), batch=1),
    "one channel, one output": Convolution(channels=1, outputs=1),
    "patches of one": Convolution(patch=(1, 1), size=(5, 7)),
}


@pytest.mark.parametrize("name", CASES)
def test_patches_are_a_product(device: str, name: str) -> None:
    case = CASES[name]
    compiled = case.compiled(device)
    case.check(compiled.output[0])
    assert not compiled.has("convolution(")
    assert compiled.has("extern_kernels.addmm(" if case.bias else "extern_kernels.mm(") or compiled.has("mkldnn") or case.outputs == 1
    (entry,) = compiled.report.patches
    assert (entry.status, entry.kernel) == ("rewritten", "aten.addmm" if case.bias else "aten.mm")
    assert entry.name in str(compiled.report)
    assert compiled.report.counts()["linear"] == dict.fromkeys(("rewritten", "feeds", "float", "left"), 0)


def test_an_image_in_another_layout_and_of_any_batch(device: str) -> None:
    case = Convolution()
    x, w, bias = case.operands(device)
    weight, one = WEIGHT.to(device), torch.ones(1, device=device)
    q = torch.zeros(2, 64, dtype=torch.int8, device=device)
    x = x.transpose(2, 3).contiguous().transpose(2, 3)
    torch._dynamo.mark_dynamic(x, 0)
    compiled = run(lambda x, q: (case(x, w, bias), ops.scaled_mm(q, weight, one, one)), x, q)
    case.check(compiled.output[0])
    assert not compiled.has("convolution(")


NEAR_MISSES = {
    "patches that overlap": Convolution(stride=(8, 16)),
    "patches with room between": Convolution(stride=(24, 16), size=(40, 48)),
    "padding": Convolution(padding=1),
    "dilation": Convolution(dilation=2, size=(48, 48)),
    "groups": Convolution(groups=3, outputs=33),
    "an image that is not whole patches": Convolution(size=(33, 48)),
    "channels that fill 16 bytes": Convolution(channels=8),
    "float32": Convolution(dtype=torch.float32),
    "a weight in another layout": Convolution(weight_format=torch.channels_last),
    "no int8 product in the graph": Convolution(beside=False),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_other_convolutions_stay(device: str, name: str) -> None:
    compiled = NEAR_MISSES[name].compiled(device)
    assert compiled.has("convolution(") or compiled.has("_convolution_pointwise")
    assert compiled.report.patches == []
    want = NEAR_MISSES[name](*NEAR_MISSES[name].operands(device))
    torch.testing.assert_close(compiled.output[0], want, rtol=2e-2, atol=2e-1)


def test_plain_cpp_keeps_its_convolution() -> None:
    compiled = Convolution().compiled("cpu", cpu_backend="cpp")
    assert compiled.has("convolution(") or compiled.has("_convolution_pointwise")
