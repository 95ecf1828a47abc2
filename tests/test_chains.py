"""What stands around a linear: activations and quants folded into its kernel, quants shared, chains that stay int8, and the modes of compiling."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import linear_cases
import pytest
import torch
import torch.nn.functional as F
from dialect_cases import DEFAULT, TORCHAO, Dialect, K, M, N, decomposed, every_dialect, int8, scheme, weight
from linear_cases import SCHEMES, name_of
from support import Compiled, away_from_ties, check_float, check_int8, linear64, run
from torch import Tensor, nn

from int8_inductor import MappingType
from int8_inductor.epilogues import EPILOGUES

MODES = ("default", "reduce-overhead", "max-autotune")


def assert_fused(compiled: Compiled, linears: int = 1, *, feeding: int = 1, fused: int = 0, kernels: int | None = None) -> None:
    """All `linears` are rewritten, with nothing of their float arithmetic left; `feeding` quants stand before them, `fused` are inside them."""
    compiled.check_report(linear={"rewritten": linears}, quant={"feeds": feeding, "rewritten": fused}, dequant={"rewritten": 2 * linears})
    for call in ("extern_kernels.mm", "extern_kernels.addmm", "extern_kernels.bmm", "_int_mm"):
        assert not compiled.has(call), call
    assert sum(name.startswith("triton_tem_") for name in compiled.kernels) == linears, compiled.kernels
    buffers = re.findall(r"empty_strided_\w+\((\(.*?\)), \(.*?\), torch\.float\w*\)", "\n".join(compiled.code))
    assert f"({N}, {K})" not in buffers, "a dequantized weight"
    assert f"({K}, {N})" not in buffers, "a dequantized weight"
    if kernels is not None:
        assert len(compiled.kernels) == kernels, compiled.kernels
    assert {entry.kernel for entry in compiled.report.linears} == {"triton"}


# Epilogues ------------------------------------------------------------------------------------------------------------------------

SPELLINGS = [
    pytest.param(epilogue.name, spelling, id=f"{epilogue.name}-{i}")
    for epilogue in EPILOGUES.values()
    if epilogue.name != "none"
    for i, spelling in enumerate((epilogue.eager, *epilogue.spellings))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "spelling"), SPELLINGS)
def test_every_spelling_of_every_activation(device: str, name: str, spelling: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """On the linear's own result and behind a view; stored as float and as int8; in one kernel."""
    w, w_scale, bias = weight(device=device)
    bias = bias.to(dtype)
    q, (scale, _) = int8(2, 3, K, seed=5).to(device), scheme(False, False, device=device)
    want = linear64(q.reshape(-1, K), w, scale, w_scale, None, None, bias, name, narrow=True)
    out_scale = torch.tensor([0.05], device=device)

    def fn(q: Tensor) -> tuple[Tensor, Tensor]:
        x, wide = (q.float() * scale).to(dtype), (w.float() * w_scale).to(dtype)
        y = spelling(F.linear(x, wide, bias))
        again = spelling(F.linear(x, wide, bias).float())
        return y, torch.clamp(torch.round(again / out_scale), -127, 127).to(torch.int8)

    compiled = run(fn, q)
    assert compiled.linears() == 2, f"\n{compiled.report}"
    assert compiled.report.left() == []
    assert [entry.epilogue for entry in compiled.report.linears] == [f"scales + bias + {name}", f"scales + bias + {name} + int8"]
    assert len(compiled.kernels) == 2
    y, quantized = (t.reshape(-1, N) for t in compiled.output)
    assert y.dtype == dtype
    check_float(y, want)
    check_int8(quantized, want, out_scale, None, -127)


# Quants behind linears ------------------------------------------------------------------------------------------------------------


Network = Callable[[Tensor], Tensor]


