"""Linears of frozen graphs on a CPU: one call of oneDNN's kernel, what it computes, and where it must not be used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from hypothesis import assume, given
from hypothesis import strategies as st
from prepacked_cases import FORM, KERNEL, Case, Product, calls, frozen, prepacks, taken  # noqa: F401 - a fixture that is used by itself
from support import check_blocks, check_float, check_int8, examples, linear64, run
from torch import Tensor
from torch._dynamo.utils import counters

from int8_inductor import ops, reference
from int8_inductor.epilogues import EPILOGUES
from int8_inductor.onednn import forms, prepacked
from int8_inductor.onednn.forms import FORMS, SIGNED, UNSIGNED, Form

SHIFTS_EXACTLY = forms.shifts_exactly

# What is computed -----------------------------------------------------------------------------------------------------------------

SIZES = st.sampled_from([1, 2, 3, 7, 16, 31, 64, 97])
ACTIVATIONS = st.sampled_from(list(EPILOGUES))
LAYOUT = st.sampled_from(["contiguous", "transposed", "sliced", "offset", "expanded"])
BIAS = st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16])
FORM_TAKEN = st.sampled_from(FORMS)
SCALES = st.sampled_from([(0.01, 0.01), (1e-30, 1e25), (1e30, 1e-28), (1e-4, 3.0), (0.0, 0.01)])


@examples(6)
@given(
    m=SIZES, n=SIZES, k=SIZES, static=st.booleans(), zero_point=st.sampled_from([None, 0, -128, 5, 127]), bias=BIAS, activation=ACTIVATIONS,
    out_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]), layout=LAYOUT, weight_layout=LAYOUT, scales=SCALES,
    form=FORM_TAKEN, seed=st.integers(0, 9),
)  # fmt: skip
def test_floats(scales: tuple[float, float], form: Form, **drawn: Any) -> None:
    case = Case(**drawn, a_scale=scales[0], b_scale=scales[1])
    assume(scales == (0.01, 0.01) or case.bias in (None, torch.float32))  # others overflow
    with taken(form):
        compiled = case.check()
    if case.zero_point is None or (case.static and scales != (0.0, 0.01)):
        assert len(calls(compiled)) == 1
    else:
        assert not compiled.has(KERNEL)


@examples(6)
@given(
    m=SIZES, n=SIZES, k=SIZES, static=st.booleans(), zero_point=st.sampled_from([None, -7]), bias=BIAS, activation=ACTIVATIONS,
    out_scale=st.sampled_from([1e-6, 1e-3, 0.002, 0.05, 1.0, 1e30]), out_zero_point=st.sampled_from([None, -128, 3, 127]),
    quant_min=st.sampled_from([-128, -127]), form=FORM_TAKEN, seed=st.integers(0, 9),
)  # fmt: skip
def test_int8(form: Form, **drawn: Any) -> None:
    case = Case(**drawn)
    with taken(form):
        compiled = case.check()
    if case.static or case.zero_point is None:
        (call,) = calls(compiled)
        assert (f", {form.dtype}, " in call) is _is_stored(case)


def _is_stored(case: Case) -> bool:
    """Whether oneDNN's kernel may store int8 itself."""
    post_op = EPILOGUES[case.activation].onednn
    assert post_op is not None
    assert case.out_scale is not None
    coarse = case.out_scale >= 100 * post_op.error and case.out_scale < 2.0**96
    least = post_op.least / case.out_scale + (case.out_zero_point or 0)
    return case.static and coarse and (case.quant_min == -128 or least > -127)


@pytest.mark.parametrize("static", [True, False])
def test_blocks(static: bool) -> None:
    """int8 with scales per block of columns: up to the activation by oneDNN with a static scale, the sums with a dynamic one."""
    case = Case(9, 72, 48, static=static, bias=torch.float32, activation="gelu")
    operands = case.operands()
    inputs = ("a",) if static else ("a", "a_scale")
    constants = {name: value for name, value in operands.items() if name not in inputs}
    module = Product(inputs, constants, {"activation": "gelu", "block_size": 32}, ops.scaled_mm_block_quant)
    compiled = frozen(module, *(operands[name] for name in inputs))
    (call,) = calls(compiled)
    assert ("'gelu'" in call) is static
    check_blocks(*compiled.output, linear64(**operands, activation="gelu"), 32)


def test_any_number_of_rows() -> None:
    """Compiled for one, run with another, and with none."""
    case = Case(40, 24, 48, bias=torch.float32, activation="gelu", out_scale=0.02)
    operands, (stored, numbers) = case.operands(), case.store()
    a = operands.pop("a")
    torch._dynamo.mark_dynamic(a, 0)
    module = Product(("a",), {**operands, **stored}, {**numbers, "activation": "gelu"})
    with inductor_config.patch(freezing=True, cpu_backend="cpp", force_disable_caches=True), torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="int8_inductor")
        for given_rows in (a, a[:2].clone(), a.repeat(5, 1), a[:0].clone()):
            want = linear64(given_rows, **operands, activation="gelu")
            check_int8(compiled(given_rows), want, stored["out_scale"])


