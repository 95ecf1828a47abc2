"""block_requantize: dequantize, activation and quantize in blocks again, against float64, in eager and as one compiled kernel."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support import EVALUATION, LIPSCHITZ, SUBNORMAL, Bounded, U, check_blocks, examples, in_blocks, run, well_conditioned
from torch import Tensor

from int8_inductor import ops, reference
from int8_inductor.epilogues import EPILOGUES


def operands(shape: tuple[int, ...], block_size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    scale = torch.rand(*shape[:-1], -(-shape[-1] // block_size), generator=generator) * 0.05
    return q, torch.where(torch.rand(scale.shape, generator=generator) < 0.2, 0.0, scale)


def want_of(q: Tensor, scale: Tensor, activation: str, block_size: int) -> Bounded:
    x = (q.double() * scale.double().repeat_interleave(block_size, -1)[..., : q.shape[-1]]).reshape(-1, q.shape[-1])
    return Bounded(EPILOGUES[activation].eager(x), LIPSCHITZ * U * x.abs() + EVALUATION * U * x.abs() + SUBNORMAL)


shapes = st.sampled_from([(1, 1), (5, 33), (2, 3, 64), (67, 130), (3, 300), (128,)])


@pytest.mark.parametrize("compiled", [False, True])
@examples(14)
@given(shape=shapes, block_size=st.sampled_from([32, 64, 128]), activation=st.sampled_from(sorted(EPILOGUES)), seed=st.integers(0, 2**31))
@example(shape=(3, 300), block_size=128, activation="gelu", seed=0)
def test_against_float64(device: str, compiled: bool, shape: tuple[int, ...], block_size: int, activation: str, seed: int) -> None:
    q, scale = operands(shape, block_size, seed)
    want = want_of(q, scale, activation, block_size)
    parts, exact = in_blocks(want, block_size)
    assume(well_conditioned(parts, exact.unsqueeze(-1)))
    if compiled:
        got = run(lambda q, scale: ops.block_requantize(q, scale, activation, block_size), q.to(device), scale.to(device))
        assert len(got.kernels) == 1, got.kernels
        values, scales = (t.cpu() for t in got.output)
    else:
        values, scales = ops.block_requantize(q, scale, activation, block_size)
    assert (values.dtype, scales.dtype, values.shape, scales.shape) == (torch.int8, torch.float32, q.shape, scale.shape)
    check_blocks(values.reshape(-1, shape[-1]), scales.reshape(-1, scale.shape[-1]), want, block_size)


def test_one_kernel_and_nothing_but_int8_in_memory(device: str) -> None:
    q, scale = (t.to(device) for t in operands((70, 256), 128, 0))
    compiled = run(lambda q, scale: ops.block_requantize(q, scale, "gelu", 128), q, scale)
    assert len(compiled.kernels) == 1
    buffers = [line.split(" = ")[1] for code in compiled.code for line in code.splitlines() if re.match(r"\s+buf\d+ = empty_strided", line)]
    assert sorted(re.findall(r"torch\.\w+", " ".join(buffers))) == ["torch.float32", "torch.int8"], buffers
    assert not any("512" in line or "17920" in line for line in buffers if "float32" in line)


def test_plain_cpp() -> None:
    for columns in (256, 100):
        q, scale = operands((9, columns), 64, 1)
        compiled = run(lambda q, scale: ops.block_requantize(q, scale, "gelu", 64), q, scale, cpu_backend="cpp")
        assert not compiled.kernels
        check_blocks(*compiled.output, want_of(q, scale, "gelu", 64), 64)


def test_what_is_written_in_plain_aten_is_one_kernel_too(device: str) -> None:
    q, scale = (t.to(device) for t in operands((70, 256), 128, 0))

    def fn(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return reference.quantize_blocks(torch.nn.functional.gelu(reference.dequantize_blocks(q, scale, 128)), 128)

    compiled = run(fn, q, scale)
    assert len(compiled.kernels) == 1
    check_blocks(*(t.cpu() for t in compiled.output), want_of(q.cpu(), scale.cpu(), "gelu", 128), 128)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 70)}, TypeError, "q must be torch.int8, got torch.float32"),
        ({"scale": torch.ones(2, 3, dtype=torch.float16)}, TypeError, "scale must be torch.float32, got torch.float16"),
        ({"scale": torch.ones(2, 2)}, ValueError, "scale must have shape [2, 3] for q [2, 70] in blocks of 32, got [2, 2]"),
        ({"block_size": 16}, ValueError, "block_size must be one of 32, 64, 128, got 16"),
        ({"activation": "tanh"}, ValueError, "activation must be one of none, gelu, gelu_tanh, relu, silu, got 'tanh'"),
        ({"scale": torch.ones(2, 3, device="meta")}, ValueError, "scale must be on cpu, the device of q, got meta"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, scale = operands((2, 70), 32, 0)
    with pytest.raises(error) as raised:
        ops.block_requantize(**{"q": q, "scale": scale, "block_size": 32, **change})
    assert str(raised.value) == f"block_requantize: {message}"


def test_opcheck() -> None:
    torch.library.opcheck(ops.block_requantize, operands((2, 3, 70), 32, 0), {"block_size": 32, "activation": "gelu"})
