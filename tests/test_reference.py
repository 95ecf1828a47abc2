"""The eager truth against float64: scales, quantize, dequantize and the int8 product, over every float32 that hypothesis finds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from int8_inductor import MappingType, PerRow, PerTensor, reference

EPS = 2.0**-24
"""Half an ulp of 1.0 in float32: the largest relative error of one rounding."""
TINY = float(np.finfo(np.float32).tiny)

FLOAT32_MAX = float(np.finfo(np.float32).max)

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Nearer to the largest float32, half a step up is infinity (reference.py says so; a test below).
moderate = st.floats(-FLOAT32_MAX / 2, FLOAT32_MAX / 2, width=32)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=moderate)
scales = st.floats(min_value=2.0**-60, max_value=2.0**60, width=32)
zero_points = st.integers(-128, 127)


def scalar(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([value], dtype=dtype)


@given(matrices)
def test_symmetric_scale_is_the_largest_magnitude_over_127(values: np.ndarray) -> None:
    scale = reference.choose_scale_symmetric(torch.from_numpy(values), [-1])
    assert scale.dtype == torch.float32
    assert scale.shape == (len(values), 1)
    exact = np.abs(values.astype(np.float64)).max(1) / 127
    np.testing.assert_allclose(scale[:, 0].double().numpy(), np.maximum(exact, TINY), rtol=EPS)


@given(matrices)
def test_asymmetric_scale_spans_the_range_with_zero(values: np.ndarray) -> None:
    scale, zero_point = reference.choose_scale_asymmetric(torch.from_numpy(values), [-1])
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int8)
    assert scale.shape == zero_point.shape == (len(values), 1)
    low = np.minimum(values.astype(np.float64).min(1), 0)
    high = np.maximum(values.astype(np.float64).max(1), 0)
    # Three roundings, and the subnormal ones of high / 255 and low / 255 are absolute: 2^-149 at most, of a scale of at least 2^-126.
    np.testing.assert_allclose(scale[:, 0].double().numpy(), np.maximum((high - low) / 255, TINY), rtol=4 * EPS)
    # The zero point is the int8 of 0.0: within half a step of its exact place, and a rounding of up to 255 more.
    place = -128 - low / scale[:, 0].double().numpy()
    assert np.abs(zero_point[:, 0].double().numpy() - place).max() <= 0.5 + 256 * 2 * EPS


@pytest.mark.parametrize("mapping", list(MappingType))
@given(values=matrices)
def test_values_inside_the_chosen_range_come_back_within_half_a_step(mapping: MappingType, values: np.ndarray) -> None:
    x = torch.from_numpy(values)
    scale, zero_point, quant_min = mapping.choose(x, PerRow())
    q = reference.quantize(x, scale, zero_point, quant_min)
    back = reference.dequantize(q, scale, zero_point)
    assert (q.dtype, back.dtype) == (torch.int8, torch.float32)
    step = scale.double()
    # x / scale is rounded once (255 at most), and the product of the way back once.
    slack = (255 * EPS + 255 * 2 * EPS) * step
    assert bool(((back.double() - x.double()).abs() <= step / 2 + slack).all())
    assert int(q.min()) >= quant_min


@given(value=floats, scale=scales, zero_point=st.none() | zero_points, narrow=st.booleans())
def test_quantize_rounds_clamps_and_saturates_like_float64(value: float, scale: float, zero_point: int | None, narrow: bool) -> None:
    quant_min = -127 if narrow else -128
    shift = None if zero_point is None else scalar(zero_point, torch.int8)
    got = int(reference.quantize(scalar(value), scalar(scale), shift, quant_min))
    steps = value / scale
    # float32 division may land on the other side of a tie that float64 sees.
    assume(abs(steps) > 300 or abs(steps - math.floor(steps) - 0.5) > 1e-4)
    assert got == min(max(round(steps) + (zero_point or 0), quant_min), 127)


@pytest.mark.parametrize(
    ("value", "expected"), [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (-2.5, -2), (126.5, 126), (127.5, 127), (-128.5, -128), (1e30, 127)]
)
def test_ties_go_to_even_and_large_values_saturate(value: float, expected: int) -> None:
    assert int(reference.quantize(scalar(value), scalar(1.0))) == expected


def test_rounding_comes_before_the_zero_point() -> None:
    # round(0.5) + 1 = 1, where round(0.5 + 1) = 2.
    assert int(reference.quantize(scalar(0.5), scalar(1.0), scalar(1, torch.int8))) == 1


def test_quantize_limits_are_those_asked_for() -> None:
    x = torch.tensor([-1e9, -3.0, 3.0, 1e9])
    assert reference.quantize(x, scalar(1.0), None, -2, 2).tolist() == [-2, -2, 2, 2]
    assert reference.quantize(x, scalar(1.0), None, reference.SYMMETRIC_MIN).tolist() == [-127, -3, 3, 127]
    assert reference.quantize(x, scalar(1.0), scalar(100, torch.int32)).tolist() == [-128, 97, 103, 127]


@given(q=st.integers(-128, 127), scale=scales, zero_point=st.none() | zero_points)
def test_dequantize_is_one_rounding_from_exact(q: int, scale: float, zero_point: int | None) -> None:
    shift = None if zero_point is None else scalar(zero_point, torch.int8)
    got = reference.dequantize(scalar(q, torch.int8), scalar(scale), shift)
    assert float(got) == float(np.float32((q - (zero_point or 0)) * scale))


@given(q=st.integers(-127, 127), scale=scales)
def test_an_int8_value_survives_the_way_there_and_back(q: int, scale: float) -> None:
    x = reference.dequantize(scalar(q, torch.int8), scalar(scale))
    assert int(reference.quantize(x, scalar(scale))) == q


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mapping", list(MappingType))
def test_an_all_zero_row_has_a_positive_scale_and_comes_back_as_zeros(mapping: MappingType, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 5, dtype=dtype)
    scale, zero_point, quant_min = mapping.choose(x, PerRow())
    assert scale.tolist() == [[reference.SMALLEST_SCALE]] * 2
    assert bool(torch.isfinite(1 / scale).all())
    q = reference.quantize(x, scale, zero_point, quant_min)
    assert q.tolist() == [[0 if zero_point is None else -128] * 5] * 2
    assert reference.dequantize(q, scale, zero_point).tolist() == [[0.0] * 5] * 2


@pytest.mark.parametrize("mapping", list(MappingType))
@pytest.mark.parametrize("magnitude", [2.0**-149, 2.0**-126, 1e-38, 3.0e38])
def test_tiny_and_huge_rows_have_a_finite_scale(mapping: MappingType, magnitude: float) -> None:
    x = torch.tensor([[magnitude, -magnitude, 0.0]])
    scale, zero_point, quant_min = mapping.choose(x, PerRow())
    assert reference.SMALLEST_SCALE <= float(scale) < math.inf
    back = reference.dequantize(reference.quantize(x, scale, zero_point, quant_min), scale, zero_point)
    assert float((back.double() - x.double()).abs().max()) <= float(scale) * (0.5 + 1e-4)


@pytest.mark.parametrize("mapping", list(MappingType))
def test_the_scale_of_the_largest_float32_is_finite_though_half_a_step_above_it_is_not(mapping: MappingType) -> None:
    x = torch.tensor([[FLOAT32_MAX, -FLOAT32_MAX]])
    scale, zero_point, quant_min = mapping.choose(x, PerRow())
    exact = FLOAT32_MAX / 127 if mapping is MappingType.SYMMETRIC else 2 * FLOAT32_MAX / 255
    assert float(scale) == pytest.approx(exact, rel=4 * EPS)
    assert reference.quantize(x, scale, zero_point, quant_min).tolist() == [[127, quant_min]]
    assert not bool(torch.isfinite(reference.dequantize(torch.tensor(quant_min), scale, zero_point)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mapping", list(MappingType))
def test_a_row_that_is_not_finite_has_scale_nan_and_the_other_rows_their_own(mapping: MappingType, bad: float) -> None:
    x = torch.tensor([[1.0, bad, -2.0], [1.0, 0.5, -2.0]])
    scale, zero_point, quant_min = mapping.choose(x, PerRow())
    assert torch.isnan(scale).tolist() == [[True], [False]]
    back = reference.dequantize(reference.quantize(x, scale, zero_point, quant_min), scale, zero_point)
    assert torch.isnan(back).tolist() == [[True] * 3, [False] * 3]
    alone, _, _ = mapping.choose(x[1:], PerRow())
    assert float(scale[1]) == float(alone)


def test_with_a_given_scale_infinities_saturate_and_nan_becomes_the_zero_point() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan])
    assert reference.quantize(x, scalar(0.5)).tolist() == [127, -128, 0]
    assert reference.quantize(x, scalar(0.5), None, -127).tolist() == [127, -127, 0]
    assert reference.quantize(x, scalar(0.5), scalar(7, torch.int8)).tolist() == [127, -128, 7]


@pytest.mark.parametrize(
    ("values", "zero_point"), [([0.0, 255.0], -128), ([-255.0, 0.0], 127), ([-128.0, 127.0], 0), ([3.0, 255.0], -128), ([-255.0, -3.0], 127)]
)
def test_zero_point_covers_its_range(values: list[float], zero_point: int) -> None:
    scale, got = reference.choose_scale_asymmetric(torch.tensor([values]), [-1])
    assert (float(scale), int(got)) == (1.0, zero_point)


@pytest.mark.parametrize("mapping", list(MappingType))
def test_per_tensor_reduces_all_and_per_row_the_last_dimension(mapping: MappingType) -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    whole, _, _ = mapping.choose(x, PerTensor())
    rows, _, _ = mapping.choose(x, PerRow())
    assert (whole.shape, rows.shape) == ((1, 1, 1), (2, 3, 1))
    if mapping is MappingType.SYMMETRIC:
        assert float(whole) == float(rows.max())


@pytest.mark.parametrize("granularity", [PerTensor(), PerRow()])
@pytest.mark.parametrize("mapping", list(MappingType))
def test_an_empty_tensor_quantizes_to_an_empty_one(mapping: MappingType, granularity: PerTensor | PerRow) -> None:
    x = torch.zeros(3, 0, 4)
    scale, zero_point, quant_min = mapping.choose(x, granularity)
    assert reference.quantize(x, scale, zero_point, quant_min).shape == (3, 0, 4)


@given(m=st.integers(0, 9), n=st.integers(1, 9), k=st.integers(1, 70), seed=st.integers(0, 2**32 - 1), transposed=st.booleans())
def test_int_mm_is_exact(m: int, n: int, k: int, seed: int, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-128, 128, (k, m) if transposed else (m, k), dtype=torch.int8, generator=generator)
    a = a.t() if transposed else a
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    got = reference.int_mm(a, b)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), a.long() @ b.long().t())


def test_int_mm_is_exact_at_the_largest_sum() -> None:
    a = torch.full((1, reference.MAX_K), -128, dtype=torch.int8)
    assert reference.int_mm(a, a).tolist() == [[128 * 128 * reference.MAX_K]]
    assert 128 * 128 * reference.MAX_K < 2**31 <= 128 * 128 * (reference.MAX_K + 1)
    assert 255 * 128 * reference.MAX_K_ZERO_POINT < 2**31 <= 255 * 128 * (reference.MAX_K_ZERO_POINT + 1)
    assert 255 * 255 * reference.MAX_K_ZERO_POINTS < 2**31 <= 255 * 255 * (reference.MAX_K_ZERO_POINTS + 1)


@given(values=hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.just(64)), elements=floats), block=st.sampled_from([16, 32, 64]))
def test_quantize_blocks_gives_each_block_of_a_row_its_own_scale(values: np.ndarray, block: int) -> None:
    y = torch.from_numpy(values)
    q, scale = reference.quantize_blocks(y, block)
    assert (q.shape, scale.shape) == (y.shape, (len(values), 64 // block))
    for i in range(len(values)):
        for j in range(64 // block):
            part = y[i, j * block : (j + 1) * block]
            expected = reference.choose_scale_blocks(part, [-1])
            assert float(scale[i, j]) == float(expected)
            assert torch.equal(q[i, j * block : (j + 1) * block], reference.quantize(part, expected, None, -127))