@pytest.mark.parametrize("case", [Case(33, 40, 72, activation="gelu"), Case(33, 40, 72, static=False, bias=torch.float32)], ids=str)
def test_with_every_config_timed(case: Case) -> None:
    """Inductor's own template is no candidate: it corrects zero points in float32."""
    assert len(calls(case.check(mode="max-autotune"))) == 1


# What of it is true of oneDNN -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", list(EPILOGUES))
def test_post_ops(activation: str) -> None:
    """Within their error, 2e-6 relatively, or 1e-35 of float64 over the whole range, and never below their least value."""
    post_op = EPILOGUES[activation].onednn
    assert post_op is not None
    large = torch.logspace(-30, 30, 3001)
    x = torch.cat([torch.linspace(-20, 20, 400001), large, -large, torch.tensor([0.0, -0.0])])
    a, b = torch.zeros(1, 4, dtype=torch.int8), torch.zeros(len(x), 4, dtype=torch.int8)
    packed, ones, zeros = torch.ops.onednn.qlinear_prepack(b, [1, 4]), torch.ones(len(x)), torch.zeros(len(x), dtype=torch.int32)
    stored = (1.0, 0, torch.float32, post_op.name, [], post_op.algorithm)
    got = torch.ops.onednn.qlinear_pointwise(a, 1.0, 0, packed, ones, zeros, x, *stored)[0]
    want = EPILOGUES[activation].eager(x.double()) if activation != "gelu" else 0.5 * x.double() * torch.erfc(-x.double() / math.sqrt(2))
    error = (got.double() - want).abs()
    assert bool((error <= (2e-6 * want.abs()).clamp(min=max(post_op.error, 1000 * torch.finfo(torch.float32).tiny))).all())
    assert got.min() >= post_op.least


@pytest.fixture
def asked_anew() -> Iterator[None]:
    FORM.cache_clear()
    yield
    FORM.cache_clear()


