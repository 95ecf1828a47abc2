"""A symbolic M for which weight-only products run a template or, from 192 rows on, expand their weight: each call runs what is for its M."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import branches, fresh_compile
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from int8_inductor import Int4WeightOnlyConfig, quantize_, ranges
from int8_inductor.explain import Report, recording
from int8_inductor.int4 import dequantize_groups, unpack_int4

N, K, GROUP = 96, 64, 32
ROWS = (5, 2, 16, 17, 100, 191, 192, 257, 300)
PRODUCTS = ("weight_int8_mm", "weight_int8_group_mm", "weight_int4_mm")


def fixed_operands(name: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    packed = name == "weight_int4_mm"
    b = torch.randint(0 if packed else -128, 256 if packed else 128, (N, K // 2 if packed else K), generator=generator)
    in_groups = name != "weight_int8_mm"
    b_scale = (torch.rand(N, *([K // GROUP] if in_groups else []), generator=generator) + 0.1) * 0.01
    return {"b": b.to(torch.uint8 if packed else torch.int8), "b_scale": b_scale, **({"group_size": GROUP} if in_groups else {})}


def compiled_for(
    name: str, rows: Sequence[int], dtype: torch.dtype = torch.bfloat16, marks: dict[str, int] | None = None, device: str = "cpu", **given: Any
) -> str:
    """The generated code of a product, compiled once for a dynamic M, and checked against eager for every m."""
    operator = getattr(torch.ops.int8_inductor, name).default
    fixed = fixed_operands(name.removesuffix("_block_quant")) | given
    fixed = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in fixed.items()}
    generator = torch.Generator().manual_seed(1)
    codes: list[str] = []

    def fn(a: Tensor) -> Any:
        return operator(a, **fixed)

    with fresh_compile(), torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        compiled: Callable[..., Any] = torch.compile(fn, backend="int8_inductor", dynamic=False)
        for m in rows:
            a = torch.randn(m, K, generator=generator).to(device, dtype)
            torch._dynamo.mark_dynamic(a, 0, **(marks or {}))
            if codes:
                got = compiled(a)
            else:
                got, codes = run_and_get_code(compiled, a)
            check(got, fn(a), magnitudes(fixed, a) * (1e-5 if device == "cpu" else 2.0**-8))
    assert len(codes) == 1
    return codes[0]


def magnitudes(fixed: dict[str, Any], a: Tensor) -> Tensor:
    """The sum of the magnitudes of what each result is a sum of."""
    b, b_scale = fixed["b"], fixed["b_scale"]
    b = unpack_int4(b) if b.dtype == torch.uint8 else b
    weight = dequantize_groups(b, b_scale) if b_scale.ndim == 2 else b.float() * b_scale.reshape(-1, 1)
    return a.float().abs() @ weight.abs().t()


def check(got: Any, want: Any, tolerance: Tensor) -> None:
    """On a GPU an expanded weight in groups is rounded to bfloat16, half a step of 2^-8 of each weight, and so is the product
    (templates/weight_only.py).
    """
    if isinstance(want, Tensor):
        assert got.dtype == want.dtype
        assert bool(((got.float() - want.float()).abs() <= tolerance + 1e-30).all())
        return
    (q, scale), (want_q, want_scale) = got, want
    torch.testing.assert_close(scale, want_scale, rtol=1e-5, atol=0)
    assert int((q.int() - want_q.int()).abs().max()) <= 1
    assert float((q != want_q).float().mean()) < 1e-3


@pytest.mark.parametrize("first", [5, 300])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_template_for_few_rows_and_an_expanded_weight_for_many(device: str, name: str, first: int) -> None:
    """The same whatever M comes first; the template has a kernel for each range of M up to where it ends."""
    code = compiled_for(name, (first, *(m for m in ROWS if m != first)), device=device, out_dtype=torch.float32, activation="relu")
    assert re.findall(r"if s\d+ <= 191:\n +(\w+) = either_\w+_0\(.+\n +else:\n +\1 = either_\w+_1\(", code)
    assert code.count("extern_kernels.mm(") == 1
    if device == "cpu":
        kernels = branches(code)
        assert kernels[0][0] == 16
        assert kernels[-1][0] is None
        assert len({kernel for _, kernel in kernels}) == len(kernels) >= 2


def test_both_outputs_in_blocks() -> None:
    code = compiled_for("weight_int8_mm_block_quant", ROWS, block_size=32)
    assert "<= 191:" in code
    assert "extern_kernels.mm(" in code


@pytest.mark.parametrize(
    ("dtype", "given", "marks", "template", "expanded"),
    [
        (torch.bfloat16, {"kernel_preference": "triton"}, {}, True, False),
        (torch.bfloat16, {"kernel_preference": "torch"}, {}, False, True),
        (torch.float32, {}, {}, False, True),  # expanded for every M
        (torch.bfloat16, {}, {"min": 2, "max": 191}, True, False),
        (torch.bfloat16, {}, {"min": 192, "max": 4000}, False, True),
    ],
)
def test_where_one_of_them_is_for_every_m_there_is_no_branch(
    dtype: torch.dtype, given: dict[str, Any], marks: dict[str, int], template: bool, expanded: bool
) -> None:
    least, most = marks.get("min", 2), marks.get("max", 300)
    code = compiled_for("weight_int8_mm", (least, most), dtype, marks, out_dtype=torch.float32, **given)
    assert "either" not in code
    assert ("triton_tem_" in code) == template
    assert ("extern_kernels.mm(" in code) == expanded


def of_linear(rows: Sequence[int]) -> Report:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(K, N), torch.nn.ReLU(), torch.nn.Linear(N, 8)).eval().bfloat16()
    quantize_(model, Int4WeightOnlyConfig(group_size=GROUP))
    with fresh_compile(), recording() as report, torch.no_grad():
        compiled = torch.compile(model, backend="int8_inductor", dynamic=True)
        for m in rows:
            x = torch.randn(m, K).bfloat16()
            torch.testing.assert_close(compiled(x), model(x), rtol=0.02, atol=0.01)
    assert report.graphs == 1
    return report


def test_the_report_names_both() -> None:
    report = of_linear((5, 300, 191))
    assert [(entry.kernel, entry.epilogue) for entry in report.linears] == [
        (f"triton for M <= 16, M <= 64, M <= 191; above, aten.mm, the weight expanded to {N * K * 2} bytes", "scales + bias + relu"),
        (f"triton for M <= 16, M <= 191; above, aten.mm, the weight expanded to {8 * N * 2} bytes", "scales + bias"),
    ]


def test_a_number_of_rows_that_depends_on_the_data() -> None:
    fixed = fixed_operands("weight_int8_mm")

    def fn(a: Tensor, mask: Tensor) -> Tensor:
        return torch.ops.int8_inductor.weight_int8_mm.default(a[mask], **fixed, out_dtype=torch.float32)

    a = torch.randn(300, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    with fresh_compile(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, error_on_recompile=True), torch.no_grad():
        compiled = torch.compile(fn, backend="int8_inductor", fullgraph=True)
        for m in (4, 0, 1, 17, 191, 192, 300):
            mask = torch.arange(300) < m
            check(compiled(a, mask), fn(a, mask), 1e-5)


def test_where_python_does_not_launch_the_first_m_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "writes_python", lambda: False)
    assert {entry.kernel for entry in of_linear((5, 300)).linears} == {"triton, chosen for M = 5"}
    assert all(entry.kernel.endswith("bytes, chosen for M = 300") for entry in of_linear((300, 5)).linears)
