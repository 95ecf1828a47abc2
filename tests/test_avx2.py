"""Exact products of int8 by AVX2: the kernel against exact integers, and where it is called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import check_float, examples, linear64, run
from torch import Tensor
from torch._inductor.virtualized import V

from int8_inductor import avx2, int_mm, ops, reference

CPU = torch.device("cpu")
OPERATOR = torch.ops.int8_inductor.avx2_int_mm
needs_avx2 = pytest.mark.skipif(not avx2.has_kernel(), reason="needs Linux on an x86 CPU with AVX2")
SIZES = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 33, 47, 48, 49, 97]))
LAYOUTS = ("plain", "turned", "every other", "one value")


def matrix(rows: int, k: int, seed: int, layout: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = {"plain": (rows, k), "turned": (k, rows), "every other": (2 * rows, 2 * k), "one value": (1, 1)}[layout]
    t = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    return {"plain": lambda: t, "turned": t.t, "every other": lambda: t[::2, ::2], "one value": lambda: t.expand(rows, k)}[layout]()


@needs_avx2
@examples(80)
@given(m=SIZES, n=SIZES, k=SIZES, a_layout=st.sampled_from(LAYOUTS), b_layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 9))
def test_products_are_exact(m: int, n: int, k: int, a_layout: str, b_layout: str, seed: int) -> None:
    a, b = matrix(m, k, seed, a_layout), matrix(n, k, seed + 1, b_layout)
    got = avx2.int_mm(a, b)
    assert got.dtype == torch.int32
    assert torch.equal(got, reference.int_mm(a, b))


@needs_avx2
@pytest.mark.parametrize("k", [16, 4096, 100_003])
@pytest.mark.parametrize("value", [-128, 127])
def test_the_largest_sums_are_exact(value: int, k: int) -> None:
    """-128 * -128 is 2^14, and two of them 2^15, which 16 bits do not hold."""
    a, b = torch.full((5, k), -128, dtype=torch.int8), torch.full((3, k), value, dtype=torch.int8)
    assert avx2.int_mm(a, b).tolist() == [[-128 * value * k] * 3] * 5


@needs_avx2
@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    a, b = matrix(101, 300, 0, "plain"), matrix(77, 300, 1, "plain")
    assert a.shape[0] * b.shape[0] * a.shape[1] > 3 * avx2.WORK_OF_A_THREAD
    assert torch.equal(avx2.int_mm(a, b), reference.int_mm(a, b))


@needs_avx2
def test_the_operator_is_one_that_torch_can_trust() -> None:
    a, b = matrix(3, 40, 0, "plain"), matrix(5, 40, 1, "turned")
    torch.library.opcheck(OPERATOR, (a, b))


ONES = torch.ones(2, 3, dtype=torch.int8)
MATRIX = "must be an int8 matrix on the CPU, got"


@pytest.mark.parametrize(
    ("a", "b", "error", "words"),
    [
        (ONES.float(), ONES, TypeError, rf"a {MATRIX} torch.float32 \[2, 3\] on cpu"),
        (ONES, ONES[0], TypeError, rf"b {MATRIX} torch.int8 \[3\] on cpu"),
        (ONES.to("meta"), ONES, TypeError, rf"a {MATRIX} torch.int8 \[2, 3\] on meta"),
        (ONES, ONES.t(), ValueError, r"b must have K = 3 like a, got \[3, 2\]"),
    ],
)
def test_other_operands_are_refused(a: Tensor, b: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^avx2_int_mm: {words}"):
        avx2.int_mm(a, b)


def test_a_cpu_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avx2, "has_kernel", lambda: False)
    with pytest.raises(RuntimeError, match=r"^avx2_int_mm: needs Linux on an x86 CPU with AVX2, got "):
        avx2.int_mm(ONES, ONES)


@pytest.mark.parametrize(
    ("system", "machine", "capability", "want"),
    [
        ("Linux", "x86_64", "AVX2", True),
        ("Linux", "x86_64", "AVX512", True),
        ("Linux", "x86_64", "DEFAULT", False),
        ("Linux", "aarch64", "AVX2", False),
        ("Windows", "AMD64", "AVX2", False),
    ],
)
def test_which_machines_have_it(system: str, machine: str, capability: str, want: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert avx2.has_kernel.__wrapped__() is want


# Where it is called ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU has no fast product of int8."""
    monkeypatch.setattr(int_mm, "is_slow_on_this_cpu", lambda: True)


@needs_avx2
@pytest.mark.parametrize(("rows", "activation"), [(1, "none"), (5, "gelu"), (None, "none")])
def test_compiled_products_call_it(rows: int | None, activation: str, slow: None) -> None:
    """None: any number of rows."""
    a, b = matrix(rows or 7, 1100, 0, "plain"), matrix(24, 1100, 1, "plain")
    if rows is None:
        torch._dynamo.mark_dynamic(a, 0)
    generator = torch.Generator().manual_seed(1)
    a_scale, b_scale, bias = (torch.rand(*shape, generator=generator) * 0.01 for shape in ((1,), (24,), (24,)))

    def fn(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor) -> Tensor:
        return ops.scaled_mm(a, b, a_scale, b_scale, bias=bias, activation=activation)

    compiled = run(fn, a, b, a_scale, b_scale, bias, cpu_backend="cpp")
    (code,) = compiled.code
    assert code.count("torch.ops.int8_inductor.avx2_int_mm.default(") == 1
    assert "extern_kernels." not in code
    assert "aten._int_mm" not in code
    check_float(compiled.output, linear64(a, b, a_scale, b_scale, bias=bias, activation=activation))


@pytest.mark.parametrize(
    ("slow_here", "kernel", "cpp_wrapper", "want"),
    [(True, True, False, "avx2_int_mm"), (True, True, True, "aten.mm"), (True, False, False, "aten.mm"), (False, True, False, "aten._int_mm")],
)
def test_which_way_is_taken(slow_here: bool, kernel: bool, cpp_wrapper: bool, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ cannot call an operator of Python's; a CPU with a fast product, and a GPU, run aten's."""
    monkeypatch.setattr(int_mm, "is_slow_on_this_cpu", lambda: slow_here)
    monkeypatch.setattr(avx2, "has_kernel", lambda: kernel)
    graph: Any = SimpleNamespace(cpp_wrapper=cpp_wrapper, fx_wrapper=False)
    with V.set_graph_handler(graph):
        assert int_mm.way(100, CPU).name.startswith(want)
        assert int_mm.way(100, torch.device("cuda")).name == "aten._int_mm"
