"""What the framework does for any product: one with float activations, made here, has operators, lowerings and passes without being named by them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from support import Compiled, fresh_compile, run
from torch import Tensor
from torch.fx import Graph, Node

from int8_inductor import lowering, ops, reference
from int8_inductor.passes import linear
from int8_inductor.passes.base import Declined, val
from int8_inductor.passes.operands import weight_factors
from int8_inductor.passes.schemes import Operand, Reading, Scheme
from int8_inductor.passes.schemes.w8a8 import W8A8
from int8_inductor.products import Product
from int8_inductor.templates import LOWERINGS, Lowering
from int8_inductor.templates.problem import TILE_ORDER, Device, Problem
from int8_inductor.templates.render import triton_template
from int8_inductor.templates.tail import Tail, indented

SCALES_PER_ROW = 2


def check(a: Tensor, b: Tensor, b_scale: Tensor, group_size: int) -> tuple[Any, Any]:
    if b_scale.shape != (b.shape[0], b.shape[1] // group_size):
        raise ValueError(f"grouped_mm: b_scale must fit b, got {list(b_scale.shape)}")
    return a.shape[0], b.shape[0]


def eager(a: Tensor, b: Tensor, b_scale: Tensor, group_size: int) -> Tensor:
    weight = reference.dequantize(b.unflatten(1, (-1, group_size)), b_scale.unsqueeze(-1)).flatten(1)
    return a.float() @ weight.t()


GROUPED = Product("grouped_mm", "Tensor a, Tensor b, Tensor b_scale, int group_size", check, eager)

MAIN_LOOP = """
{{{{def_kernel({arguments})}}}}
    M = {{{{size("A", 0)}}}}
    N = {{{{size("B", 0)}}}}
    K = {{{{size("A", 1)}}}}
    tile = tl.program_id(0).to(INDEX_DTYPE)
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
{order}
    rm = pid_m * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX_DTYPE)
    ram = tl.where(rm < M, rm, 0)
    rbn = tl.where(rn < N, rn, 0)
    rk = tl.arange(0, GROUP).to(INDEX_DTYPE)
    dot = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(0, K // GROUP):
        a = tl.load(A + ram[:, None] * {{{{stride("A", 0)}}}} + (group * GROUP + rk)[None, :] * {{{{stride("A", 1)}}}})
        b = tl.load(B + rbn[None, :] * {{{{stride("B", 0)}}}} + (group * GROUP + rk)[:, None] * {{{{stride("B", 1)}}}})
        scale = tl.load(B_SCALE + rbn * {{{{stride("B_SCALE", 0)}}}} + group * {{{{stride("B_SCALE", 1)}}}})
        dot += tl.dot(a, b.to(a.dtype)) * scale[None, :]
"""


def template(tail: Tail) -> Any:
    source = MAIN_LOOP.format(arguments=tail.signature("B_SCALE"), order=indented(TILE_ORDER.splitlines(), 4)) + tail.source(4)
    return triton_template("int8_grouped_mm", "mm_grid", source, tail)


def constants(config: int, problem: Problem, device: Device, tail: Tail) -> dict[str, object]:
    return {"BLOCK_M": 16, "BLOCK_N": 32, "GROUP": config, "GROUP_M": 8, "num_stages": 2, "num_warps": 4}


def read(left: Operand, right: Operand) -> Reading | None:
    """Per-row scales, as one group; not for float32 activations."""
    dequant = right.dequant
    if left.dequant is not None or dequant is None:
        return None
    scale, zero_point, transposed = weight_factors(dequant, right.path)
    if zero_point is not None or not transposed:
        return None
    if val(left.node).dtype == torch.float32:
        raise Declined("the activation is float32")

    def emit(graph: Graph, like: Node) -> dict[str, Any]:
        b_scale = scale.emit(graph, like, torch.float32)
        return {"a": left.node, "b": dequant.q, "b_scale": b_scale, "group_size": val(dequant.q).shape[1]}

    return Reading(GROUPED, (dequant.q,), emit)


@pytest.fixture(scope="module", autouse=True)
def _grouped() -> None:
    module: Any = ModuleType("grouped")
    module.template, module.constants = template, constants
    module.candidates = lambda problem, *args, **kwargs: list(problem.groups)
    LOWERINGS["grouped_mm"] = Lowering(
        GROUPED, (module,), eager, lambda problem, device: "aten.mm", loop=("b_scale",), groups=lambda operands: (operands["group_size"],)
    )
    ops.define(GROUPED)
    lowering.register(GROUPED)


def operands(dtype: torch.dtype = torch.float16, groups: int = SCALES_PER_ROW) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    b = torch.randint(-127, 128, (64, 64), dtype=torch.int8, generator=generator)
    a, bias = torch.randn(5, 64, generator=generator).to(dtype), torch.randn(64, generator=generator)
    return a, b, (torch.rand(64, groups, generator=generator) + 0.1) / 500, bias


def float64(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    weight = (b.double().unflatten(1, (scale.shape[1], -1)) * scale.double().unsqueeze(-1)).flatten(1)
    return torch.nn.functional.gelu(a.double() @ weight.t() + bias.double())


KERNELS = [("triton", None, torch.float16), ("triton", None, torch.bfloat16), ("torch", "cpp", torch.bfloat16)]


@pytest.mark.parametrize(("kernel", "cpu_backend", "dtype"), KERNELS)
def test_operators(kernel: str, cpu_backend: str | None, dtype: torch.dtype) -> None:
    a, b, scale, bias = operands(dtype)
    want = float64(a, b, scale, bias)
    keywords: dict[str, Any] = {"activation": "gelu", "kernel_preference": kernel}

    def fn(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        arguments = (a, b, scale, 64 // SCALES_PER_ROW, bias)
        static = GROUPED.operator(*arguments, **keywords, out_scale=torch.full((1,), 0.05), out_quant_min=-127)
        return GROUPED.operator(*arguments, **keywords), static, *GROUPED.block_quant(*arguments, **keywords, block_size=32)

    compiled = run(fn, a, b, scale, bias, cpu_backend=cpu_backend)
    for value, q, blocks, block_scale in (compiled.output, fn(a, b, scale, bias)):
        torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-5)
        assert (q.double() - (want / 0.05).clamp(-127, 127)).abs().max() <= 0.5001
        restored = blocks.double().unflatten(1, (2, 32)) * block_scale.double().unsqueeze(-1)
        assert ((restored.flatten(1) - want).abs().unflatten(1, (2, 32)) <= 0.5001 * block_scale.unsqueeze(-1)).all()
    assert len([name for name in compiled.kernels if "tem" in name and "grouped_mm" in name]) == (3 if kernel == "triton" else 0)


def rewritten(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[Compiled, Tensor]:
    """gelu(linear(a, dequantize(b)) + bias), compiled with the scheme, and its result in float64."""
    a, b, scale, bias = operands(dtype, groups=1)
    monkeypatch.setattr(linear, "SCHEMES", (Scheme("grouped", read), W8A8))

    def fn(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.gelu((a @ reference.dequantize(b, scale).to(dtype).t()).float() + bias)

    return run(fn, a, b, scale, bias), float64(a, b, scale, bias)


def test_a_scheme_before_w8a8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its product is written, and bias and activation are folded into it."""
    compiled, want = rewritten(torch.float16, monkeypatch)
    compiled.check_report(linear={"rewritten": 1}, dequant={"rewritten": 1})
    assert len(compiled.kernels) == 1
    assert compiled.report.linears[0].epilogue == "scales + bias + gelu"
    torch.testing.assert_close(compiled.output.double(), want, rtol=2e-3, atol=2e-3)


def test_the_first_reason_is_given_where_no_scheme_reads_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, want = rewritten(torch.float32, monkeypatch)
    assert [entry.reason for entry in compiled.report.linears] == ["the activation is float32"]
    torch.testing.assert_close(compiled.output.double(), want, rtol=1e-4, atol=1e-4)


def test_errors_name_the_product() -> None:
    a, b, scale, bias = operands()
    for keywords, message in (
        ({"bias": bias[:3]}, r"^grouped_mm: bias must have 1 element or shape \[64\], got \[3\]"),
        ({"activation": "no"}, r"^grouped_mm: activation must be one of"),
        ({"out_dtype": torch.int8}, r"^grouped_mm: out_dtype must be one of"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            GROUPED.operator(a, b, scale, 32, **keywords)
    with pytest.raises(ValueError, match=r"^grouped_mm_block_quant: block_size must be one of 32, 64, 128, got 16"):
        GROUPED.block_quant(a, b, scale, 32, block_size=16)
    with fresh_compile():
        torch.library.opcheck(GROUPED.operator, (a, b, scale, 32), {"bias": bias, "activation": "gelu"})
