"""block_scaled_mm against float64: eager, compiled to templates and to aten, over shapes, strides, scales, epilogues and ways to store the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_cases import BlockCase, block_cases
from hypothesis import assume, example, given
from hypothesis import strategies as st
from kernel_cases import kernels
from support import (
    FLOATS,
    Bounded,
    U,
    block_linear64,
    check_blocks,
    check_float,
    check_int8,
    examples,
    fresh_compile,
    in_blocks,
    run,
    well_conditioned,
)
from torch import Tensor

from int8_inductor.products.block_scaled_mm import BLOCK_SCALED_MM

EAGER, BLOCK_QUANT = BLOCK_SCALED_MM.operator, BLOCK_SCALED_MM.block_quant


def want_of(case: BlockCase, kernel: str, narrow: bool) -> Bounded:
    """What a kernel may compute: KernelPreference.TORCH rounds each element of the dequantized operands and each of the sums of a float32 product."""
    want = case.want(narrow)
    if kernel != "torch":
        return want
    tensors = case.operands()
    sums = block_linear64(tensors["a"].abs(), tensors["b"].abs(), tensors["a_scale"], tensors["b_scale"], case.scale_block).value
    return Bounded(want.value, want.error + 1.13 * (case.k + 3) * U * sums)


@examples(12)
@given(case=block_cases(), dtype=st.sampled_from([None, *FLOATS]))
def test_eager(case: BlockCase, dtype: torch.dtype | None) -> None:
    got = EAGER(**case.operands(), scale_block=case.scale_block, activation=case.activation, out_dtype=dtype)
    assert got.dtype == (dtype or torch.float32)
    check_float(got, case.want())


@kernels
@examples(10)
@given(case=block_cases(), dtype=st.sampled_from([None, *FLOATS]))
@example(case=BlockCase(1, 1, 1), dtype=None)
@example(case=BlockCase(1, 130, 97, bias=torch.bfloat16), dtype=torch.bfloat16)
@example(case=BlockCase(67, 130, 260, 128, activation="gelu", bias=torch.float32), dtype=torch.float16)
def test_float_result(device: str, kernel: str, case: BlockCase, dtype: torch.dtype | None) -> None:
    case.device = device
    got = case.compiled(kernel, store={"out_dtype": dtype}).output
    assert got.dtype == (dtype or torch.float32)
    check_float(got, want_of(case, kernel, narrow=got.dtype != torch.float32))


@kernels
@examples(6)
@given(case=block_cases(), per_row=st.booleans(), quant_min=st.sampled_from([-128, -127]))
def test_int8_result(device: str, kernel: str, case: BlockCase, per_row: bool, quant_min: int) -> None:
    case.device = device
    want = want_of(case, kernel, narrow=True)
    largest = want.value.abs().amax(-1, keepdim=True) if per_row else want.value.abs().max().reshape(1)
    scale = (largest.float() / 127 * (0.3 + case.rand(*largest.shape))).clamp(min=1e-37)
    assume(well_conditioned(want, scale))
    check_int8(case.compiled(kernel, store={"out_scale": scale, "out_quant_min": quant_min}).output, want, scale, None, quant_min)


@kernels
@examples(8)
@given(case=block_cases(), block_size=st.sampled_from([32, 64, 128]))
@example(case=BlockCase(1, 32, 7), block_size=32)
@example(case=BlockCase(67, 384, 129, 128, activation="gelu", bias=torch.float16), block_size=128)
def test_int8_result_in_blocks(device: str, kernel: str, case: BlockCase, block_size: int) -> None:
    case.device = device
    want = want_of(case, kernel, narrow=True)
    parts, exact = in_blocks(want, block_size)
    assume(well_conditioned(parts, exact.unsqueeze(-1)))
    q, scale = case.compiled(kernel, BLOCK_QUANT, {"block_size": block_size}).output
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (q.shape, scale.shape) == ((case.m, case.n), (case.m, -(-case.n // block_size)))
    check_blocks(q, scale, want, block_size)


@kernels
def test_blocks_of_zeros_and_blocks_without_a_scale(device: str, kernel: str) -> None:
    """Scale 0 gives zeros whatever the values are; NaN and infinity make their row, and no other, NaN; and so does a result's block."""
    case = BlockCase(4, 70, 64, 32, device=device)
    tensors = case.operands()
    tensors["a_scale"][:] = 0.01
    tensors["b_scale"][:] = 0.01
    tensors["a_scale"][0] = 0
    tensors["b_scale"][1] = 0
    tensors["a_scale"][2, 1] = float("nan")

    def fn(*args: Tensor) -> tuple[Tensor, ...]:
        return EAGER(*args, 32, kernel_preference=kernel), *BLOCK_QUANT(*args, 32, kernel_preference=kernel, block_size=32)

    eager = fn(*tensors.values())
    for y, q, scale in (eager, [t.cpu() for t in run(fn, *(t.to(device) for t in tensors.values())).output]):
        assert y[0].tolist() == [0.0] * 70
        assert y[:2, 32:64].tolist() == [[0.0] * 32] * 2
        assert bool(y[2].isnan().all())
        assert not bool(y[[0, 1, 3]].isnan().any())
        assert (scale == 0).tolist() == [[True] * 3, [False, True, False], [False] * 3, [False, True, False]]
        assert scale.isnan().tolist() == [[False] * 3, [False] * 3, [True] * 3, [False] * 3]
        assert not bool(q[0].any() or q[2].any() or q[:, 32:64].any())
        assert q[[1, 3]].abs().amax().item() == 127


