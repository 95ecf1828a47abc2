"""Exact products of int8 on a CPU that has no fast kernel for them: float32 products, the same integers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import check_float, examples, fresh_compile, linear64, run
from torch import Tensor, nn

from int8_inductor import Int8DynamicActivationInt8WeightConfig, avx2, explain, int_mm, ops, quantize_, reference
from int8_inductor.int_mm import EXACT_DEPTH, float_int_mm
from int8_inductor.templates import LOWERINGS
from int8_inductor.templates.problem import Problem

CPU = torch.device("cpu")


def integers(m: int, n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=generator) for rows in (m, n))
    return a, b


@examples(25)
@given(
    m=st.integers(0, 9),
    n=st.integers(1, 9),
    k=st.one_of(st.integers(1, 40), st.sampled_from([1023, 1024, 1025, 2048, 5000])),
    seed=st.integers(0, 9),
)
def test_float_products_are_exact(m: int, n: int, k: int, seed: int) -> None:
    a, b = integers(m, n, k, seed)
    got = float_int_mm(a, b)
    assert got.dtype == torch.int32
    assert torch.equal(got, reference.int_mm(a, b))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("k", [EXACT_DEPTH, 3 * EXACT_DEPTH + 1])
def test_the_largest_sums_are_exact_in_every_precision(k: int, precision: str) -> None:
    """2^24 is the last whole number that float32 reaches one by one; and one less, which it would lose beyond."""
    a, b = torch.full((64, k), -128, dtype=torch.int8), torch.full((64, k), -128, dtype=torch.int8)
    a[:, 0], b[1, :] = 127, 127
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert torch.equal(float_int_mm(a, b), reference.int_mm(a, b))
    finally:
        torch.set_float32_matmul_precision(before)


def test_one_product_more_is_not_exact() -> None:
    """The bound is as large as it can be."""
    a, b = (torch.full((1, EXACT_DEPTH + 1), -128, dtype=torch.int8) for _ in range(2))
    a[0, 0], b[0, 0] = 1, 1
    assert reference.small_int_mm(a, b).item() != reference.int_mm(a, b).item()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU has no fast product of int8, and no AVX2."""
    monkeypatch.setattr(int_mm, "is_slow_on_this_cpu", lambda: True)
    monkeypatch.setattr(avx2, "has_kernel", lambda: False)


@pytest.mark.parametrize("rows", [3, 5, 40])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_compiled_products_are_in_floats(rows: int, activation: str, slow: None) -> None:
    a, b = integers(rows, 24, 1100)
    generator = torch.Generator().manual_seed(1)
    a_scale, b_scale, bias = (torch.rand(*shape, generator=generator) * 0.01 for shape in ((rows, 1), (24,), (24,)))

    def fn(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor) -> Tensor:
        return ops.scaled_mm(a, b, a_scale, b_scale, bias=bias, activation=activation)

    compiled = run(fn, a, b, a_scale, b_scale, bias, cpu_backend="cpp")
    assert compiled.has("extern_kernels.mm(")
    assert not compiled.has("_int_mm")
    check_float(compiled.output, linear64(a, b, a_scale, b_scale, bias=bias, activation=activation))


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=pytest.mark.skipif(not avx2.has_kernel(), reason="needs AVX2"))])
def test_a_whole_linear_and_what_explain_says(kernel: bool, slow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avx2, "has_kernel", lambda: kernel)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8)).eval(), torch.randn(6, 64)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with torch.no_grad(), fresh_compile(), torch._inductor.config.patch(cpu_backend="cpp"):
        report = explain(model, x)
        got = torch.compile(model, backend="int8_inductor")(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-2)
    assert str(report).count(f"{'avx2_int_mm' if kernel else 'aten.mm in float32'}, exact, as this CPU has no fast aten._int_mm") == 2


@pytest.mark.parametrize(("rows", "floats"), [(1, False), (2, False), (3, True), (None, True)])
def test_a_row_or_two_run_int_mm(rows: int | None, floats: bool, slow: None) -> None:
    """None: any number of them."""
    a, b = integers(rows or 4, 8, 32)
    if rows is None:
        torch._dynamo.mark_dynamic(a, 0)
    one = torch.ones(1)
    compiled = run(lambda a, b: ops.scaled_mm(a, b, one, one), a, b, cpu_backend="cpp")
    assert compiled.has("_int_mm(") is not floats
    problem = Problem(4, 8, 32, 32, tma=False, static_m=rows)
    assert LOWERINGS["scaled_mm"].eager_kernel(problem, CPU).startswith("aten.mm in float32") is floats
    assert torch.equal(compiled.output, reference.int_mm(a, b).float())


# What is measured -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machine is asked anew."""
    monkeypatch.setattr(int_mm, "is_slow_on_this_cpu", MEASURE)
    MEASURE.cache_clear()
    yield
    MEASURE.cache_clear()


MEASURE: Any = int_mm.is_slow_on_this_cpu


@pytest.mark.parametrize(("waits", "slow"), [("_int_mm", True), ("mm", False)])
def test_the_slower_is_found(waits: str, slow: bool, measured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    product = getattr(torch, waits)
    monkeypatch.setattr(torch, waits, lambda *given: time.sleep(0.02) or product(*given))
    assert int_mm.is_slow_on_this_cpu() is slow


def test_it_is_measured_outside_the_graph_that_asks(measured: None) -> None:
    """While Inductor traces: nothing of the measurement is in the code, and the result is right whatever this machine is."""
    a, b = integers(6, 8, 32)
    one = torch.ones(1)
    compiled = run(lambda a, b: ops.scaled_mm(a, b, one, one), a, b, cpu_backend="cpp")
    assert MEASURE.cache_info().misses == 1
    assert sum(map(compiled.has, ("extern_kernels.mm(", "extern_kernels._int_mm(", "avx2_int_mm.default("))) == 1
    assert torch.equal(compiled.output, reference.int_mm(a, b).float())
    assert not compiled.has(f"({int_mm._ROWS}, {int_mm._SIDE})")
