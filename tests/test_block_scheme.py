"""Block-scaled linears in graphs: every way to write one is rewritten, with exact counts and values against float64; what is not one is left."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from support import Bounded, block_linear64, check_float, fresh_compile, run
from torch import Tensor, nn

from int8_inductor import Int8BlockLinear, Int8DynamicActivationInt8WeightConfig, PerBlock, quantize_, reference
from int8_inductor.explain import recording

M, N, K = 6, 96, 64

Dequantize = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


def _repeated(q: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    wide = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return q.float() * wide[..., : q.shape[-2], : q.shape[-1]]


def _expanded(q: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    rows, columns = scale.shape[-2:]
    wide = scale[..., :, None, :, None].expand(*scale.shape[:-2], rows, block[0], columns, block[1])
    return q.float() * wide.reshape(*scale.shape[:-2], rows * block[0], columns * block[1])


def _in_blocks(q: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    rows, columns = scale.shape[-2:]
    blocks = q.reshape(*q.shape[:-2], rows, block[0], columns, block[1])
    return (blocks.float() * scale[..., :, None, :, None]).reshape(q.shape)


def _inverse(q: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    return q.float() / reference.expand_blocks(1 / scale, q.shape[-2:], block)


def _half(q: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    return reference.dequantize_blocks(q, scale, block).to(torch.bfloat16).float()


def _affine(q: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    from torchao.quantization.quant_primitives import dequantize_affine

    return dequantize_affine(q, (*[1] * (q.ndim - 2), *block), scale, None, torch.int8, -127, 127)


WAYS: dict[str, Dequantize] = {
    "reference": reference.dequantize_blocks, "repeat_interleave": _repeated, "expand": _expanded, "in blocks": _in_blocks, "inverse": _inverse,
    "via bfloat16": _half, "torchao": _affine,
}  # fmt: skip
every_way = pytest.mark.parametrize(
    "way", [pytest.param(name, marks=pytest.mark.skipif(name == "torchao" and find_spec("torchao") is None, reason="no torchao")) for name in WAYS]
)


def operands(*rows: int, n: int = N, k: int = K, size: int = 32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator) for shape in ((*rows, k), (n, k)))
    blocks = -(-k // size)
    a_scale, b_scale = ((torch.rand(shape, generator=generator) + 0.1) * 0.02 for shape in ((*rows, blocks), (-(-n // size), blocks)))
    return a.to(device), b.to(device), a_scale.to(device), b_scale.to(device)


def want_of(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, size: int = 32, bias: Tensor | None = None) -> Bounded:
    return block_linear64(a.reshape(-1, a.shape[-1]), b, a_scale.reshape(-1, a_scale.shape[-1]), b_scale, size, bias)


@every_way
@pytest.mark.parametrize("rows", [(M,), (2, 1, 3)], ids=str)
def test_every_way_to_write_it(device: str, way: str, rows: tuple[int, ...]) -> None:
    tensors, bias = operands(*rows, device=device), torch.arange(N, dtype=torch.float32).to(device) / N

    def fn(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> tuple[Tensor, Tensor]:
        left, right = a.unsqueeze(0) if a.ndim == 1 else a, WAYS[way](b, b_scale, (32, 32))
        x = WAYS[way](left, a_scale, (1, 32))
        return F.linear(x, right, bias), F.linear(x, right)

    compiled = run(fn, *tensors)
    compiled.check_report(linear={"rewritten": 2}, dequant={"rewritten": 2})
    assert len([kernel for kernel in compiled.kernels if kernel.startswith("triton_tem_")]) == 2
    assert not compiled.has("extern_kernels.")
    if way != "via bfloat16":
        for got, vector in zip(compiled.output, (bias, None), strict=True):
            assert got.shape == (*rows, N)
            check_float(got.reshape(-1, N).cpu(), want_of(*(t.cpu() for t in tensors), bias=None if vector is None else vector.cpu()))


@pytest.mark.parametrize(
    ("n", "k", "size"), [(96, 64, 32), (70, 64, 64), (200, 128, 128), (31, 64, 32), (96, 32, 32), (32, 32, 32), (20, 128, 128)], ids=str
)
def test_sizes_around_a_block(device: str, n: int, k: int, size: int) -> None:
    tensors = operands(M, n=n, k=k, size=size, device=device)

    def fn(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
        return F.linear(reference.dequantize_blocks(a, a_scale, size), reference.dequantize_blocks(b, b_scale, (size, size)))

    compiled = run(fn, *tensors)
    compiled.check_report(linear={"rewritten": 1}, dequant={"rewritten": 2})
    check_float(compiled.output.cpu(), want_of(*(t.cpu() for t in tensors), size=size))


def test_a_weight_in_k_n_layout(device: str) -> None:
    a, b, a_scale, b_scale = operands(M, device=device)

    def fn(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
        return reference.dequantize_blocks(a, a_scale, 32) @ reference.dequantize_blocks(b, b_scale, (32, 32))

    compiled = run(fn, a, b.t().contiguous(), a_scale, b_scale.t().contiguous())
    compiled.check_report(linear={"rewritten": 1}, dequant={"rewritten": 2})
    check_float(compiled.output.cpu(), want_of(*(t.cpu() for t in (a, b, a_scale, b_scale))))


# Chains ---------------------------------------------------------------------------------------------------------------------------


def model(*features: int, size: int = 64, activation: type[nn.Module] = nn.GELU, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for i, (k, n) in enumerate(itertools.pairwise(features)):
        layers += [activation()] if i else []
        layers.append(nn.Linear(k, n))
    chain = nn.Sequential(*layers).to(dtype).eval()
    quantize_(chain, Int8DynamicActivationInt8WeightConfig(granularity=(PerBlock(1, size), PerBlock(size, size))))
    return chain


def close(got: Tensor, want: Tensor) -> None:
    """As near as two int8 chains are: a value next to a tie may be off by a step."""
    assert got.shape == want.shape
    assert float((got.float() - want.float()).norm() / want.float().norm()) < (2e-2 if got.dtype != torch.float32 else 5e-3)


@pytest.mark.parametrize(
    ("rows", "features", "size", "dtype"),
    [
        ((5,), (128, 64, 192), 64, torch.float32),
        ((2, 3), (128, 64, 192), 64, torch.bfloat16),
        ((1,), (40, 300, 64), 128, torch.float16),
        ((5,), (100, 70, 33), 64, torch.bfloat16),
        ((2, 3), (100, 70, 33), 64, torch.float32),
        ((2, 1, 2), (64, 31, 8), 32, torch.bfloat16),
    ],
    ids=str,
)
def test_a_chain_stays_int8(device: str, rows: tuple[int, ...], features: tuple[int, ...], size: int, dtype: torch.dtype) -> None:
    """quantize, linear + bias + GELU + quantize in blocks, linear + bias: three kernels."""
    chain = model(*features, size=size, dtype=dtype).to(device)
    x = torch.randn(*rows, features[0], dtype=dtype).to(device)
    compiled = run(chain, x)
    compiled.check_report(linear={"rewritten": 2}, quant={"rewritten": 1, "feeds": 1}, dequant={"rewritten": 4})
    epilogues = [entry.epilogue for entry in compiled.report.linears]
    assert epilogues == [f"scales + bias + gelu + int8 in blocks of {size}", "scales + bias"]
    assert len(compiled.kernels) == 3, compiled.kernels
    assert [kernel.startswith("triton_tem_") for kernel in compiled.kernels] == [False, True, True]
    close(compiled.output, chain(x))


def test_a_chain_on_a_cpu() -> None:
    """In C++, which Inductor gets wrong for blocks that end in the middle of a loop unless they are written as they are."""
    chain, x = model(100, 70, 33), torch.randn(5, 100)
    for backend in ("inductor", "int8_inductor"):
        compiled = run(chain, x, backend=backend, cpu_backend="cpp")
        assert not compiled.kernels
        torch.testing.assert_close(compiled.output, chain(x), rtol=1e-4, atol=1e-4)
    compiled.check_report(linear={"rewritten": 2}, quant={"rewritten": 1, "feeds": 1}, dequant={"rewritten": 4})
    assert {entry.kernel for entry in compiled.report.linears} == {"aten.mm of dequantized blocks"}


def test_linears_that_share_an_input_share_its_quantization(device: str) -> None:
    layers = nn.ModuleList(Int8BlockLinear.from_linear(nn.Linear(128, n)) for n in (64, 32, 200)).to(device)
    x = torch.randn(M, 128).to(device)

    def fn(x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in layers]

    compiled = run(fn, x)
    compiled.check_report(linear={"rewritten": 3}, quant={"feeds": 1}, dequant={"rewritten": 6})
    assert len(compiled.kernels) == 4
    for got, want in zip(compiled.output, fn(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_one_compilation_for_every_batch(device: str) -> None:
    chain = model(100, 70, 33).to(device)
    with fresh_compile(), recording() as report, torch.no_grad():
        compiled = torch.compile(chain, backend="int8_inductor")
        for rows in (5, 2, 37):
            x = torch.randn(rows, 3, 100).to(device)
            torch._dynamo.mark_dynamic(x, 0)
            close(compiled(x), chain(x))
    assert report.graphs == 1
    assert report.counts()["linear"] == {"rewritten": 2, "feeds": 0, "float": 0, "left": 0}
    assert report.counts()["quant"] == {"rewritten": 1, "feeds": 1, "float": 0, "left": 0}


def test_training_graph_with_a_gradient_of_the_input() -> None:
    layer = Int8BlockLinear.from_linear(nn.Linear(64, 32))
    x = torch.randn(4, 64, requires_grad=True)
    compiled = run(layer, x, grad=True)
    assert compiled.linears() == 1
    torch.testing.assert_close(compiled.output, layer(x), rtol=1e-4, atol=1e-4)


# What is left ---------------------------------------------------------------------------------------------------------------------


def _left(fn: Callable[..., Tensor], *tensors: Tensor) -> str:
    """Why the one linear of `fn` is left; its result is what eager computes."""
    compiled = run(fn, *tensors)
    (entry,) = compiled.report.linears
    assert entry.status == "left", f"\n{compiled.report}"
    torch.testing.assert_close(compiled.output, fn(*tensors), rtol=1e-4, atol=1e-4)
    return str(entry.reason)


def test_blocks_of_two_sizes_are_left() -> None:
    a, b, a_scale, _ = operands(M)
    b_scale = torch.rand(2, 1) + 0.5
    reason = _left(
        lambda *t: F.linear(reference.dequantize_blocks(t[0], t[2], 32), reference.dequantize_blocks(t[1], t[3], (64, 64))), a, b, a_scale, b_scale
    )
    assert reason == "its scales are in blocks, of 32, 64 values, and not of 1 x B and B x B with one B"


def test_blocks_of_another_size_are_left() -> None:
    a, b, a_scale, b_scale = operands(M, size=16)
    reason = _left(
        lambda *t: F.linear(reference.dequantize_blocks(t[0], t[2], 16), reference.dequantize_blocks(t[1], t[3], (16, 16))), a, b, a_scale, b_scale
    )
    assert reason == "its scales are in blocks of 16, not of 32, 64, 128"


def test_groups_of_a_weights_rows_are_left() -> None:
    a, b, a_scale, _ = operands(M)
    groups = torch.rand(N, 2) + 0.5
    reason = _left(
        lambda *t: F.linear(reference.dequantize_blocks(t[0], t[2], 32), reference.dequantize_blocks(t[1], t[3], 32)), a, b, a_scale, groups
    )
    assert reason == "the weight's scale is not one for each 32 values of a dimension of 96"


def test_a_scale_for_all_rows_is_left() -> None:
    a, b, a_scale, b_scale = operands(M)
    reason = _left(lambda *t: F.linear(_repeated(t[0], t[2][:1], (M, 32)), reference.dequantize_blocks(t[1], t[3], (32, 32))), a, b, a_scale, b_scale)
    assert reason == "the activation's scale is not one for each row and block of its columns, in their order"


def test_blocks_on_one_side_alone_are_left() -> None:
    a, b, _, b_scale = operands(M)
    reason = _left(lambda *t: F.linear(t[0].float() * t[2], reference.dequantize_blocks(t[1], t[3], (32, 32))), a, b, torch.rand(M, 1), b_scale)
    assert reason == "the activation's scale is one for all 64 values of a dimension, not one for each 32"


def test_a_zero_point_is_left() -> None:
    a, b, a_scale, b_scale = operands(M)

    def fn(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
        x = (a.float() - 3) * reference.expand_blocks(a_scale, a.shape[-1:], (32,))
        return F.linear(x, reference.dequantize_blocks(b, b_scale, (32, 32)))

    assert _left(fn, a, b, a_scale, b_scale) == "its scales are in blocks and it has a zero point"


def test_scales_that_are_permuted_are_left() -> None:
    """Blocks that are not adjacent columns: 0, 2, 4, ... share a scale."""
    a, b, a_scale, b_scale = operands(M)

    def fn(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
        wide = a_scale.unsqueeze(-2).expand(M, 32, 2).reshape(M, K)
        return F.linear(a.float() * wide, reference.dequantize_blocks(b, b_scale, (32, 32)))

    compiled = run(fn, a, b, a_scale, b_scale)
    assert compiled.linears("left") == 1
    torch.testing.assert_close(compiled.output, fn(a, b, a_scale, b_scale), rtol=1e-4, atol=1e-4)


def test_a_block_quant_whose_float_value_is_needed_is_left() -> None:
    layer = Int8BlockLinear.from_linear(nn.Linear(64, 64))

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        y = layer(x)
        return (y, *reference.quantize_blocks(y, 32))

    x = torch.randn(3, 64)
    compiled = run(fn, x)
    assert compiled.linears() == 1
    assert [entry.reason for entry in compiled.report.quants if entry.status == "left"] == ["the float value has another user"]
    torch.testing.assert_close(compiled.output[0], fn(x)[0], rtol=1e-4, atol=1e-4)