def two_layers(dialect: Dialect, zero_point: bool, device: str) -> tuple[Network, Network, Tensor, list[Tensor]]:
    """One layer and two (linear, bias, gelu, quantize, dequantize, linear, bias, quantize), int8 in and out, an input, and both results."""
    w1, w1_scale, b1 = weight(N, K, 1, device)
    w2, w2_scale, b2 = weight(29, N, 11, device)
    q = int8(M, K, seed=5).to(device)
    scales, shifts = [torch.tensor([0.02], device=device)], [torch.tensor([each], dtype=torch.int32, device=device) for each in (-3, 40, 7)]
    results, value = [], q
    for w, w_scale, b, activation in ((w1, w1_scale, b1, "gelu"), (w2, w2_scale, b2, "none")):
        shift = shifts[len(results)] if zero_point else None
        want = linear64(value, w, scales[-1], w_scale, shift, None, b, activation, narrow=True)
        scales.append(torch.tensor([away_from_ties(want.value, float(want.value.abs().max()) / 120)], device=device))
        steps = torch.round(want.value / scales[-1]) + (shifts[len(results) + 1] if zero_point else 0)
        value = steps.clamp(-128, 127).to(torch.int8)
        results.append(value)
    qparams = [dialect.qparams(s, z if zero_point else None) for s, z in zip(scales, shifts, strict=True)]

    def one(q: Tensor) -> Tensor:
        y = F.gelu(F.linear(dialect.dequantize(q, *qparams[0]), dialect.weight(w1, w1_scale), b1))
        return dialect.quantize(y, *qparams[1])

    def two(q: Tensor) -> Tensor:
        y = F.linear(dialect.dequantize(one(q), *qparams[1]), dialect.weight(w2, w2_scale), b2)
        return dialect.quantize(y, *qparams[2])

    return one, two, q, results


def assert_one_kernel_a_linear(compiled: Compiled, linears: int) -> None:
    assert_fused(compiled, linears, feeding=0, fused=linears, kernels=linears)
    assert {entry.epilogue.rsplit(" + ", 1)[-1] for entry in compiled.report.linears} == {"int8"}
    # Nothing float is ever stored: all buffers are int8.
    assert re.findall(r"buf\d+ = empty_strided_\w+\(.*?, torch\.(\w+)\)", compiled.code[0]) == ["int8"] * linears


@every_dialect
@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "asymmetric"])
def test_a_chain_of_static_linears_stays_int8_with_one_kernel_each(device: str, dialect: Dialect, zero_point: bool) -> None:
    if dialect.name == "per_token":
        zero_point = False  # it rounds after the zero point: see test_declines.py
    one, two, q, (first, second) = two_layers(dialect, zero_point, device)
    for fn, want, linears in ((one, first, 1), (two, second, 2)):
        compiled = run(fn, q)
        assert_one_kernel_a_linear(compiled, linears)
        assert torch.equal(compiled.output, want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("linears", [1, 2])
def test_one_kernel_a_linear_in_every_mode(device: str, mode: str, linears: int) -> None:
    functions = two_layers(DEFAULT, True, device)
    compiled = run(functions[linears - 1], functions[2], mode=mode)
    assert_one_kernel_a_linear(compiled, linears)
    assert torch.equal(compiled.output, functions[3][linears - 1])


@every_dialect
def test_quants_by_rows_and_behind_views(device: str, dialect: Dialect) -> None:
    """A static quant by rows (where the dialect has it), behind views and a permute of the linear's result, and with a narrower range of int8."""
    w, w_scale, bias = weight(device=device)
    q, x_scale = int8(2, 3, K, seed=5).to(device), torch.tensor([0.02], device=device)
    want = linear64(q.reshape(-1, K), w, x_scale, w_scale, None, None, bias, narrow=True)
    number = away_from_ties(want.value, 0.02)
    single = torch.tensor([number], device=device)
    rows = torch.tensor([away_from_ties(row, 0.01 * (i + 1)) for i, row in enumerate(want.value)], device=device).reshape(6, 1)
    (s_in, _), (s_out, _) = dialect.qparams(x_scale), dialect.qparams(single)

    def linear(q: Tensor) -> Tensor:
        return F.linear(dialect.dequantize(q, s_in, None), dialect.weight(w, w_scale), bias)

    def fn(q: Tensor) -> list[Tensor]:
        results = [dialect.quantize(linear(q).reshape(3, 2, N), s_out, None), dialect.quantize(linear(q).permute(2, 0, 1), s_out, None)]
        if dialect.per_row:
            results.append(dialect.quantize(linear(q).flatten(0, 1), rows, None))
        return results

    compiled = run(fn, q)
    assert compiled.linears() == len(compiled.output), f"\n{compiled.report}"
    assert compiled.report.counts()["quant"]["rewritten"] == len(compiled.output), f"\n{compiled.report}"
    steps = torch.round(want.value / number).clamp(-128, 127).to(torch.int8)
    assert torch.equal(compiled.output[0], steps.reshape(3, 2, N))
    assert torch.equal(compiled.output[1], steps.reshape(2, 3, N).permute(2, 0, 1))
    if dialect.per_row:
        assert torch.equal(compiled.output[2], torch.round(want.value / rows.double()).clamp(-128, 127).to(torch.int8))


# Shared quants, and dynamic ones --------------------------------------------------------------------------------------------------


def on_a_grid(shape: tuple[int, ...], step: float, low: int, seed: int) -> tuple[Tensor, Tensor]:
    """Int8 values that span [low, 127] in every row, and floats that quantize to them beyond doubt, whose range gives the scale `step`."""
    q = int8(*shape, seed=seed, low=low)
    q[..., 0], q[..., 1] = low, 127
    jitter = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5) * 0.6
    jitter[(q == low) | (q == 127)] = 0
    return q, ((q + jitter) * step).float()


