"""Near misses of linears and dequants: what is not exactly the pattern is left alone, gives what stock Inductor gives, and is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decline_cases import (
    ALONG_K,
    BIAS,
    ONE,
    OUT,
    ROW_BIAS,
    SCALE,
    SHIFT,
    W_SCALE,
    WHOLE,
    WHOLE_BIAS,
    Q,
    W,
    X,
    assert_left,
    left_alone,
    reasons,
    to_int8,
    wide,
)  # fmt: skip
from dialect_cases import Dialect, K, M, N, decomposed, every_dialect, int8, near, per_channel, per_channel_with_zeros, rand
from support import check_float, linear64, run
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from int8_inductor import LeftBehindError, Report, config, reference
from int8_inductor.explain import recording
from int8_inductor.passes import Int8Pass

# Linears --------------------------------------------------------------------------------------------------------------------------

WRONG_LINEARS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "weight scaled along K": (
        lambda q: F.linear(q.float() * SCALE, W.float() * ALONG_K),
        r"the weight's scale varies along dimensions \[1\] of \[23, 41\], not along \[0\]",
    ),
    "weight scaled by each element": (
        lambda q: F.linear(q.float() * SCALE, W.float() * WHOLE),
        r"the weight's scale varies along dimensions \[0, 1\] of \[23, 41\], not along \[0\]",
    ),
    "activation scaled along K": (
        lambda q: F.linear(q.float() * ALONG_K, wide()),
        r"the activation's scale varies along dimensions \[1\] of \[6, 41\], not along \[0\]",
    ),
    "activation shifted along K": (
        lambda q: F.linear((q.float() - torch.arange(K)) * SCALE, wide()),
        r"the activation's zero point varies along dimensions \[1\] of \[6, 41\], not along \[0\]",
    ),
    "weight with a zero point": (
        lambda q: F.linear(q.float() * SCALE, (W.float() - SHIFT) * W_SCALE),
        "the weight has a zero point",
    ),
    "weight with a zero point by rows": (
        lambda q: F.linear(q.float() * SCALE, (W.float() - torch.arange(N).reshape(N, 1)) * W_SCALE),
        "the weight has a zero point",
    ),
    "float activation": (lambda q: X @ (W.t().contiguous().float() * W_SCALE.t()), r"the weight is \[K, N\] in memory, not \[N, K\]"),
    "float weight": (lambda q: F.linear(q.float() * SCALE, W_SCALE.expand(N, K)), "its activation is dequantized from int8 and its weight is not"),
    "uint8 weight": (
        lambda q: F.linear(q.float() * SCALE, W.to(torch.uint8).float() * W_SCALE),
        "its activation is dequantized from int8 and its weight is not",
    ),
    "a zero point that is no whole number": (
        lambda q: F.linear((q.float() - 0.5) * SCALE, wide()),
        r"mul\w* is no dequantize that is matched: its zero point 0\.5 is not an int8 value",
    ),
    "a zero point that int8 does not hold": (
        lambda q: F.linear((q.float() - 1000) * SCALE, wide()),
        r"mul\w* is no dequantize that is matched: its zero point 1000 is not an int8 value",
    ),
    "a zero point of floats": (
        lambda q: F.linear((q.float() - torch.tensor([0.5])) * SCALE, wide()),
        r"mul\w* is no dequantize that is matched: its zero point \w+ is torch.float32, not an integer",
    ),
    "float64": (
        lambda q: F.linear(q.double() * SCALE, W.double() * W_SCALE),
        r"mul\w* is no dequantize that is matched: it dequantizes to torch.float64",
    ),
    "a bias for each row": (lambda q: torch.addmm(ROW_BIAS, q.float() * SCALE, wide().t()), r"the bias has shape \[6, 1\], not \[23\]"),
    "a bias for each element": (lambda q: torch.addmm(WHOLE_BIAS, q.float() * SCALE, wide().t()), r"the bias has shape \[6, 23\], not \[23\]"),
    "one bias for all": (lambda q: torch.addmm(ONE, q.float() * SCALE, wide().t()), r"the bias has shape \[1\], not \[23\]"),
    "addmm with beta": (lambda q: torch.addmm(BIAS, q.float() * SCALE, wide().t(), beta=2), "addmm with beta 2 and alpha 1"),
    "addmm with alpha": (lambda q: torch.addmm(BIAS, q.float() * SCALE, wide().t(), alpha=0.5), r"addmm with beta 1 and alpha 0\.5"),
    "bmm": (
        lambda q: torch.bmm((q.float() * SCALE).reshape(2, 3, K), torch.stack([wide().t(), wide().t() * 2])),
        r"a batched product \(bmm\) is not a linear",
    ),
    "weight that is a view of another shape": (
        lambda q: torch.mm(q.float() * SCALE, (W.float() * SCALE).reshape(K, N)),
        r"the weight is reshaped by \w+ between the dequant and the linear",
    ),
    "activation whose rows are mixed": (
        lambda q: F.linear((q.float() * SCALE).reshape(K, M).t(), wide()),
        "the activation's rows are rearranged between the dequant and the linear",
    ),
    "weight of three dimensions": (
        lambda q: torch.mm(q.float() * SCALE, (W.reshape(1, N, K).float() * SCALE).reshape(N, K).t()),
        "the weight has 3 dimensions",
    ),
}


@pytest.mark.parametrize("name", WRONG_LINEARS)
def test_a_linear_that_is_not_exactly_the_pattern(name: str) -> None:
    fn, reason = WRONG_LINEARS[name]
    compiled = left_alone(fn, Q)
    assert_left(compiled, "linear", reason)
    assert compiled.linears() == 0
    assert all(entry.status == "left" and entry.reason for entry in compiled.report.dequants), f"\n{compiled.report}"


def test_a_factor_of_an_addition_is_no_bias_and_no_activation() -> None:
    """alpha of add and sub, which Inductor's matcher does not compare."""

    def fn(q: Tensor) -> tuple[Tensor, ...]:
        y = torch.mm(q.float() * SCALE, wide().t())
        cubed = torch.tanh(0.7978845608028654 * (y + 0.044715 * torch.pow(y, 3.0)))
        return (
            torch.add(torch.mm(q.float() * SCALE, wide().t()), BIAS, alpha=2),
            0.5 * y * torch.add(cubed, 1.0, alpha=3),
            torch.mm(torch.sub(q.float(), SHIFT, alpha=2) * SCALE, wide().t()),
        )

    compiled = run(fn, Q)
    assert [entry.epilogue for entry in compiled.report.linears] == ["scales"] * 3, f"\n{compiled.report}"
    y = linear64(Q, W, SCALE, W_SCALE)
    cubed = torch.tanh(0.7978845608028654 * (y.value + 0.044715 * y.value**3))
    wants = (y.value + 2 * BIAS.double(), 0.5 * y.value * (cubed + 3), linear64(Q, W, SCALE, W_SCALE, 2 * SHIFT).value)
    for got, want in zip(compiled.output, wants, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert compiled.has("weight_int8_mm"), "what is subtracted twice is no zero point: that activation is multiplied as floats"


# Dequants -------------------------------------------------------------------------------------------------------------------------


@every_dialect
def test_a_dequant_with_another_user_keeps_its_float_value(dialect: Dialect) -> None:
    s, z = dialect.qparams(SCALE, SHIFT)
    # Inductor cannot compile a dequantize_per_channel whose zero points are None, so that one must not be left.
    dequantize_weight = per_channel_with_zeros if dialect.weight is per_channel else dialect.weight

    def fn(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, w = dialect.dequantize(q, s, z), dequantize_weight(W, W_SCALE)
        return F.linear(x, w, BIAS), torch.exp(x), w.sum(1)

    compiled = run(fn, Q)
    compiled.check_report(linear={"rewritten": 1}, dequant={"left": 2})
    assert_left(compiled, "dequant", r"its float value has another user: exp", r"its float value has another user: sum_1")
    y, exponential, total = compiled.output
    check_float(y, linear64(Q, W, SCALE, W_SCALE, SHIFT, None, BIAS))
    torch.testing.assert_close(exponential.double(), torch.exp((Q.double() - SHIFT) * SCALE.double()), rtol=1e-6, atol=0)
    torch.testing.assert_close(total.double(), (W.double() * W_SCALE.double()).sum(1), rtol=1e-5, atol=1e-5)


def affine(w: Tensor, block: tuple[int, int], scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    from torchao.quantization.quant_primitives import dequantize_affine

    return dequantize_affine(w, block, scale, zero_point, torch.int8, -128, 127)


COLUMN_SCALES, COLUMN_ZEROS, GROUPED = rand(1, K) * 0.01, torch.zeros(K, dtype=torch.int64), int8(N, 40, seed=9)
INT8_SHIFTS, TOKEN_SCALES = int8(M, 1, seed=8), rand(M, 1) * 0.02

WRONG_DEQUANTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "per channel along K": (
        lambda q: F.linear(q.float() * SCALE, decomposed.dequantize_per_channel(W, COLUMN_SCALES[0], COLUMN_ZEROS, 1, -128, 127, torch.int8)),
        r"the weight's scale varies along dimensions \[1\] of \[23, 41\], not along \[0\]",
    ),
    "activation per channel along K": (
        lambda q: F.linear(decomposed.dequantize_per_channel(q, COLUMN_SCALES[0], COLUMN_ZEROS, 1, -128, 127, torch.int8), wide()),
        r"the activation's scale varies along dimensions \[1\] of \[6, 41\], not along \[0\]",
    ),
    "per tensor weight with a zero point": (
        lambda q: F.linear(q.float() * SCALE, decomposed.dequantize_per_tensor(W, 0.01, 3, -128, 127, torch.int8)),
        "the weight has a zero point",
    ),
    "per token, whose int8 zero points wrap around": (
        lambda q: F.linear(decomposed.dequantize_per_token(q, TOKEN_SCALES, INT8_SHIFTS, -128, 127, torch.int8, torch.float32), wide()),
        r"dequantize_per_token is no dequantize that is matched: its zero points \w+ are int8, and the difference wraps around",
    ),
    "per channel group": (
        lambda q: F.linear(
            q[:, :40].float() * SCALE,
            decomposed.dequantize_per_channel_group(GROUPED, TOKEN_SCALES[:1].expand(N, 2), None, -128, 127, torch.int8, 20, torch.float32),
        ),
        r"dequantize_per_channel_group has its scales in groups",
    ),
}
WRONG_AFFINE_DEQUANTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "affine along K": (
        lambda q: F.linear(q.float() * SCALE, affine(W, (N, 1), COLUMN_SCALES)),
        r"the weight's scale varies along dimensions \[1\] of \[23, 41\], not along \[0\]",
    ),
    "affine weight with a zero point": (
        lambda q: F.linear(q.float() * SCALE, affine(W, (1, K), W_SCALE, SHIFT.expand(N, 1))),
        "the weight has a zero point",
    ),
    "affine in groups": (
        lambda q: F.linear(q[:, :40].float() * SCALE, affine(GROUPED, (1, 20), TOKEN_SCALES[:1].expand(N, 2))),
        r"the weight has 3 dimensions",
    ),
}


@pytest.mark.parametrize("name", [*WRONG_DEQUANTS, *WRONG_AFFINE_DEQUANTS])
def test_a_dequant_of_a_dialect_that_is_not_exactly_the_pattern(name: str) -> None:
    if name in WRONG_AFFINE_DEQUANTS:
        pytest.importorskip("torchao")
    fn, reason = {**WRONG_DEQUANTS, **WRONG_AFFINE_DEQUANTS}[name]
    compiled = left_alone(fn, Q)
    assert_left(compiled, "linear", reason)
    assert compiled.linears() == 0
    assert all(entry.status == "left" and entry.reason for entry in compiled.report.dequants), f"\n{compiled.report}"


def test_per_channel_zero_points_of_a_weight_are_corrected_for() -> None:
    """What PT2E writes: a tensor that is zero in practice. Whatever it holds, the result is exact."""
    zero_points = torch.arange(N) - 9

    def fn(q: Tensor) -> Tensor:
        w = decomposed.dequantize_per_channel(W, W_SCALE.reshape(-1), zero_points, 0, -128, 127, torch.int8)
        return F.linear((q.float() - SHIFT) * SCALE, w)

    compiled = run(fn, Q)
    compiled.check_report(linear={"rewritten": 1}, dequant={"rewritten": 2})
    check_float(compiled.output, linear64(Q, W, SCALE, W_SCALE, SHIFT, zero_points))


# What decides by size, device or gradient -----------------------------------------------------------------------------------------


def run_passes(fn: Callable[..., Any], *inputs: Tensor) -> tuple[torch.fx.Graph, Report]:
    """The passes alone, over the graph of `fn` for fake inputs: sizes and devices that this machine has no room for, or lacks."""
    graph = make_fx(fn, decomposition_table=select_decomp_table())(*inputs).graph
    with recording() as report:
        Int8Pass("torch")(graph)
    return graph, report


def fake(*shape: int, dtype: torch.dtype = torch.int8, device: str = "cpu") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def shifted_product(a_shift: int, b_shifts: bool) -> Callable[..., Tensor]:
    def fn(a: Tensor, b: Tensor, zero_points: Tensor) -> Tensor:
        scales = torch.ones_like(zero_points, dtype=torch.float32)
        wide = decomposed.dequantize_per_channel(b, scales, zero_points if b_shifts else None, 0, -128, 127, torch.int8)
        return torch.mm((a.float() - a_shift) * 0.5, wide.t())

    return fn


@pytest.mark.parametrize(
    ("a_shift", "b_shifts", "limit"), [(0, False, reference.MAX_K), (3, False, reference.MAX_K_ZERO_POINT), (3, True, reference.MAX_K_ZERO_POINTS)]
)
@pytest.mark.parametrize("beyond", [0, 1])
def test_int32_must_not_overflow(a_shift: int, b_shifts: bool, limit: int, beyond: int) -> None:
    k = limit + beyond
    with FakeTensorMode():
        _, report = run_passes(shifted_product(a_shift, b_shifts), fake(4, k), fake(8, k), fake(8, dtype=torch.int32))
    (linear,) = report.linears
    assert linear.status == ("left" if beyond else "rewritten"), f"\n{report}"
    assert linear.reason == (f"K is {k}: beyond {limit} int32 could overflow" if beyond else "")


@pytest.mark.parametrize(("name", "m", "n", "k"), [("M", 0, 8, 16), ("N", 4, 0, 16), ("K", 4, 8, 0)])
def test_nothing_to_multiply(name: str, m: int, n: int, k: int) -> None:
    with FakeTensorMode():
        _, report = run_passes(shifted_product(3, False), fake(m, k), fake(n, k), fake(n, dtype=torch.int32))
    (linear,) = report.linears
    assert (linear.status, linear.reason) == ("left", f"{name} is 0")


def test_no_rows_compile_and_give_no_rows() -> None:
    got = left_alone(lambda q: F.linear(q.float() * SCALE, wide(), BIAS), Q[:0]).output
    assert got.shape == (0, N)


def test_a_scale_on_another_device() -> None:
    """A scale of no dimensions may be on the CPU while the values are not; a kernel could not read it."""

    def fn(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return torch.mm(a.float() * scale, (b.float() * 0.5).t())

    with FakeTensorMode():
        _, report = run_passes(fn, fake(4, 16, device="cuda"), fake(8, 16, device="cuda"), torch.ones(()))
    (linear,) = report.linears
    assert (linear.status, linear.reason) == ("left", "the activation's scale is on cpu and the value on cuda:0")


def test_a_symbolic_k() -> None:
    q, w = Q.clone(), W.clone()
    torch._dynamo.mark_dynamic(q, 1)
    torch._dynamo.mark_dynamic(w, 1)
    compiled = run(lambda q, w: F.linear(q.float() * SCALE, w.float() * W_SCALE), q, w)
    assert_left(compiled, "linear", "K is symbolic")
    torch.testing.assert_close(compiled.output.double(), linear64(Q, W, SCALE, W_SCALE).value, rtol=1e-5, atol=1e-5)


SIZES: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "scale": (lambda q: F.linear(q.float() * q.shape[0], wide()), "linear", r"mul\w* is no .*: its scale \w+ is a symbolic number"),
    "zero point": (
        lambda q: F.linear((q.float() - q.shape[0]) * SCALE, wide()),
        "linear",
        r"mul\w* is no .*: its zero point \w+ is a symbolic number",
    ),
    "out scale": (
        lambda q: to_int8(torch.round(F.linear(q.float() * SCALE, wide()) / q.shape[0])),
        "quant",
        r"its scale \w+ is a symbolic number",
    ),
    "out zero point": (
        lambda q: to_int8(torch.round(F.linear(q.float() * SCALE, wide()) / OUT) + q.shape[0]),
        "quant",
        r"its zero point \w+ is a symbolic number",
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_as_scales_and_zero_points(name: str) -> None:
    fn, kind, reason = SIZES[name]
    q = Q.clone()
    torch._dynamo.mark_dynamic(q, 0)
    compiled = run(fn, q)
    assert_left(compiled, kind, reason)
    torch.testing.assert_close(compiled.output, fn(Q), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("what", ["scale", "weight"])
def test_a_training_graph_that_needs_the_weights_gradient(what: str) -> None:
    """Learned scales, and a weight that is quantized from a parameter in each step."""
    parameter = (W_SCALE.clone() if what == "scale" else near(W, 0.01, seed=9)).requires_grad_()

    def fn(q: Tensor, parameter: Tensor) -> Tensor:
        scale = parameter if what == "scale" else parameter.abs().amax(1, keepdim=True) / 127
        w = W if what == "scale" else to_int8(torch.round(parameter / scale))
        return F.linear(q.float() * SCALE, w.float() * scale, BIAS).square().sum()

    fn(Q, parameter).backward()
    want, parameter.grad = parameter.grad, None
    compiled = run(fn, Q, parameter, grad=True)
    compiled.output.backward()
    assert_left(compiled, "linear", "this training graph needs the weight's gradient", *[".*"] * (len(reasons(compiled, "linear")) - 1))
    assert compiled.linears() == 0
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-4)


# Strict ---------------------------------------------------------------------------------------------------------------------------

LEFTOVERS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "linear": (lambda q: F.linear(q.float() * SCALE, W.float() * ALONG_K), "linear mm was left as it was: the weight's scale varies"),
    "quant": (lambda q: to_int8(torch.floor(F.linear(q.float() * SCALE, wide()) / OUT)), "quant .* was left as it was: it rounds by floor"),
    "dequant": (lambda q: (q.float() * SCALE).sin(), "dequant mul was left as it was: its float value has another user: sin"),
}


@pytest.mark.parametrize("kind", LEFTOVERS)
def test_strict_raises_on_what_is_left(kind: str) -> None:
    fn, words = LEFTOVERS[kind]
    with config.patch(strict=True), pytest.raises(LeftBehindError, match=words):
        run(fn, Q)
    assert any(entry.kind == kind for entry in run(fn, Q).report.left())


def test_strict_lets_pass_what_is_rewritten_and_what_nobody_quantized() -> None:
    def fn(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(to_int8(torch.round(x / SCALE)).float() * SCALE, wide(), BIAS)
        return F.linear(F.relu(y), WHOLE[:, :N]), to_int8(torch.round(F.linear(q.float() * SCALE, wide(), BIAS) / OUT))

    with config.patch(strict=True):
        compiled = run(fn, X, Q)
    compiled.check_report(linear={"rewritten": 2, "float": 1}, quant={"feeds": 1, "rewritten": 1}, dequant={"rewritten": 4})
