"""A symbolic M: a kernel for each range of it, whatever M is seen first; values, and what the ranges are."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from kernel_cases import Case, out_scale
from support import branches, check_blocks, check_float, check_int8, fresh_compile, linear64
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.scheduler import Scheduler
from torch._inductor.utils import run_and_get_code

from int8_inductor import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, autotune, ops, quantize_, ranges
from int8_inductor.explain import Report, recording

ROWS = (5, 2, 16, 17, 64, 65, 100, 256, 257, 300, 2048, 2049, 2500)
"""On both sides of where a range ends."""
CASE = Case(n=256, k=64, bias=torch.float32, activation="gelu")
"""In the interpreter the first candidate is taken: one for M <= 16, one for M <= 64, one above."""
THREE = "triton for M <= 16, M <= 64, above"


def call(compiled: Callable[..., Any], codes: list[str], *inputs: Tensor) -> Any:
    """The result; of the first call the generated code too (to get it, compiled code is forgotten)."""
    if codes:
        return compiled(*inputs)
    output, code = run_and_get_code(compiled, *inputs)
    codes += code
    return output


def compiled_for(
    fn: Callable[..., Any], tensors: Callable[[int], Sequence[Tensor]], check: Callable[[int, Any], None], rows: Sequence[int], **marks: int
) -> tuple[str, Report]:
    """The generated code and the report of `fn`, compiled once for a first dimension of `tensors(m)` that is dynamic, and checked for every m."""
    codes: list[str] = []
    with fresh_compile(), torch._dynamo.config.patch(error_on_recompile=True), recording() as report, torch.no_grad():
        compiled = torch.compile(fn, backend="int8_inductor", dynamic=False)
        for m in rows:
            inputs = tensors(m)
            for each in inputs:
                torch._dynamo.mark_dynamic(each, 0, **marks)
            check(m, call(compiled, codes, *inputs))
    assert report.graphs == len(codes) == 1
    return codes[0], report


FIXED = ("b", "b_scale", "bias")


def product(narrow: bool = False, **store: Any) -> tuple[Callable[..., Tensor], Callable[[int], list[Tensor]], Callable[[int], Any]]:
    """scaled_mm of CASE's weight as a function of a and a_scale, those for M, and the float64 value for M.

    narrow: it is stored as less than float32.
    """
    fixed = {name: CASE.operands()[name] for name in FIXED}

    def rows(m: int) -> dict[str, Tensor]:
        case = Case(m, CASE.n, CASE.k, seed=m)
        return {name: case.operands()[name] for name in ("a", "a_scale")}

    def fn(a: Tensor, a_scale: Tensor) -> Tensor:
        return ops.scaled_mm(a=a, a_scale=a_scale, activation="gelu", **fixed, **store)

    return fn, lambda m: list(rows(m).values()), lambda m: linear64(**rows(m), **fixed, activation="gelu", narrow=narrow)


@pytest.mark.parametrize("first", [5, 2500])
def test_a_kernel_for_each_range_of_m(first: int) -> None:
    """Three distinct kernels, the same whatever M comes first, and every value right on both sides of where a range ends."""
    fn, tensors, want = product()
    code, _ = compiled_for(fn, tensors, lambda m, got: check_float(got, want(m)), (first, *(m for m in ROWS if m != first)))
    kernels = branches(code)
    assert [last for last, _ in kernels] == [16, 64, None]
    assert len({kernel for _, kernel in kernels}) == 3
    assert [re.findall(rf"{kernel} = .+?BLOCK_M : tl.constexpr = (\d+)", code, re.S)[0] for _, kernel in kernels] == ["16", "64", "128"]
    assert code.count("triton_tem_") >= 6
    assert len(re.findall(r"\.run\(", code)) == 3


@pytest.mark.parametrize("blocks", [False, True])
def test_every_range_is_right(device: str, blocks: bool) -> None:
    """Wherever the ranges' kernels end up, on a GPU after they were timed: floats, or int8 in blocks with their scales."""
    case = Case(n=512, k=1024)
    fixed = {name: case.operands()[name].to(device) for name in ("b", "b_scale")}

    def tensors(m: int) -> list[Tensor]:
        operands = Case(m, case.n, case.k, seed=m).operands()
        return [operands[name].to(device) for name in ("a", "a_scale")]

    def fn(a: Tensor, a_scale: Tensor) -> Any:
        operator = ops.scaled_mm_block_quant if blocks else ops.scaled_mm
        return operator(a=a, a_scale=a_scale, activation="relu", **fixed)

    def check(m: int, got: Any) -> None:
        a, a_scale = (t.cpu() for t in tensors(m))
        want = linear64(a=a, a_scale=a_scale, activation="relu", **{name: t.cpu() for name, t in fixed.items()})
        if blocks:
            check_blocks(*(t.cpu() for t in got), want, 128)
        else:
            check_float(got.cpu(), want)

    code, report = compiled_for(fn, tensors, check, (100, 5, 16, 17, 64, 65, 256, 257, *([2048, 2049, 9000] if device == "cuda" else [])))
    assert device == "cuda" or len(branches(code)) == 3
    assert len({kernel for _, kernel in branches(code)}) <= 5
    assert report.graphs == 1


