"""The pass on grouped products: _grouped_mm of dequantized operands, in several spellings; near misses; and what the report says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dialect_cases import decomposed
from support import check_float, run
from test_experts import grouped64, grouped_operands
from torch import Tensor

E, N, K, S = 3, 16, 32, 10
A, B, A_SCALE, B_SCALE, OFFS = grouped_operands(S, E, N, K, [3, 3, 10])
B_COLUMNS = B_SCALE.unsqueeze(-1)
HALF = torch.bfloat16


def product(a: Tensor, b: Tensor) -> Tensor:
    """Rows by experts [E, N, K]."""
    return torch._grouped_mm(a, b.transpose(-2, -1), offs=OFFS)


def rows(q: Tensor) -> Tensor:
    return (q.float() * A_SCALE).to(HALF)


def experts(b: Tensor = B, scale: Tensor = B_COLUMNS) -> Tensor:
    return (b.float() * scale).to(HALF)


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "scales per row": lambda q: product(rows(q), experts()),
    "permute": lambda q: torch._grouped_mm(rows(q), experts().permute(0, 2, 1), offs=OFFS, out_dtype=HALF),
    "F.grouped_mm": lambda q: F.grouped_mm(rows(q), experts().mT, offs=OFFS),
    "dequantized as bfloat16": lambda q: product(q.to(HALF) * A_SCALE.to(HALF), B.to(HALF) * B_COLUMNS.to(HALF)),
    "one scale each": lambda q: product((q.float() * 0.02).to(HALF), (B.float() * 0.01).to(HALF)),
    "a scale that is a tensor of one": lambda q: product((q.float() * A_SCALE[:1]).to(HALF), (B.float() * B_COLUMNS[:1, :1]).to(HALF)),
    "divided by the inverse": lambda q: product((q.float() / (1 / A_SCALE)).to(HALF), experts()),
    "transposed before the cast": lambda q: torch._grouped_mm(rows(q), (B.float() * B_COLUMNS).transpose(1, 2).to(HALF), offs=OFFS),
    "quantized_decomposed": lambda q: product(decomposed.dequantize_per_tensor(q, 0.02, 0, -128, 127, torch.int8).to(HALF), experts()),
}


def scales_of(name: str) -> tuple[Tensor, Tensor]:
    if name == "dequantized as bfloat16":
        return A_SCALE.to(HALF).float(), B_SCALE.to(HALF).float()
    if name == "one scale each":
        return torch.full((S, 1), 0.02), torch.full((E, N), 0.01)
    if name == "a scale that is a tensor of one":
        return A_SCALE[:1].expand(S, 1), B_SCALE[:1, :1].expand(E, N)
    if name == "quantized_decomposed":
        return torch.full((S, 1), 0.02), B_SCALE
    return A_SCALE, B_SCALE


@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_grouped_product_is_one_operator(name: str, kernel: str) -> None:
    compiled = run(SPELLINGS[name], A, fullgraph=True, options={"kernel_preference": kernel})
    compiled.check_report(linear={"rewritten": 1}, dequant={"rewritten": 2})
    assert compiled.report.linears[0].kernel == kernel
    assert compiled.has("int8_inductor.scaled_grouped_mm")
    assert not compiled.has("aten._grouped_mm")
    a_scale, b_scale = scales_of(name)
    assert compiled.output.dtype == HALF
    check_float(compiled.output, grouped64(A, B, a_scale, b_scale, OFFS))


def test_quants_feed_it() -> None:
    """A whole layer by hand: the quants are entered as feeding our operators, and nothing is left."""
    down, down_scale = grouped_operands(S, E, K, N, [3, 3, 10], seed=1)[1::2]

    def quantized(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return torch.clamp(torch.round(x / scale), -127, 127).to(torch.int8).float() * scale

    def layer(x: Tensor) -> Tensor:
        hidden = product(quantized(x).to(HALF), experts())
        return product(quantized(F.silu(hidden.float())).to(HALF), (down.float() * down_scale.unsqueeze(-1)).to(HALF))

    compiled = run(layer, torch.randn(S, K, generator=torch.Generator().manual_seed(0)), fullgraph=True)
    compiled.check_report(linear={"rewritten": 2}, quant={"feeds": 2}, dequant={"rewritten": 4})


def test_a_float_grouped_product_is_named_and_left(device: str) -> None:
    a, b, offs = (t.to(device) for t in (rows(A), experts(), OFFS))
    compiled = run(lambda a, b: torch._grouped_mm(a, b.transpose(1, 2), offs=offs), a, b)
    compiled.check_report(linear={"float": 1})


ZERO_POINT = torch.tensor([3], dtype=torch.int32)
ALONG_K = torch.rand(K)
TALL = experts().transpose(1, 2).contiguous()
WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "float rows": (lambda q: product(rows(A).relu() + q[0, 0], experts()), "its weight is dequantized from int8 and its activation is not"),
    "float experts": (lambda q: product(rows(q), TALL.transpose(1, 2)), "its activation is dequantized from int8 and its weight is not"),
    "experts with K first": (
        lambda q: torch._grouped_mm(rows(q), (B.reshape(E, K, N).float() * 0.01).to(HALF), offs=OFFS), "the int8 experts are not contiguous .*",
    ),
    "a scale along K": (lambda q: product(rows(q), experts(scale=torch.rand(1, 1, K))), r"the experts' scale varies along dimensions \[2\] of .*"),
    "a scale an expert": (lambda q: product(rows(q), experts(scale=torch.rand(E, 1, 1))), r"the experts' scale varies along dimensions \[0\] of .*"),
    "rows scaled along K": (lambda q: product((q.float() * ALONG_K).to(HALF), experts()), r"the activation's scale varies along dimensions \[1\].*"),
    "rows with a zero point": (lambda q: product(((q.float() - ZERO_POINT) * A_SCALE).to(HALF), experts()), "the activation has a zero point"),
    "experts with a zero point": (lambda q: product(rows(q), ((B.float() - ZERO_POINT) * B_COLUMNS).to(HALF)), "the experts have a zero point"),
    "a group of rows for each of K": (
        lambda q: torch._grouped_mm(rows(q).t(), rows(q), offs=torch.tensor([2, 10], dtype=torch.int32)), "a grouped product other than of rows .*",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_near_misses_are_left_and_named(name: str) -> None:
    fn, reason = WRONG[name]
    compiled = run(fn, A)
    left = [entry for entry in compiled.report.linears if entry.status == "left"]
    assert len(left) == 1
    assert re.fullmatch(reason, left[0].reason), left[0].reason
    assert not compiled.has("scaled_grouped_mm")
    assert compiled.linears() == 0