def dynamic_by_hand(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    q = torch.clamp(torch.round(x / scale), -127, 127).to(torch.int8)
    return F.linear(q.float() * scale, w.float() * w_scale)


def dynamic_per_tensor(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    scale, shift = decomposed.choose_qparams_symmetric.tensor(x, -127, 127, 1e-12, torch.int8)
    q = decomposed.quantize_per_tensor.tensor(x, scale, shift, -127, 127, torch.int8)
    wide = decomposed.dequantize_per_channel(w, w_scale.reshape(-1), None, 0, -127, 127, torch.int8)
    return F.linear(decomposed.dequantize_per_tensor.tensor(q, scale, shift, -127, 127, torch.int8), wide)


def dynamic_per_token(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    scale, shift = decomposed.choose_qparams_per_token(x, torch.int8)
    q = decomposed.quantize_per_token(x, scale, shift, -128, 127, torch.int8)
    wide = decomposed.dequantize_per_channel(w, w_scale.reshape(-1), None, 0, -127, 127, torch.int8)
    return F.linear(decomposed.dequantize_per_token(q, scale, shift, -128, 127, torch.int8, torch.float32), wide)


def dynamic_affine(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    from torchao.quantization.quant_primitives import MappingType as Mapping
    from torchao.quantization.quant_primitives import choose_qparams_affine, dequantize_affine, quantize_affine

    block = (1, x.shape[-1])
    scale, shift = choose_qparams_affine(x, Mapping.SYMMETRIC_NO_CLIPPING_ERR, block, torch.int8, -128, 127, eps=1e-12)
    q = quantize_affine(x, block, scale, shift, torch.int8, -128, 127)
    return F.linear(dequantize_affine(q, block, scale, shift, torch.int8, -128, 127), TORCHAO.weight(w, w_scale))


DYNAMIC = {"by_hand": dynamic_by_hand, "per_tensor": dynamic_per_tensor, "per_token": dynamic_per_token, "torchao": dynamic_affine}


@pytest.mark.parametrize("name", DYNAMIC)
def test_one_input_of_several_linears_is_quantized_once(device: str, name: str) -> None:
    """Q, K and V, each of which quantizes the input for itself, dynamically."""
    if name == "torchao":
        pytest.importorskip("torchao")
    low = -128 if name == "torchao" else -127
    q, x = (t.to(device) for t in on_a_grid((M, K), 2.0**-6, low, seed=3))
    if name == "torchao":
        x[:, 0] = -127.5 * 2.0**-6  # its symmetric scale is amax / 127.5
        x[:, 1] = 127 * 2.0**-6
    weights = [weight(N, K, seed, device)[:2] for seed in (1, 11, 21)]

    def fn(x: Tensor) -> list[Tensor]:
        return [DYNAMIC[name](x, w, w_scale) for w, w_scale in weights]

    compiled = run(fn, x)
    counts = compiled.report.counts()
    assert counts["linear"]["rewritten"] == 3, f"\n{compiled.report}"
    assert counts["quant"] == {"rewritten": 0, "feeds": 1, "float": 0, "left": 0}, f"\n{compiled.report}"
    assert counts["dequant"]["left"] == 0
    for got, (w, w_scale) in zip(compiled.output, weights, strict=True):
        want = linear64(q, w, torch.full((1,), 2.0**-6, device=device), w_scale)
        check_float(got, type(want)(want.value, want.error + 4 * 2.0**-24 * want.value.abs()))  # the scale is computed: division, and eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_per_token_are_read_as_what_they_are(device: str, dtype: torch.dtype) -> None:
    """choose_qparams_per_token returns float32 and its meta function says float64; a graph that calls it must not read one as the other."""
    x = (torch.rand(M, K, generator=torch.Generator().manual_seed(3)) - 0.5).to(dtype).to(device)

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        scale, shift = decomposed.choose_qparams_per_token(x, torch.int8)
        return scale, shift, decomposed.quantize_per_token(x.float(), scale, shift, -128, 127, torch.int8)

    scale, shift, q = fn(x)
    got = run(fn, x).output
    torch.testing.assert_close(got[0], scale.double(), rtol=1e-6 if dtype == torch.float32 else 2e-2, atol=0)
    assert torch.equal(got[1], shift.long())
    assert (got[2].short() - q.short()).abs().max() <= (0 if dtype == torch.float32 else 1)


class Attention(nn.Module):
    """Three Int8Linear of one input, and one of what they make of it."""

    def __init__(self, **scheme: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (linear_cases.make(12, 12, **scheme) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


@pytest.mark.parametrize("mapping", list(MappingType))
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_int8_linears_of_one_input_quantize_it_once(device: str, mapping: MappingType, static: bool) -> None:
    module = Attention(act_mapping_type=mapping, static=static).to(device)
    if static:  # scales calibrated apart are different tensors, whatever their values
        for name in ("input_scale", "input_zero_point"):
            setattr(module.k, name, getattr(module.q, name))
            setattr(module.v, name, getattr(module.q, name))
    x = linear_cases.randn(2, 5, 12).to(device)
    with torch.no_grad():
        want = module(x)
    compiled = run(module, x)
    compiled.check_report(linear={"rewritten": 4}, quant={"feeds": 2}, dequant={"rewritten": 8})
    # An int8 value of the last quant may be one step off where it lies near a tie.
    torch.testing.assert_close(compiled.output, want, rtol=1e-4, atol=float(module.o.weight_scale.max()) * 127 * 0.03)


def test_int8_linears_in_plain_cpp() -> None:
    """The same through Inductor's C++ for the CPU; M = 1 and N = 1 among them."""
    module = nn.Sequential(linear_cases.make(12, 8), nn.GELU(), linear_cases.make(8, 1, act_mapping_type=MappingType.ASYMMETRIC), nn.Flatten(0))
    inputs = [linear_cases.randn(2, 5, 12), linear_cases.randn(1, 12)]

    def fn(inputs: list[Tensor]) -> list[Tensor]:
        return [module(x) for x in inputs]

    with torch.no_grad():
        want = fn(inputs)
    compiled = run(fn, inputs, cpu_backend="cpp")
    compiled.check_report(linear={"rewritten": 4}, quant={"feeds": 4}, dequant={"rewritten": 8})
    assert compiled.kernels == []
    assert {entry.kernel for entry in compiled.report.linears} == {"aten._int_mm"}
    for mine, eager in zip(compiled.output, want, strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_int8_linear_in_every_scheme(device: str, scheme: dict[str, Any]) -> None:
    layer = linear_cases.make(K, N, **scheme)
    x = linear_cases.randn(2, 3, K)
    want, error = linear_cases.float64(layer, x)
    layer.to(device)
    compiled = run(layer, x.to(device))
    compiled.check_report(linear={"rewritten": 1}, quant={"feeds": 1}, dequant={"rewritten": 2})
    assert bool(((compiled.output.cpu().double() - want).abs() <= error).all())


# Gradients ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_with_and_without_gradients(context: Callable[[], Any]) -> None:
    """The same linears are rewritten whether or not autograd looks on; buffers need no gradient."""
    module = nn.Sequential(linear_cases.make(12, 8), nn.ReLU(), linear_cases.make(8, 5))
    x = linear_cases.randn(M, 12)
    with context():
        want = module(x)
        compiled = run(module, x, grad=torch.is_grad_enabled())
    compiled.check_report(linear={"rewritten": 2}, quant={"feeds": 2}, dequant={"rewritten": 4})
    torch.testing.assert_close(compiled.output, want, rtol=1e-5, atol=1e-5)
    assert compiled.output.is_inference() == (context is torch.inference_mode)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_training_through_int8_linears(static: bool) -> None:
    """The forward linears are rewritten where only the input, a bias or another parameter needs a gradient; gradients are eager's."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(K, 12), linear_cases.make(12, 8, static=static), nn.GELU(), linear_cases.make(8, 5, static=static))
        for layer in (module[1], module[3]):
            bias = layer.bias
            del layer.bias
            layer.bias = nn.Parameter(bias)
        return module

    module, x = build(), linear_cases.randn(M, K).requires_grad_()
    module(x).square().sum().backward()
    want = [x.grad, *(p.grad for p in module.parameters())]
    twin, y = build(), x.detach().clone().requires_grad_()

    def loss(y: Tensor) -> Tensor:
        return twin(y).square().sum()

    compiled = run(loss, y, grad=True)
    compiled.output.backward()
    forward = [entry for entry in compiled.report.linears if entry.status == "rewritten"]
    assert len(forward) == 2, f"\n{compiled.report}"
    # gelu's backward needs what comes before it; of a static layer's input no gradient comes back, as rounding has none.
    assert [entry.epilogue for entry in forward] == (["scales + bias + gelu + int8", "scales + bias"] if static else ["scales + bias"] * 2)
    got = [y.grad, *(p.grad for p in twin.parameters())]
    assert [g is None for g in got] == [w is None for w in want]
    for mine, eager in zip(got, want, strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-6)
    left = {entry.reason for entry in compiled.report.linears if entry.status == "left"}
    assert left == ({"the weight is [K, N] in memory, not [N, K]"} if not static else set()), f"\n{compiled.report}"


# What else reads the linear's result ----------------------------------------------------------------------------------------------


OTHER_READERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "an activation": lambda y, bias: F.gelu(y),
    "an activation behind a view": lambda y, bias: F.gelu(y.reshape(6, N)),
    "a bias behind a view": lambda y, bias: y.reshape(6, N) + bias,
    "a cast behind a view": lambda y, bias: y.reshape(6, N).to(torch.bfloat16),
}


@pytest.mark.parametrize("name", OTHER_READERS)
def test_a_result_with_another_reader_is_computed_once(name: str) -> None:
    """Folding would multiply twice: the float result is stored, and what follows stays behind it."""
    w, w_scale, bias = weight()
    q, scale = int8(2, 3, K, seed=5), torch.tensor([0.02])

    def fn(q: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(q.float() * scale, w.float() * w_scale)
        return OTHER_READERS[name](y, bias), y.cos()

    compiled = run(fn, q)
    assert_fused(compiled, 1, feeding=0)
    assert [entry.epilogue for entry in compiled.report.linears] == ["scales"]
    for mine, eager in zip(compiled.output, fn(q), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-5)