@pytest.mark.parametrize(("saturated", "form"), [((), SIGNED), ((torch.int8,), UNSIGNED), ((torch.int8, torch.uint8), None)])
def test_an_inexact_kernel_is_found(saturated: tuple[torch.dtype, ...], form: Form | None, asked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(a: Tensor, packed: Tensor, zero_point: int) -> Tensor:
        sums = (a[:, :1].float() - zero_point) * -127 * a.shape[1]
        return (sums.clamp(-(2**15), 2**15) if a.dtype in saturated else sums).expand(len(a), packed.shape[1])

    monkeypatch.setattr(forms, "_is_fast", lambda form: True)
    monkeypatch.setattr(forms, "product", product)
    assert FORM() == form


def test_a_kernel_that_adds_128_to_signed_values_has_to_take_it_off_in_int32(asked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(a: Tensor, packed: Tensor, zero_point: int) -> Tensor:
        """In float32, as if a were unsigned."""
        inside = 128 if a.dtype == torch.int8 else 0
        values = ((a[:, :1].int() + inside) * -127 * a.shape[1]).float() - float((zero_point + inside) * -127 * a.shape[1])
        return values.expand(len(a), packed.shape[1])

    monkeypatch.setattr(forms, "_is_fast", lambda form: True)
    monkeypatch.setattr(forms, "product", product)
    assert FORM() == UNSIGNED
    assert not any(map(SHIFTS_EXACTLY.__wrapped__, FORMS))


def test_another_kind_of_cpu_is_not_asked(asked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(forms, "_sums_are_exact", lambda *given: pytest.fail("asked"))
    assert FORM() is None


@pytest.mark.parametrize(("milliseconds", "fast", "calls"), [(0, True, 7), (60, False, 7), (2000, False, 2)])
def test_a_slow_kernel_is_found(milliseconds: float, fast: bool, calls: int, asked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a float32 product of 20 ms; one of a hundred times as long is called twice."""
    counted: list[Any] = []
    seconds = {"mm": 0.02, "product": milliseconds / 1000}
    now = [0.0]

    def advance(name: str) -> Any:
        counted.append(name)
        now[0] += seconds[name]

    monkeypatch.setattr(forms, "_sums_are_exact", lambda *given: True)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "mm", lambda *given: advance("mm"))
    monkeypatch.setattr(forms, "product", lambda *given: advance("product"))
    assert FORM() is (SIGNED if fast else None)
    assert counted.count("product") == calls * (1 if fast else len(FORMS))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: str(form.dtype))
@pytest.mark.parametrize("in_int32", [True, False])
def test_where_sums_are_exact(form: Form, in_int32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the zero point is taken off in float32, sums of this weight's largest row have to fit it, the zero point's part included."""
    monkeypatch.setattr(forms, "shifts_exactly", lambda form: in_int32)
    weight = torch.zeros(3, 4096, dtype=torch.int8)
    for zero_point in (-form.offset, 5 - form.offset):
        most = form.largest + abs(zero_point + form.offset)
        fits = 2**24 // most
        for total, exact in ((fits, True), (fits + 1, in_int32 or zero_point == -form.offset)):
            weight[1] = 0
            weight[1, : total // 127] = -127
            weight[1, 4095] = total % 127
            assert forms.is_exact(form, weight, zero_point) is exact


# Where it is not used -------------------------------------------------------------------------------------------------------------

PLAIN = Case(8, 24, 48, bias=torch.float32)


def test_not_without_freezing() -> None:
    compiled = PLAIN.check(lambda *args: run(*args, cpu_backend="cpp"))
    assert not compiled.has(KERNEL)
    assert compiled.has("_int_mm(")


def test_not_where_the_kernel_is_inexact() -> None:
    with taken(None):
        compiled = PLAIN.check()
    assert not compiled.has(KERNEL)
    assert compiled.has("_int_mm(")


def test_not_for_a_weight_that_is_an_input() -> None:
    operands = PLAIN.operands()
    module = Product(("a", "b"), {name: value for name, value in operands.items() if name not in ("a", "b")}, {})
    compiled = frozen(module, operands["a"], operands["b"])
    check_float(compiled.output, linear64(**operands))
    assert not compiled.has(KERNEL)


def test_not_for_a_weight_with_a_zero_point() -> None:
    operands = PLAIN.operands() | {"b_zero_point": torch.full((24,), 3, dtype=torch.int32)}
    compiled = frozen(Product(("a",), {name: value for name, value in operands.items() if name != "a"}, {}), operands["a"])
    check_float(compiled.output, linear64(**operands))
    assert not compiled.has(KERNEL)


def test_scales_that_float32_cannot_multiply_stay_apart() -> None:
    """1e-30 times 1e-25 is zero in float32, but not after 1e28 times that: the kernel gives sums alone."""
    compiled = Case(8, 24, 48, a_scale=1e-30, b_scale=1e-25).check()
    (call,) = calls(compiled)
    assert "_ones" in call or ", None, 1.0, 0, torch.float32, 'none'" in call


def test_a_bias_that_is_not_finite() -> None:
    operands = PLAIN.operands()
    operands["bias"][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    constants = {name: value for name, value in operands.items() if name != "a"} | {"out_scale": torch.tensor([0.02])}
    compiled = frozen(Product(("a",), constants, {}), operands["a"])
    assert compiled.output[:, :3].tolist() == [[0, 127, -128]] * 8
    assert len(calls(compiled)) == 1


@pytest.mark.parametrize("in_int32", [True, False])
def test_sums_beyond_what_float32_holds(in_int32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of unsigned values may be an odd number over 2^24: where the zero point is taken off in float32 the kernel is not used."""
    monkeypatch.setattr(forms, "shifts_exactly", lambda form: in_int32)
    k = 8191
    a, b = torch.tensor([[0, 1] * k])[:, :k].repeat(5, 1).to(torch.int8), torch.full((24, k), 63, dtype=torch.int8)
    operands = {"a": a, "b": b, "a_scale": torch.ones(1), "b_scale": torch.ones(24), "a_zero_point": torch.full((1,), -900, dtype=torch.int32)}
    compiled = frozen(Product(("a",), {name: value for name, value in operands.items() if name != "a"}, {}), a)
    assert compiled.has(KERNEL) is in_int32
    if not in_int32 or SHIFTS_EXACTLY(UNSIGNED):
        check_float(compiled.output, linear64(**operands))


def test_not_for_longer_rows_than_unsigned_sums_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_K_ZERO_POINT", PLAIN.k - 1)
    assert not PLAIN.check().has(KERNEL)


def test_not_for_small_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "SMALL", PLAIN.m * PLAIN.n * PLAIN.k + 1)
    assert not PLAIN.check().has(KERNEL)
    assert PLAIN.check().has("_int_mm(")
    assert len(calls(dataclasses.replace(PLAIN, activation="relu").check())) == 1
    assert len(calls(dataclasses.replace(PLAIN, m=PLAIN.m + 1).check())) == 1


# Caches ---------------------------------------------------------------------------------------------------------------------------


def test_other_weights_are_no_hit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Inductor's cache knows frozen weights by shape and dtype alone: such a graph is not kept, and nothing complains that it could not be."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for seed in range(2):
        case = dataclasses.replace(PLAIN, seed=seed, activation="gelu")
        operands = case.operands()
        module = Product(("a",), {name: value for name, value in operands.items() if name != "a"}, {"activation": "gelu"})
        torch._dynamo.reset()
        counters.clear()
        with inductor_config.patch(freezing=True, cpu_backend="cpp", fx_graph_cache=True), torch.no_grad():
            got = torch.compile(module, backend="int8_inductor")(operands["a"])
        check_float(got, linear64(**operands, activation="gelu"))
        assert counters["inductor"]["fxgraph_cache_bypass"] == 1
        assert counters["inductor"]["fxgraph_cache_hit"] == 0
    assert "unable to serialize" not in caplog.text
