"""The compiled operators against float64: every kernel, over shapes, strides, scales, zero points, epilogues and ways to store the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from kernel_cases import Case, cases, kernels, out_scale, zero_point_dtypes
from support import FLOATS, check_blocks, check_float, check_int8, examples, fresh_compile, in_blocks, linear64, run, well_conditioned
from torch import Tensor

from int8_inductor import ops, reference
from int8_inductor.epilogues import EPILOGUES

# Float results --------------------------------------------------------------------------------------------------------------------


@kernels
@examples(12)
@given(case=cases(), dtype=st.sampled_from([None, *FLOATS]))
@example(case=Case(1, 1, 1), dtype=None)
@example(case=Case(1, 130, 97, bias=torch.bfloat16), dtype=torch.bfloat16)
@example(case=Case(67, 1, 97, a_zero_point=torch.int8, b_zero_point=torch.int8), dtype=None)
def test_float_result(device: str, kernel: str, case: Case, dtype: torch.dtype | None) -> None:
    case.device = device
    got = case.scaled_mm(kernel, store={"out_dtype": dtype}).output
    assert got.dtype == (dtype or torch.float32)
    check_float(got, case.want(narrow=got.dtype != torch.float32))


# Int8 results ---------------------------------------------------------------------------------------------------------------------


@kernels
@examples(12)
@given(case=cases(), per_row=st.booleans(), zero_point=zero_point_dtypes, quant_min=st.sampled_from([-128, -127]))
@example(case=Case(1, 1, 1, a_rows=False), per_row=True, zero_point=torch.int8, quant_min=-128)
@example(case=Case(17, 64, 64, activation="gelu", bias=torch.float32), per_row=False, zero_point=None, quant_min=-127)
def test_int8_result(device: str, kernel: str, case: Case, per_row: bool, zero_point: torch.dtype | None, quant_min: int) -> None:
    case.device = device
    want = case.want(narrow=True)
    scale = out_scale(case, want, per_row)
    assume(well_conditioned(want, scale))
    shift = None if zero_point is None else case.int8(*scale.shape).to(zero_point)
    store = {"out_scale": scale, "out_zero_point": shift, "out_quant_min": quant_min}
    got = case.scaled_mm(kernel, store={name: value for name, value in store.items() if value is not None}).output
    check_int8(got, want, scale, shift, quant_min)


@kernels
@examples(8)
@given(case=cases(), block_size=st.sampled_from([32, 64, 128]), n=st.sampled_from([1, 31, 32, 64, 130, 256]))
@example(case=Case(1, k=7), block_size=32, n=32)
@example(case=Case(67, k=129, activation="silu", bias=torch.float16), block_size=128, n=384)
def test_int8_result_in_blocks(device: str, kernel: str, case: Case, block_size: int, n: int) -> None:
    case.device, case.n = device, n
    want = case.want(narrow=True)
    parts, exact = in_blocks(want, block_size)
    assume(well_conditioned(parts, exact.unsqueeze(-1)))
    q, scale = case.scaled_mm(kernel, ops.scaled_mm_block_quant, {"block_size": block_size}).output
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (q.shape, scale.shape) == ((case.m, n), (case.m, -(-n // block_size)))
    check_blocks(q, scale, want, block_size)


# Epilogues ------------------------------------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("activation", EPILOGUES)
def test_epilogue_over_its_whole_range(device: str, kernel: str, activation: str) -> None:
    """x = q * scale sweeps both tails, the middle and zero, as K is 1 and b is 1."""
    magnitudes = torch.tensor([1e-30, 1e-3, 0.01, 0.03, 0.1, 1.0, 1e4])
    a = torch.arange(-128, 128, dtype=torch.int8).reshape(-1, 1)
    b, a_scale = torch.ones(len(magnitudes), 1, dtype=torch.int8), torch.ones(1)

    def fn(*args: Tensor) -> Tensor:
        return ops.scaled_mm(*args, activation=activation, kernel_preference=kernel)

    operands = (a, b, a_scale, magnitudes)
    got = run(fn, *(t.to(device) for t in operands)).output.cpu()
    check_float(got, linear64(*operands, activation=activation))


# Shapes ---------------------------------------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("store", ["float", "int8", "blocks"])
def test_symbolic_rows_serve_every_m_with_one_compilation(device: str, kernel: str, store: str) -> None:
    case = Case(24, 64, 70, a_zero_point=torch.int8, bias=torch.float32, activation="gelu", device=device)
    tensors = case.operands()
    fixed = {name: tensors[name].to(device) for name in ("b", "b_scale", "bias")}

    def fn(a: Tensor, a_scale: Tensor, a_zero_point: Tensor, out_scale: Tensor) -> Any:
        arguments = {"a": a, "a_scale": a_scale, "a_zero_point": a_zero_point, "activation": "gelu", "kernel_preference": kernel, **fixed}
        if store == "blocks":
            return ops.scaled_mm_block_quant(**arguments, block_size=32)
        return ops.scaled_mm(**arguments, **({"out_scale": out_scale} if store == "int8" else {}))

    with fresh_compile(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(fn, backend="int8_inductor", dynamic=False)
        for m in (24, 2, 65, 131):
            case.m = m
            rows = case.operands()
            want = linear64(**{**rows, **{name: tensors[name] for name in fixed}}, activation="gelu", narrow=store != "float")
            scale = out_scale(case, want, per_row=True)
            inputs = [t.to(device) for t in (rows["a"], rows["a_scale"], rows["a_zero_point"], scale)]
            for each in inputs:
                torch._dynamo.mark_dynamic(each, 0)
            got = torch.utils._pytree.tree_map(lambda t: t.cpu(), compiled(*inputs))
            if store == "blocks":
                check_blocks(*got, want, 32)
            elif store == "int8":
                check_int8(got, want, scale)
            else:
                check_float(got, want)


# What is not finite, and nothing at all -------------------------------------------------------------------------------------------


@kernels
def test_rows_that_are_not_finite_or_zero_are_the_same_in_eager_and_compiled(device: str, kernel: str) -> None:
    case = Case(6, 64, 32, bias=torch.float32, activation="silu", device=device)
    tensors = case.operands()
    tensors["a"][1] = 0
    tensors["a_scale"][2] = float("nan")
    tensors["a_scale"][3] = float("inf")
    tensors["a_scale"][4] = reference.SMALLEST_SCALE
    tensors["a_scale"][5] = 3e38
    tensors["bias"][7:10] = torch.tensor([float("inf"), float("nan"), float("-inf")])
    scale = torch.full((6, 1), 0.05)
    names = list(tensors)

    def fn(scale: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        operands = dict(zip(names, args, strict=True)) | {"activation": "silu", "kernel_preference": kernel}
        shift = torch.full_like(scale, 9, dtype=torch.int8)
        return (
            ops.scaled_mm(**operands),
            ops.scaled_mm(**operands, out_scale=scale),
            ops.scaled_mm(**operands, out_scale=scale, out_zero_point=shift),
            *ops.scaled_mm_block_quant(**operands, block_size=32),
        )

    want = fn(scale, *tensors.values())
    got = [t.cpu() for t in run(fn, *(t.to(device) for t in (scale, *tensors.values()))).output]
    for mine, eager in zip(got, want, strict=True):
        assert mine.dtype == eager.dtype
        off = {"rtol": 0.0, "atol": 1.0} if mine.dtype == torch.int8 else {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(mine.float(), eager.float(), **off, equal_nan=True)
    y, q, shifted, q_blocks, scales = got
    assert bool(y[2].isnan().all())
    assert y[1, 7].item() == float("inf")
    assert y[:, 8:10].isnan().all()  # silu of -inf is NaN
    assert q[2].tolist() == [0] * 64
    assert q[1, 7:10].tolist() == [127, 0, 0]
    assert shifted[2].tolist() == [9] * 64
    assert shifted[1, 7:10].tolist() == [127, 9, 9]
    # The first block holds bias's infinities and NaN and so has no scale; the second has one where its row is finite.
    assert scales.isnan().tolist() == [[True, False], [True, False], [True, True], [True, True], [True, False], [True, True]]
    assert q_blocks[:, :32].tolist() == [[0] * 32] * 6
    assert q_blocks[2].tolist() == [0] * 64


@kernels
def test_no_rows_give_no_rows(device: str, kernel: str) -> None:
    """M = 0 in a compiled call of the operator."""
    b, scale = torch.ones(64, 32, dtype=torch.int8, device=device), torch.ones(1, device=device)

    def fn(a: Tensor, a_scale: Tensor) -> tuple[Tensor, ...]:
        arguments = (a, b, a_scale, scale)
        kwargs = {"kernel_preference": kernel}
        return (
            ops.scaled_mm(*arguments, **kwargs, out_dtype=torch.bfloat16),
            ops.scaled_mm(*arguments, **kwargs, out_scale=scale),
            *ops.scaled_mm_block_quant(*arguments, **kwargs, block_size=32),
        )

    got = run(fn, torch.ones(0, 32, dtype=torch.int8, device=device), torch.ones(0, 1, device=device)).output
    assert [(tuple(t.shape), t.dtype) for t in got] == [
        ((0, 64), torch.bfloat16), ((0, 64), torch.int8), ((0, 64), torch.int8), ((0, 2), torch.float32)
    ]  # fmt: skip