def test_int8_out() -> None:
    scale = out_scale(CASE, CASE.want(), per_row=False)
    fn, tensors, want = product(narrow=True, out_scale=scale)
    code, _ = compiled_for(fn, tensors, lambda m, got: check_int8(got, want(m), scale), (5, 17, 300))
    assert len(branches(code)) == 3


def test_the_second_output_of_each_kernel() -> None:
    """int8 in blocks, and their scales, which each kernel writes beside its result."""
    _, tensors, want = product(narrow=True)
    fixed = {name: CASE.operands()[name] for name in FIXED}

    def fn(a: Tensor, a_scale: Tensor) -> tuple[Tensor, Tensor]:
        return ops.scaled_mm_block_quant(a=a, a_scale=a_scale, activation="gelu", block_size=64, **fixed)

    code, _ = compiled_for(fn, tensors, lambda m, got: check_blocks(*got, want(m), 64), ROWS)
    kernels = branches(code)
    assert [last for last, _ in kernels][-1] is None
    assert len({kernel for _, kernel in kernels}) == len(kernels) >= 2


def test_what_follows_is_fused_into_each_kernel() -> None:
    fn, tensors, want = product()

    def doubled(a: Tensor, a_scale: Tensor) -> Tensor:
        return 2 * fn(a, a_scale) + a_scale

    def check(m: int, got: Tensor) -> None:
        torch.testing.assert_close(got.double(), 2 * want(m).value + tensors(m)[1], rtol=1e-5, atol=1e-5)

    code, _ = compiled_for(doubled, tensors, check, (300, 5, 64))
    assert len(branches(code)) == 3
    assert len(re.findall(r"\.run\(", code)) == 3


@pytest.mark.parametrize(("least", "most", "lasts"), [(20, 60, []), (65, 4000, []), (2, 60, [16, None]), (17, 4000, [64, None])])
def test_ranges_that_cannot_be_and_neighbours_alike_have_no_branch(least: int, most: int, lasts: list[int | None]) -> None:
    fn, tensors, want = product()
    code, _ = compiled_for(fn, tensors, lambda m, got: check_float(got, want(m)), (least, most), min=least, max=most)
    assert [last for last, _ in branches(code)] == lasts
    assert len(re.findall(r"\.run\(", code)) == max(1, len(lasts))


def linear() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256)).eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def of_linear(shape: Callable[[int], tuple[int, ...]], rows: Sequence[int], dims: Sequence[int] = (0,)) -> tuple[str, Report]:
    model, generator = linear(), torch.Generator().manual_seed(1)
    with fresh_compile(), torch._dynamo.config.patch(error_on_recompile=True), recording() as report, torch.no_grad():
        compiled = torch.compile(model, backend="int8_inductor", dynamic=False)
        codes: list[str] = []
        for m in rows:
            x = torch.randn(*shape(m), generator=generator)
            for dim in dims:
                torch._dynamo.mark_dynamic(x, dim)
            torch.testing.assert_close(call(compiled, codes, x), model(x), rtol=1e-5, atol=2e-6)
    assert report.graphs == len(codes) == 1
    return codes[0], report


def test_the_report_names_the_ranges() -> None:
    code, report = of_linear(lambda m: (m, 64), (5, 40, 70))
    assert len(branches(code)) == 3
    assert [entry.kernel for entry in report.linears] == [THREE]


CONFIGS = {"int8": Int8DynamicActivationInt8WeightConfig(), "weight-only": Int8WeightOnlyConfig()}