@kernels
@pytest.mark.parametrize("blocks", [False, True])
def test_symbolic_rows_serve_every_m_with_one_compilation(device: str, kernel: str, blocks: bool) -> None:
    case = BlockCase(24, 70, 100, 32, bias=torch.float32, activation="gelu", device=device)
    tensors = case.operands()
    fixed = {name: tensors[name].to(device) for name in ("b", "b_scale", "bias")}

    def fn(a: Tensor, a_scale: Tensor) -> Any:
        arguments: dict[str, Any] = {"a": a, "a_scale": a_scale, "scale_block": 32, "activation": "gelu", "kernel_preference": kernel, **fixed}
        return BLOCK_QUANT(**arguments, block_size=64) if blocks else EAGER(**arguments)

    with fresh_compile(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(fn, backend="int8_inductor", dynamic=False)
        for m in (24, 2, 65, 131):
            case.m = m
            rows = case.operands() | {name: tensors[name] for name in fixed}
            inputs = [rows["a"].to(device), rows["a_scale"].to(device)]
            for each in inputs:
                torch._dynamo.mark_dynamic(each, 0)
            got = torch.utils._pytree.tree_map(lambda t: t.cpu(), compiled(*inputs))
            sums = block_linear64(rows["a"].abs(), rows["b"].abs(), rows["a_scale"], rows["b_scale"], 32).value
            want = block_linear64(rows["a"], rows["b"], rows["a_scale"], rows["b_scale"], 32, rows["bias"], "gelu", narrow=blocks)
            want = Bounded(want.value, want.error + (1.13 * 103 * U * sums if kernel == "torch" else 0.0))
            check_blocks(*got, want, 64) if blocks else check_float(got, want)


def test_plain_cpp() -> None:
    """What a CPU runs: C++ around one float product."""
    case = BlockCase(5, 70, 100, 32, bias=torch.bfloat16, activation="silu")
    compiled = case.compiled("auto", store={"out_dtype": torch.bfloat16}, cpu_backend="cpp")
    assert not compiled.kernels
    check_float(compiled.output, want_of(case, "torch", narrow=True))


# Checks ---------------------------------------------------------------------------------------------------------------------------

GOOD = BlockCase(2, 40, 70, 32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.zeros(2, 70)}, TypeError, "a must be torch.int8, got torch.float32"),
        ({"b": torch.zeros(40, 2, 35, dtype=torch.int8)}, ValueError, "b must be a matrix, got shape [40, 2, 35]"),
        ({"b": torch.zeros(40, 71, dtype=torch.int8)}, ValueError, "a [M, K] and b [N, K] must agree in K, got [2, 70] and [40, 71]"),
        ({"a_scale": torch.ones(2, 3, dtype=torch.float64)}, TypeError, "a_scale must be torch.float32, got torch.float64"),
        ({"a_scale": torch.ones(2, 2)}, ValueError, "a_scale must have shape [2, 3] for blocks of 32, got [2, 2]"),
        ({"b_scale": torch.ones(40, 3)}, ValueError, "b_scale must have shape [2, 3] for blocks of 32, got [40, 3]"),
        ({"b_scale": torch.ones(2, 3, device="meta")}, ValueError, "b_scale must be on cpu, the device of a, got meta"),
        ({"scale_block": 16}, ValueError, "scale_block must be one of 32, 64, 128, got 16"),
        ({"scale_block": 64}, ValueError, "a_scale must have shape [2, 2] for blocks of 64, got [2, 3]"),
        ({"bias": torch.ones(41)}, ValueError, "bias must have 1 element or shape [40], got [41]"),
        ({"activation": "tanh"}, ValueError, "activation must be one of none, gelu, gelu_tanh, relu, silu, got 'tanh'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        EAGER(**{**GOOD.operands(), "scale_block": 32, **change})
    assert str(raised.value) == f"block_scaled_mm: {message}"


def test_the_unchanged_call_has_no_error() -> None:
    assert EAGER(**GOOD.operands(), scale_block=32).shape == (2, 40)


@pytest.mark.parametrize("operator", [EAGER, BLOCK_QUANT])
def test_opcheck(operator: Any) -> None:
    torch.library.opcheck(operator, tuple(GOOD.operands().values()), {"scale_block": 32})
