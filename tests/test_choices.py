"""Inductor's choices around int8 products: rows that are quantized are read once, and residual sums are stored before they have grown."""

from __future__ import annotations

import re

import pytest
import torch
from support import Compiled, run
from torch import Tensor, nn

from int8_inductor import Int8DynamicActivationInt8WeightConfig, choices, quantize_
from int8_inductor.choices import MAX_READS, MAX_ROW


class Residual(nn.Module):
    """Four blocks of x + linear(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(4))
        self.linears = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x))
        return x


def compiled_residual(cpu_backend: str | None = None) -> tuple[Compiled, Tensor]:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(6, 32)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with torch.no_grad():
        return run(model, x, cpu_backend=cpu_backend), model(x)


def rows_read(compiled: Compiled) -> list[int]:
    """How many [6, 32] tensors each kernel that quantizes reads."""
    kernels = re.findall(r"def (triton_per\w*int8\w*|triton_per\w+)\((.*?)\):(.*?)tl\.store", "\n".join(compiled.code), re.S)
    return [len(re.findall(r"tl\.load\(in_\w*ptr\d+ \+ \(r0_\w+ \+ 32\*x0\)", body)) for _, _, body in kernels]


def test_a_residual_sum_is_stored_before_it_takes_many_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, want = compiled_residual()
    assert max(rows_read(compiled)) == MAX_READS + 1
    torch.testing.assert_close(compiled.output, want, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(choices, "MAX_READS", 100)  # then Inductor's own limit stands
    stock, _ = compiled_residual()
    assert max(rows_read(stock)) > MAX_READS + 1


def test_cpp_code_keeps_inductors_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def code(compiled: Compiled) -> str:
        return re.sub(r"\d+_inference|\b[0-9a-z]{50,}\b", "", "\n".join(compiled.code))

    ours, _ = compiled_residual("cpp")
    monkeypatch.setattr(choices, "MAX_READS", 100)
    stock, _ = compiled_residual("cpp")
    assert code(ours) == code(stock)


def kernels_of_rows(columns: int) -> list[str]:
    model = nn.Sequential(nn.Linear(columns, 8, bias=False))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with torch.no_grad():
        return run(model, torch.randn(3, columns)).kernels


@pytest.mark.parametrize("columns", [1025, 14336])
def test_long_rows_are_quantized_in_one_pass(columns: int) -> None:
    assert [name.split("_")[1] for name in kernels_of_rows(columns)] == ["per", "tem"]


def test_rows_beyond_the_registers_are_read_twice() -> None:
    assert next(name.split("_")[1] for name in kernels_of_rows(MAX_ROW + 1)) == "red"
