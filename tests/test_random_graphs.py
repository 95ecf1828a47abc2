"""Quants, dequants, linears, pointwise operators and views strung together at random: whatever is rewritten, the result is what it was."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from dialect_cases import DIALECTS, TORCHAO
from hypothesis import given, note
from random_graphs import Program, programs
from support import Compiled, examples, run

from int8_inductor.explain import STATUSES

EVERY_DIALECT = tuple(d for d in DIALECTS if d is not TORCHAO or find_spec("torchao") is not None)


def compile_and_compare(program: Program, device: str = "cpu", **kwargs: object) -> Compiled:
    """Every output, eager and compiled, lies within the bound of its float64 value; int8 outputs are exact."""
    note(program.source())
    program.names = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in program.names.items()}
    fn, inputs = program.function(), [x.to(device) for x in program.inputs]
    with torch.no_grad():
        eager = fn(*inputs)
    compiled = run(fn, *inputs, **kwargs)
    note(str(compiled.report))
    for name, got, plain in zip(program.outputs, compiled.output, eager, strict=True):
        want = program.values[name]
        assert got.dtype == plain.dtype == (torch.int8 if want.is_int8 else torch.float32)
        for how, result in (("eager", plain), ("compiled", got)):
            excess = (result.cpu().double() - want.value).abs() - want.error
            assert result.shape == want.value.shape
            assert float(excess.max()) <= 0, f"{how}, {name} is off by {float(excess.max()):.3g} more than its bound"
    return compiled


def check_invariants(program: Program, compiled: Compiled) -> None:
    """Every linear, quant and dequant that the outputs depend on is in the report exactly once, with a status, and a reason or a kernel."""
    report = compiled.report
    names = [(entry.kind, entry.name) for entry in report.entries]
    assert len(set(names)) == len(names)
    assert len(report.linears) == program.reached("linear")
    assert len(report.quants) == program.reached("quant")
    assert len(report.dequants) >= (1 if program.reached("dequant") else 0)
    for entry in report.entries:
        assert entry.status in STATUSES
        assert bool(entry.reason) == (entry.status in ("left", "feeds")), entry
        assert bool(entry.kernel) == (entry.kind == "linear" and entry.status == "rewritten"), entry


@pytest.mark.long
@examples(18)
@given(program=programs(EVERY_DIALECT))
def test_random_graphs_give_what_eager_gives(device: str, program: Program) -> None:
    compiled = compile_and_compare(program, device)
    check_invariants(program, compiled)


@examples(8)
@given(program=programs(EVERY_DIALECT))
def test_random_graphs_through_aten(device: str, program: Program) -> None:
    """KernelPreference.TORCH: the same graphs, on aten._int_mm and pointwise code."""
    compiled = compile_and_compare(program, device, options={"kernel_preference": "torch"})
    check_invariants(program, compiled)
    assert not any(name.startswith("triton_tem") for name in compiled.kernels)


@examples(6)
@given(program=programs(EVERY_DIALECT))
def test_random_graphs_with_symbolic_rows(program: Program) -> None:
    for x in program.inputs:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    compile_and_compare(program)
