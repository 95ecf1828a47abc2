"""Inductor's C++ for the CPU against float64: the compiled operators where no template runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import Case, out_scale
from support import check_blocks, check_float, check_int8, fresh_compile, linear64, run
from torch import Tensor
from torch._inductor import config as inductor_config

from int8_inductor import ops

CPP_CASES = (
    Case(1, 33, 31),
    Case(5, 1, 31, a_zero_point=torch.int8),
    Case(5, 33, 1, b_zero_point=torch.int32),
    Case(1, 1, 1),
    Case(1, 64, 7, a_layout="transposed", b_layout="transposed", bias=torch.bfloat16),
    Case(17, 1, 64, a_layout="sliced", b_layout="sliced", activation="gelu"),
    Case(31, 130, 97, a_layout="offset", b_layout="offset", activation="silu", bias=torch.float32, a_rows=False, b_rows=False),
    Case(16, 61, 129, a_layout="expanded", b_layout="expanded", activation="gelu_tanh", a_zero_point=torch.int8, b_zero_point=torch.int8),
    Case(2, 8, 260, activation="relu", a_size="tiny", b_size="huge"),
)


def test_plain_cpp_over_shapes_and_layouts() -> None:
    """Inductor's C++ for the CPU: all cases as float32, bfloat16 and int8, in one graph."""
    tensors = [case.operands() for case in CPP_CASES]
    scales = [out_scale(case, case.want(), per_row=False) for case in CPP_CASES]

    def fn(tensors: list[dict[str, Tensor]], scales: list[Tensor]) -> list[tuple[Tensor, ...]]:
        results = []
        for case, operands, scale in zip(CPP_CASES, tensors, scales, strict=True):
            each = operands | {"activation": case.activation}
            results.append(
                (ops.scaled_mm(**each), ops.scaled_mm(**each, out_dtype=torch.bfloat16), ops.scaled_mm(**each, out_scale=scale, out_quant_min=-127))
            )
        return results

    compiled = run(fn, tensors, scales, cpu_backend="cpp")
    assert compiled.kernels == []
    assert compiled.has("_int_mm")
    for case, scale, (single, half, int8) in zip(CPP_CASES, scales, compiled.output, strict=True):
        assert (single.dtype, half.dtype) == (torch.float32, torch.bfloat16)
        want = case.want()
        check_float(single, want)
        check_float(half, want)
        check_int8(int8, want, scale, None, -127)


def test_plain_cpp_with_symbolic_rows_and_blocks() -> None:
    case = Case(24, 64, 70, bias=torch.float32, activation="gelu")
    fixed = {name: case.operands()[name] for name in ("b", "b_scale", "bias")}

    def fn(a: Tensor, a_scale: Tensor) -> tuple[Tensor, ...]:
        arguments = {"a": a, "a_scale": a_scale, "activation": "gelu", **fixed}
        return ops.scaled_mm(**arguments), *ops.scaled_mm_block_quant(**arguments, block_size=32)

    with fresh_compile(), inductor_config.patch(cpu_backend="cpp"), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(fn, backend="int8_inductor", dynamic=False)
        for m in (24, 2, 65):
            case.m = m
            rows = case.operands()
            want = linear64(**{**rows, **fixed}, activation="gelu")
            torch._dynamo.mark_dynamic(rows["a"], 0)
            torch._dynamo.mark_dynamic(rows["a_scale"], 0)
            got, q, scale = compiled(rows["a"], rows["a_scale"])
            check_float(got, want)
            check_blocks(q, scale, want, 32)


def test_a_preference_that_cannot_be_met_is_an_error() -> None:
    words = "KernelPreferenceError: kernel_preference 'triton' cannot be met on cpu: Inductor's CPU backend is not Triton"
    with pytest.raises(Exception, match=words):
        Case().scaled_mm("triton", cpu_backend="cpp")


def test_without_triton() -> None:
    """A CPU needs none: nothing on the way to compiled C++ imports it."""
    script = """
import sys
sys.modules["triton"] = None
import torch
from int8_inductor import Int8DynamicActivationInt8WeightConfig, quantize_
model = torch.nn.Sequential(torch.nn.Linear(64, 32)).eval()
quantize_(model, Int8DynamicActivationInt8WeightConfig())
x = torch.randn(4, 64)
with torch.no_grad():
    torch.testing.assert_close(torch.compile(model, backend="int8_inductor")(x), model(x), rtol=1e-4, atol=1e-4)
"""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