def of_two_linears(config: str, rows: Sequence[int], device: str = "cpu", **options: Any) -> list[str]:
    """The generated code of two bfloat16 linears, compiled once for a dynamic M, each M called three times and checked against eager."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 64)).eval().to(device, torch.bfloat16)
    quantize_(model, CONFIGS[config])
    codes: list[str] = []
    with fresh_compile(), recording() as report, torch.no_grad():
        compiled = torch.compile(model, backend="int8_inductor", dynamic=True, **options)
        for m in rows:
            x = torch.randn(m, 256).to(device, torch.bfloat16)
            for _ in range(3):
                torch.testing.assert_close(call(compiled, codes, x), model(x), rtol=0.05, atol=0.05)
    assert report.graphs == len(codes) == 1
    return codes


@pytest.mark.parametrize("config", CONFIGS)
def test_a_part_of_the_graph_that_cuda_records_holds_the_branches(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor writes such a part as a function, ends it at what CUDA cannot record, on a CPU at everything; here it ends at nothing."""
    monkeypatch.setattr(Scheduler, "should_partition", lambda self, node, *args, **kwargs: None)
    with inductor_config.patch(graph_partition=True):
        (code,) = of_two_linears(config, (5, 17, 100, 192))
    (partition,) = re.findall(r"^def partition_\d+\(args\):\n(?:^(?: .*)?\n)+", code, re.M)
    assert len(re.findall(r"^ +if s\d+ <= ", partition, re.M)) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_cuda_graphs_hold_the_kernel_of_each_m(config: str) -> None:
    counters.clear()
    of_two_linears(config, (5, 17, 100, 300, 5, 3000), "cuda", mode="reduce-overhead")
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_rows_that_are_a_product_of_sizes() -> None:
    """M = 7 b is never up to 16 where b is 3 or more, but b may be 2; M = b t."""
    code, _ = of_linear(lambda m: (m, 7, 64), (3, 2, 9, 10, 40))
    assert [last for last, _ in branches(code)] == [16, 64, None]
    code, _ = of_linear(lambda m: (m, 33, 64), (3, 2, 9))
    assert branches(code) == []
    code, _ = of_linear(lambda m: (m, m + 1, 64), (3, 2, 9, 10, 40), (0, 1))
    assert [last for last, _ in branches(code)] == [16, 64, None]


def test_a_static_m_has_one_kernel() -> None:
    code, report = of_linear(lambda m: (m, 64), (40,), ())
    assert branches(code) == []
    assert [entry.kernel for entry in report.linears] == ["triton"]


def test_where_python_does_not_launch_there_is_one_kernel_and_the_report_says_for_which_m(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "writes_python", lambda: False)
    code, report = of_linear(lambda m: (m, 64), (40, 5))
    assert branches(code) == []
    assert [entry.kernel for entry in report.linears] == ["triton, chosen for M = 40"]


@pytest.mark.parametrize("unknown", [False, True])
def test_a_range_is_timed_with_as_many_rows_as_stand_for_it(monkeypatch: pytest.MonkeyPatch, unknown: bool) -> None:
    """Operands, result, the size that a kernel takes and its grid; and M is what it was afterwards. unknown: M depends on data."""
    timed: list[tuple[int, int, int, int, int]] = []

    def timer(choice: Any, *args: Tensor, out: Tensor) -> float:
        block_m, _, block_n = map(int, re.findall(r"\d+", choice.log_info["tile_shape"]))
        size, grid, *_ = choice.bmreq.extra_args
        timed.append((args[0].shape[0], args[2].shape[0], out.shape[0], size, grid * block_m * block_n // 256))
        return abs(block_m - min(size, 64)) + block_n / 1000

    def few(kernel: autotune.Kernel) -> list[tuple[Any, Any]]:
        (template, *_), problem = kernel.templates, kernel.problem
        return [(template, config) for config in template.candidates(problem, kernel.device, kernel.tail, thorough=False)[:2]]

    monkeypatch.setattr(autotune, "_median_ms", timer)
    monkeypatch.setattr(autotune.Kernel, "candidates", few)
    fn, tensors, want = product()

    def some(a: Tensor, a_scale: Tensor) -> Tensor:
        rows = (a_scale > 0).reshape(-1)
        return fn(a[rows], a_scale[rows])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled_for(some if unknown else fn, tensors, lambda m, got: check_float(got, want(m)), (40, 5, 300))
    assert timed == [(rows,) * 5 for rows in (16, 64, 256, 2048, 4096) for _ in range(2)]
