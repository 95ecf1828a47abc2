"""The histogram, and the clip ranges that observers take from it, against counts and integrals computed another way."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from int8_inductor import MappingType, MinMaxObserver, MSEObserver, Observer, PercentileObserver, PerTensor, observers, reference
from int8_inductor.observers import BINS, SMALLEST_EXPONENT, Extremes, Histogram, expected_squared_error

SYMMETRIC, ASYMMETRIC = MappingType.SYMMETRIC, MappingType.ASYMMETRIC
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
streams = st.lists(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=floats), min_size=1, max_size=5)


def show(seen: Extremes, *batches: Tensor) -> None:
    for x in batches:
        seen.update(x, float(x.min()), float(x.max()))


def histogram(x: Tensor) -> Histogram:
    seen = Histogram()
    show(seen, x)
    return seen


@given(streams)
def test_the_histogram_depends_on_the_values_alone(stream: list[np.ndarray]) -> None:
    seen, backwards = Histogram(), Histogram()
    show(seen, *map(torch.from_numpy, stream))
    show(backwards, *map(torch.from_numpy, stream[::-1]))
    values = np.concatenate([part.ravel() for part in stream]).astype(np.float64)
    largest = np.abs(values).max()
    assert (seen.count, seen.low, seen.high, seen.magnitude) == (values.size, values.min(), values.max(), largest)
    assert seen.exponent == max(SMALLEST_EXPONENT, math.frexp(largest)[1] if largest else SMALLEST_EXPONENT)
    assert largest < seen.bin_width * BINS
    assert seen.zeros == (values == 0).sum()
    for side, sign in enumerate((-1, 1)):
        bins = np.floor(np.abs(values[values * sign > 0]) / seen.bin_width).astype(np.int64)
        assert seen.counts[side].tolist() == np.bincount(bins, minlength=BINS).tolist()
    assert torch.equal(seen.counts, backwards.counts)
    assert (seen.exponent, seen.zeros) == (backwards.exponent, backwards.zeros)


@pytest.mark.parametrize("dtype", reference.OUT_DTYPES)
def test_the_histogram_takes_every_float_dtype_and_stride_in_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = histogram(x.float())
    monkeypatch.setattr(observers, "CHUNK", 7)
    seen = histogram(x.t())
    assert torch.equal(seen.counts, expected.counts)
    assert int(seen.counts.sum()) + seen.zeros == seen.count == 600


def test_the_histogram_regrows_over_all_of_float32() -> None:
    seen = Histogram()
    for i, exponent in enumerate(range(-149, 128, 7)):
        show(seen, torch.tensor([math.ldexp(1.0, exponent), -math.ldexp(1.0, exponent)]))
        assert seen.counts.sum(1).tolist() == [i + 1] * 2
        assert seen.counts.shape == (2, BINS)
    assert seen.exponent == 125


@pytest.mark.parametrize("mapping", list(MappingType))
@pytest.mark.parametrize("observer", [MinMaxObserver(), PercentileObserver(), MSEObserver()])
def test_an_all_zero_input_has_an_empty_range(observer: Observer, mapping: MappingType) -> None:
    seen = observer.start()
    show(seen, torch.zeros(5))
    assert observer.clip_range(seen, mapping) == (0.0, 0.0)


@given(streams, st.sampled_from(list(MappingType)))
def test_min_max_is_the_whole_range(stream: list[np.ndarray], mapping: MappingType) -> None:
    seen = MinMaxObserver().start()
    show(seen, *map(torch.from_numpy, stream))
    assert MinMaxObserver().clip_range(seen, mapping) == (min(part.min() for part in stream), max(part.max() for part in stream))


@given(values=hnp.arrays(np.float32, st.integers(1, 200), elements=floats), percentile=st.floats(0.01, 100))
def test_percentile_keeps_its_share_and_one_bin_less_does_not(values: np.ndarray, percentile: float) -> None:
    seen, observer = histogram(torch.from_numpy(values)), PercentileObserver(percentile)
    nonzero = values[values != 0].astype(np.float64)
    cut = len(nonzero) - math.ceil(len(nonzero) * (percentile / 100))
    low, high = observer.clip_range(seen, SYMMETRIC)
    assert low == -high
    assert high <= seen.magnitude
    assert (np.abs(nonzero) > high).sum() <= cut
    if len(nonzero):
        assert (np.abs(nonzero) >= high - seen.bin_width).sum() > cut
    low, high = observer.clip_range(seen, ASYMMETRIC)
    assert min(seen.low, 0) <= low <= 0 <= high <= max(seen.high, 0)
    for limit, beyond in ((high, nonzero), (-low, -nonzero)):
        assert (beyond > limit).sum() <= cut // 2
        if limit > 0:
            assert (beyond >= limit - seen.bin_width).sum() > cut // 2


@given(values=hnp.arrays(np.float32, st.integers(1, 50), elements=floats))
def test_percentile_100_is_min_max(values: np.ndarray) -> None:
    seen = histogram(torch.from_numpy(values))
    assert PercentileObserver(100).clip_range(seen, SYMMETRIC) == (-seen.magnitude, seen.magnitude)
    assert PercentileObserver(100).clip_range(seen, ASYMMETRIC) == (min(seen.low, 0), max(seen.high, 0))


def test_percentile_does_not_count_zeros() -> None:
    x = torch.cat([torch.zeros(10**6), torch.arange(1, 1001) / 1000])
    _, high = PercentileObserver(99.0).clip_range(histogram(x), SYMMETRIC)
    assert 0.99 <= high <= 0.99 + histogram(x).bin_width


@pytest.mark.parametrize(
    ("percentile", "error", "message"),
    [
        (0, ValueError, "percentile must be above 0 and at most 100, got 0"),
        (-1.5, ValueError, "percentile must be above 0 and at most 100, got -1.5"),
        (100.1, ValueError, "percentile must be above 0 and at most 100, got 100.1"),
        (math.nan, ValueError, "percentile must be above 0 and at most 100, got nan"),
        ("99", TypeError, "percentile must be a number, got '99'"),
        (True, TypeError, "percentile must be a number, got True"),
        (None, TypeError, "percentile must be a number, got None"),
    ],
)
def test_percentile_errors(percentile: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        PercentileObserver(percentile)  # type: ignore[arg-type]
    assert str(raised.value) == message


def test_observers_are_values_and_the_base_is_abstract() -> None:
    assert PercentileObserver() == PercentileObserver(99.99)
    assert MSEObserver() == MSEObserver()
    with pytest.raises(TypeError, match="abstract"):
        Observer()  # type: ignore[abstract]


def exact_squared_error(counts: list[int], step: Fraction, top: int) -> Fraction:
    """The integral over bins of width 1, cut where the nearest level changes, in exact arithmetic."""
    cuts = {(k + Fraction(1, 2)) * step for k in range(top)} | set(map(Fraction, range(len(counts) + 1)))
    edges = sorted(edge for edge in cuts if edge <= len(counts))
    total = Fraction(0)
    for start, stop in itertools.pairwise(edges):
        level = min(math.floor((start + stop) / 2 / step + Fraction(1, 2)), top) * step
        total += counts[math.floor(start)] * ((stop - level) ** 3 - (start - level) ** 3) / 3
    return total


@given(counts=st.lists(st.integers(0, 10**6), min_size=1, max_size=12), step=st.fractions(Fraction(1, 64), 16, max_denominator=64),
       width=st.integers(-60, 60), tops=st.sets(st.integers(0, 255), min_size=1, max_size=3))  # fmt: skip
def test_expected_squared_error_is_the_exact_integral(counts: list[int], step: Fraction, width: int, tops: set[int]) -> None:
    scale = 2.0**width
    errors = expected_squared_error(torch.tensor(counts), scale, torch.tensor([float(step) * scale], dtype=torch.float64))
    assert (errors.dtype, errors.shape) == (torch.float64, (1, 256))
    # Each of up to 256 cells takes the difference of moments that are at most sum(counts) * len(counts)^2, with an ulp each.
    slack = 256 * 8 * 2.0**-52 * sum(counts) * max(len(counts), 256 * float(step)) ** 2
    for top in tops:
        assert abs(float(errors[0, top]) / scale**2 - float(exact_squared_error(counts, step, top))) <= slack


def squared_error(x: Tensor, low: float, high: float, mapping: MappingType) -> float:
    scale, zero_point, quant_min = mapping.choose(torch.tensor([low, high]), PerTensor())
    back = reference.dequantize(reference.quantize(x, scale, zero_point, quant_min), scale, zero_point)
    return float((back.double() - x.double()).square().mean())


UNIFORM = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
NORMAL = torch.special.ndtri(UNIFORM).float()
LAPLACE = (torch.sign(UNIFORM - 0.5) * -torch.log1p(-2 * (UNIFORM - 0.5).abs())).float()
SAMPLES = {
    "normal": NORMAL,
    "laplace": LAPLACE,
    "relu": NORMAL.relu(),
    "gelu": torch.nn.functional.gelu(NORMAL * 2),
    "negative": -NORMAL.abs() - 0.3,
    "outliers": torch.cat([NORMAL, torch.full((28,), 50.0), torch.full((7,), -20.0)]),
    "uniform": (UNIFORM * 2 - 1).float(),
}


@pytest.mark.parametrize("name", list(SAMPLES))
def test_mse_is_within_one_percent_of_the_best_range_there_is(name: str) -> None:
    x = SAMPLES[name][::7]
    whole = histogram(x)
    shares = torch.linspace(0.05, 1.0, 39).tolist()
    low, high = MSEObserver().clip_range(whole, SYMMETRIC)
    assert low == -high
    best = min(squared_error(x, -whole.magnitude * share, whole.magnitude * share, SYMMETRIC) for share in shares)
    assert squared_error(x, low, high, SYMMETRIC) <= 1.01 * best
    low, high = MSEObserver().clip_range(whole, ASYMMETRIC)
    assert low <= 0 <= high
    coarse = shares[::6]
    ends = [(min(whole.low, 0) * a, max(whole.high, 0) * b) for a in coarse for b in coarse]
    best = min(squared_error(x, *end, ASYMMETRIC) for end in ends)
    assert squared_error(x, low, high, ASYMMETRIC) <= 1.01 * best


@pytest.mark.parametrize("exponent", [-90, 0, 120])
def test_mse_scales_with_its_input(exponent: int) -> None:
    low, high = MSEObserver().clip_range(histogram(NORMAL * 2.0**exponent), SYMMETRIC)
    expected = MSEObserver().clip_range(histogram(NORMAL), SYMMETRIC)
    assert (low / 2.0**exponent, high / 2.0**exponent) == expected


@pytest.mark.parametrize(("name", "published"), [("normal", 3.92), ("laplace", 9.89)])
def test_mse_finds_the_published_optimum_of_eight_bits(name: str, published: float) -> None:
    """The optimal clipping of R. Banner, Y. Nahshon and D. Soudry, arXiv:1810.05723, to the search's 2.2 % and the samples' own spread."""
    _, high = MSEObserver().clip_range(histogram(SAMPLES[name]), SYMMETRIC)
    assert high == pytest.approx(published, rel=0.03)
