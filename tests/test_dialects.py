"""Linears, quants and dequants in every dialect: rewritten with exact counts, nothing of the float arithmetic left, values against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dialect_cases import DIALECTS, Dialect, K, M, N, every_dialect, int8, near, rand, scheme, weight
from support import Bounded, check_float, linear64, run
from torch import Tensor

# One linear -----------------------------------------------------------------------------------------------------------------------


@every_dialect
@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "asymmetric"])
def test_one_linear(device: str, dialect: Dialect, zero_point: bool) -> None:
    """Quantized by rows where the dialect has that, and for the whole tensor, with a bias and without."""
    w, w_scale, bias = weight(device=device)
    given = [scheme(zero_point, per_row, device=device) for per_row in ((False, True) if dialect.per_row else (False,))]
    q = int8(M, K, seed=5).to(device)
    inputs = [near(q.cpu(), s.cpu(), 0 if z is None else z.cpu(), seed=6).to(device) for s, z in given]
    qparams = [dialect.qparams(s, z) for s, z in given]

    def fn(*inputs: Tensor) -> list[Tensor]:
        results = []
        for x, (s, z) in zip(inputs, qparams, strict=True):
            activation = dialect.dequantize(dialect.quantize(x, s, z), s, z)
            results += [F.linear(activation, dialect.weight(w, w_scale), bias), F.linear(activation, dialect.weight(w, w_scale))]
        return results

    compiled = run(fn, *inputs)
    counts = compiled.report.counts()
    assert counts["linear"] == {"rewritten": 2 * len(given), "feeds": 0, "float": 0, "left": 0}, f"\n{compiled.report}"
    assert counts["quant"] == {"rewritten": 0, "feeds": len(given), "float": 0, "left": 0}, f"\n{compiled.report}"
    assert counts["dequant"]["left"] == 0
    for (s, z), with_bias, without in zip(given, compiled.output[::2], compiled.output[1::2], strict=True):
        check_float(with_bias, linear64(q, w, s, w_scale, z, None, bias))
        check_float(without, linear64(q, w, s, w_scale, z))


RANKS = ("divide", "per_tensor", "per_token")


def shapes_of_input() -> dict[str, Tensor]:
    """Inputs [..., K] of 1 to 4 dimensions, and views that are not contiguous."""
    q = int8(2, 3, 4, K, seed=5)
    return {
        "vector": q[0, 0, 0],
        "3-D": q[0],
        "4-D": q,
        "transposed": int8(K, M, seed=7).t(),
        "permuted": q.permute(2, 0, 1, 3),
        "sliced": int8(2 * M, 2 * K, seed=8)[::2, ::2],
        "expanded": int8(1, K, seed=9).expand(M, K),
    }


@pytest.mark.parametrize(
    ("dialect", "per_row"),
    [pytest.param(d, rows, id=f"{d.name}-{'rows' if rows else 'tensor'}") for d in DIALECTS if d.name in RANKS for rows in {False, d.per_row}],
)
def test_inputs_of_any_rank_and_strides(device: str, dialect: Dialect, per_row: bool) -> None:
    w, w_scale, bias = weight(device=device)
    inputs = {name: q.to(device) for name, q in shapes_of_input().items()}
    given = {name: scheme(True, per_row, tuple(q.shape[:-1]), device) for name, q in inputs.items()}

    def fn(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: F.linear(dialect.dequantize(q, *given[name]), dialect.weight(w, w_scale), bias) for name, q in inputs.items()}

    compiled = run(fn, inputs)
    assert compiled.linears() == len(inputs), f"\n{compiled.report}"
    assert compiled.report.left() == []
    for name, q in inputs.items():
        scale, shift = given[name]
        want = linear64(q.reshape(-1, K), w, scale, w_scale, shift, None, bias)
        got = compiled.output[name]
        assert got.shape == (*q.shape[:-1], N)
        check_float(got.reshape(-1, N), want)


def test_data_moved_between_dequantize_and_linear(device: str) -> None:
    """Views and permutes that keep K last move int8 and the scales by rows in the same way."""
    q, (w, w_scale, bias) = int8(2, 3, 4, K, seed=5).to(device), weight(device=device)
    scale = (rand(2, 3, 4, 1, seed=6) * 0.02).to(device)
    narrow_scale, narrow_q = (rand(3, 1, seed=7) * 0.02).to(device), q[:1, :, 0]

    def fn(q: Tensor, narrow_q: Tensor) -> tuple[Tensor, ...]:
        x, narrow = q.float() * scale, narrow_q.float() * narrow_scale
        wide = w.float() * w_scale
        return (
            F.linear(x.permute(2, 0, 1, 3), wide, bias),
            F.linear(x.transpose(0, 1).reshape(6, 4, K), wide, bias),
            F.linear(x.flatten(0, 2).unsqueeze(1), wide, bias),
            F.linear(narrow.transpose(0, 1), wide, bias),  # the scale has one dimension less than what it scales
        )

    compiled = run(fn, q, narrow_q)
    compiled.check_report(linear={"rewritten": 4}, dequant={"rewritten": 3})
    whole = linear64(q.reshape(-1, K), w, scale, w_scale, None, None, bias)
    for got, move in zip(
        compiled.output,
        (lambda t: t.permute(2, 0, 1, 3), lambda t: t.transpose(0, 1).reshape(6, 4, N), lambda t: t.flatten(0, 2).unsqueeze(1)),
        strict=False,
    ):
        value, error = (move(t.reshape(2, 3, 4, N)) for t in (whole.value, whole.error))
        check_float(got, Bounded(value, error))
    check_float(compiled.output[3].reshape(3, N), linear64(narrow_q.reshape(3, K), w, narrow_scale, w_scale, None, None, bias))


# How the product is written -------------------------------------------------------------------------------------------------------


@every_dialect
def test_products_and_where_the_weight_lies(device: str, dialect: Dialect) -> None:
    """mm, matmul, addmm, a bias added apart; and a weight kept as [K, N]."""
    w, w_scale, bias = weight(device=device)
    stored, q = w.t().contiguous(), int8(M, K, seed=5).to(device)
    scale, _ = scheme(False, False, device=device)
    s, _ = dialect.qparams(scale)

    def fn(q: Tensor) -> list[Tensor]:
        x, wide = dialect.dequantize(q, s, None), dialect.weight(w, w_scale)
        across = dialect.weight(stored.t(), w_scale).t()
        return [
            torch.mm(x, wide.t()) + bias,
            x @ wide.transpose(0, 1) + bias.unsqueeze(0),
            bias + torch.mm(x, across),
            torch.addmm(bias, x, across),
            torch.addmm(bias.reshape(1, N), x, stored.float() * w_scale.reshape(1, N)),
            torch.addmm(bias, x, wide.t(), beta=1, alpha=1),
        ]

    compiled = run(fn, q)
    assert compiled.linears() == 6, f"\n{compiled.report}"
    assert compiled.report.left() == []
    assert [entry.epilogue for entry in compiled.report.linears] == ["scales + bias"] * 6
    want = linear64(q, w, scale, w_scale, None, None, bias)
    for got in compiled.output:
        check_float(got, want)


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, N, K), (M, 1, K), (M, N, 1), (1, 1, K), (1, 1, 1)])
def test_sizes_of_one_in_every_mode(mode: str, m: int, n: int, k: int) -> None:
    """Inductor would turn such products into mul and sum."""
    (w, w_scale, bias), (scale, shift) = weight(n, k), scheme(True, True, (m,))
    q = int8(m, k, seed=5)

    def fn(q: Tensor) -> tuple[Tensor, Tensor]:
        x, wide = (q.float() - shift) * scale, w.float() * w_scale
        return F.linear(x, wide, bias), torch.mm(x, wide.t())

    compiled = run(fn, q, mode=mode)
    compiled.check_report(linear={"rewritten": 2}, dequant={"rewritten": 2})
    check_float(compiled.output[0], linear64(q, w, scale, w_scale, shift, None, bias))
    check_float(compiled.output[1], linear64(q, w, scale, w_scale, shift))


# Dtypes ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_dialect
def test_a_model_in_half_precision(device: str, dialect: Dialect, dtype: torch.dtype) -> None:
    """Casts between dequantize and linear, and a bias in half precision."""
    w, w_scale, bias = weight(device=device)
    half_bias, (scale, shift) = bias.to(dtype), scheme(True, False, device=device)
    s, z = dialect.qparams(scale, shift)
    q = int8(M, K, seed=5).to(device)

    def fn(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, wide = dialect.dequantize(q, s, z), dialect.weight(w, w_scale)
        half, half_wide = x.to(dtype), wide.to(dtype)
        return F.linear(half, half_wide, half_bias), F.linear(x, wide, half_bias.float()).to(dtype), F.linear(half.float(), half_wide.float())

    compiled = run(fn, q)
    assert compiled.linears() == 3, f"\n{compiled.report}"
    assert compiled.report.left() == []
    want = linear64(q, w, scale, w_scale, shift, None, half_bias)
    assert [t.dtype for t in compiled.output] == [dtype, dtype, torch.float32]
    check_float(compiled.output[0], want)
    check_float(compiled.output[1], want)
    check_float(compiled.output[2], linear64(q, w, scale, w_scale, shift))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_in_half_precision(device: str, dtype: torch.dtype) -> None:
    """Plain aten whose scales and steps are half precision themselves; the product is computed from the same scales in float32."""
    w, w_scale, bias = (t.to(dtype) if t.is_floating_point() else t for t in weight(device=device))
    q, scale = int8(M, K, seed=5).to(device), torch.tensor([0.02], dtype=dtype, device=device)
    x = near(q.cpu(), scale.cpu().float(), seed=6).to(device, dtype)

    def fn(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        quantized = torch.clamp(torch.round(x / scale), -128, 127).to(torch.int8)
        return F.linear(q.to(dtype) * scale, w.to(dtype) * w_scale, bias), quantized

    compiled = run(fn, x, q)
    compiled.check_report(linear={"rewritten": 1}, quant={"left": 1}, dequant={"rewritten": 2})
    check_float(compiled.output[0], linear64(q, w, scale, w_scale, None, None, bias))
    assert int((compiled.output[1].int() - q.int()).abs().max()) <= 1  # bfloat16 has 8 bits, so x / scale is a step off at most


# Spellings that no dialect has for itself -----------------------------------------------------------------------------------------

W, W_SCALE, BIAS = weight()
SCALE = torch.tensor([0.02])

SPELLINGS: dict[str, Callable[[Tensor], Any]] = {
    "constants in the graph": lambda q: F.linear((q.float() - torch.tensor([3])) * torch.tensor([0.02]), W.float() * W_SCALE),
    "constants without dimensions": lambda q: F.linear((q.float() - torch.tensor(3)) * torch.tensor(0.02), W.float() * W_SCALE),
    "filled tensors": lambda q: F.linear((q.float() - torch.full((1, 1), 3)) * torch.full((1,), 0.02), W.float() * W_SCALE),
    "zeros": lambda q: F.linear((q.float() - torch.zeros(1, dtype=torch.int64)) * SCALE, W.float() * W_SCALE),
    "a uint8 zero point": lambda q: F.linear((q.float() - torch.tensor([200], dtype=torch.uint8)) * SCALE, W.float() * W_SCALE),
    "a zero point that a cast changes": lambda q: F.linear((q.float() - torch.tensor([300]).to(torch.int8)) * SCALE, W.float() * W_SCALE),
    "in place": lambda q: F.linear(q.float().sub_(3).mul_(SCALE), W.float() * W_SCALE, BIAS).relu_(),
    "weight on the left": lambda q: torch.mm(W.float() * W_SCALE, (q.float() * SCALE).t()),
    "a part of the input": lambda q: F.linear(q[1:, :].float() * SCALE, W.float() * W_SCALE),
    "joined weights": lambda q: F.linear(q.float() * SCALE, torch.cat([W, W]).float() * torch.cat([W_SCALE, W_SCALE])),
    "a residual of one row": lambda q: F.relu(F.linear(q[:1].float() * SCALE, W.float() * W_SCALE) + BIAS.reshape(1, N).sin()),
    "one row, twice": lambda q: (lambda y: y + y)(F.linear(q[:1].float() * SCALE, W.float() * W_SCALE)),
    "one scale for the weight": lambda q: F.linear(q.float() * SCALE, W.float() * SCALE),
    "int16 steps": lambda q: F.linear((q.to(torch.int16) - 7).float() * SCALE, W.float() * W_SCALE),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    fn, q = SPELLINGS[name], int8(M, K, seed=5)
    compiled = run(fn, q)
    compiled.check_report(linear={"rewritten": 1}, dequant={"rewritten": 2})
    torch.testing.assert_close(compiled.output, fn(q), rtol=1e-5, atol=1e-5)
