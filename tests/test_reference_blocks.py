"""Quantization in blocks against float64: scales, values, short last blocks, blocks of zeros and of what is not finite; the block-scaled product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import U, block_linear64, check_float
from torch import Tensor

from int8_inductor import reference

BLOCKS = st.sampled_from([(4,), (1, 4), (3, 1), (3, 4), (4, 4), (32, 32)])
MAGNITUDES = st.sampled_from([1.0, 1e-30, 1e-42, 1e30, 0.0])


def numpy_blocks(shape: tuple[int, ...], sizes: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Where each scale stands, and the part of a tensor that it covers, one by one."""
    whole = (1,) * (len(shape) - len(sizes)) + sizes
    grid = np.ndindex(*[-(-size // block) for size, block in zip(shape, whole, strict=True)])
    return [(at, tuple(slice(i * block, (i + 1) * block) for i, block in zip(at, whole, strict=True))) for at in grid]


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4), sizes=BLOCKS, seed=st.integers(0, 2**31), magnitude=MAGNITUDES, zeros=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_quantize_blocks(shape: list[int], sizes: tuple[int, ...], seed: int, magnitude: float, zeros: bool, dtype: torch.dtype) -> None:
    """Every scale is its block's largest magnitude over 127, every value within half a step; block by block, with a loop."""
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * magnitude).to(dtype)
    if zeros:
        x.view(-1)[: x.numel() // 2] = 0
    q, scale = reference.quantize_blocks(x, sizes)
    assert (q.dtype, q.shape, scale.dtype) == (torch.int8, x.shape, torch.float32)
    back = reference.dequantize_blocks(q, scale, sizes)
    places = numpy_blocks(tuple(shape), sizes)
    assert scale.numel() == len(places)
    for at, part in places:
        largest = float(x[part].double().abs().max())
        step = float(scale[at])
        exact = max(largest / 127, reference.SMALLEST_SCALE) if largest and np.isfinite(largest) else 0.0
        if not np.isfinite(largest):
            assert np.isnan(step)
            continue
        assert abs(step - exact) <= 2 * U * exact
        error = (back[part].double() - x[part].double()).abs().max()
        assert float(error) <= step * (0.5 + 127 * 4 * U)
        assert int(q[part].min()) >= -127


def test_an_int_is_for_blocks_of_columns() -> None:
    x = torch.randn(3, 10)
    for one, other in zip(reference.quantize_blocks(x, 4), reference.quantize_blocks(x, (1, 4)), strict=True):
        assert torch.equal(one, other)


def test_blocks_of_zeros_have_scale_zero_and_values_zero() -> None:
    x = torch.randn(2, 8)
    x[0, 4:] = 0
    q, scale = reference.quantize_blocks(x, 4)
    assert scale[0, 1] == 0
    assert q[0, 4:].tolist() == [0] * 4
    assert reference.dequantize_blocks(q, scale, 4)[0, 4:].tolist() == [0.0] * 4
    assert bool((scale[[0, 1, 1], [0, 0, 1]] > 0).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_block_that_is_not_finite_has_no_scale_and_spoils_no_other(value: float) -> None:
    x = torch.ones(2, 7)
    x[1, 5] = value
    q, scale = reference.quantize_blocks(x, 4)
    assert scale.isnan().tolist() == [[False, False], [False, True]]
    assert q.tolist() == [[127] * 7, [127] * 4 + [0] * 3]
    assert reference.dequantize_blocks(q, scale, 4)[1].isnan().tolist() == [False] * 4 + [True] * 3


def test_ties_go_to_even_and_the_scale_reaches_127() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5], [-127.0, -0.5, -1.5, -2.5]])
    q, scale = reference.quantize_blocks(x, 4)
    assert scale.flatten().tolist() == [1.0, 1.0]
    assert q.tolist() == [[127, 0, 2, 2], [-127, 0, -2, -2]]


def operands(m: int, n: int, k: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator) for shape in ((m, k), (n, k)))
    blocks = -(-k // size)
    a_scale, b_scale = (torch.rand(shape, generator=generator) * 0.01 for shape in ((m, blocks), (-(-n // size), blocks)))
    return a, b, a_scale, b_scale


@given(
    m=st.integers(1, 5), n=st.sampled_from([1, 31, 32, 33, 70]), k=st.sampled_from([1, 31, 32, 64, 97]), size=st.sampled_from([32, 64]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_block_scaled_mm(m: int, n: int, k: int, size: int, seed: int) -> None:
    a, b, a_scale, b_scale = operands(m, n, k, size, seed)
    check_float(reference.block_scaled_mm(a, b, a_scale, b_scale, size), block_linear64(a, b, a_scale, b_scale, size))


def test_block_scaled_mm_is_the_product_of_what_its_operands_dequantize_to() -> None:
    x, w = torch.randn(5, 200), torch.randn(140, 200)
    (a, a_scale), (b, b_scale) = reference.quantize_blocks(x, 128), reference.quantize_blocks(w, (128, 128))
    y = reference.block_scaled_mm(a, b, a_scale, b_scale, 128)
    wide = reference.dequantize_blocks(a, a_scale, 128) @ reference.dequantize_blocks(b, b_scale, (128, 128)).t()
    torch.testing.assert_close(y, wide, rtol=1e-5, atol=1e-4)
    assert float((y - x @ w.t()).norm() / (x @ w.t()).norm()) < 0.02


def test_small_int_mm_is_exact_at_its_largest() -> None:
    a = torch.full((2, 1024), -128, dtype=torch.int8)
    assert reference.small_int_mm(a, a).tolist() == [[2**24] * 2] * 2
