"""Observers: how `calibrate` turns the values that reach a layer into the range that its int8 values are to cover.

An `Observer` is a frozen recipe. `start()` gives one layer its statistics, which see every value once, in pieces, in bounded memory, and
`clip_range` turns them into a range. To add an observer, write one class; nothing enumerates them.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .granularity import MappingType
from .reference import INT8_MAX

__all__ = ["Extremes", "Histogram", "MSEObserver", "MinMaxObserver", "Observer", "PercentileObserver"]

LOG2_BINS = 12
BINS = 2**LOG2_BINS
"""Bins of a histogram, for each sign. The largest magnitude lies in the upper half of them."""
SMALLEST_EXPONENT = -100
"""The range of a histogram starts at 2**SMALLEST_EXPONENT; smaller activations share its bins."""
CHUNK = 2**22
"""Values binned at a time, which bounds the temporary memory."""


class Extremes:
    """The smallest and largest value so far, and how many there were."""

    def __init__(self) -> None:
        self.count = 0
        self.low, self.high = math.inf, -math.inf

    @property
    def magnitude(self) -> float:
        """max |x| of what came so far."""
        return max(-self.low, self.high)

    def update(self, x: Tensor, low: float, high: float) -> None:
        """Take in a tensor of finite values, not empty, of any shape, float dtype and device; `low` and `high` are its extremes."""
        self.count += x.numel()
        self.low, self.high = min(self.low, low), max(self.high, high)


class Histogram(Extremes):
    """Counts by sign and magnitude: BINS equal bins over [0, 2**exponent) for each sign, zeros apart (they are exact at any scale).

    A value beyond the range doubles it until it fits, and bins merge in twos. As the bounds are powers of two, merging is exact: the counts depend
    on the values seen, not on their order nor on how they were split into batches.

    counts: int64 [2, BINS] on the CPU, row 0 of the negative values, row 1 of the positive ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.exponent = SMALLEST_EXPONENT
        self.zeros = 0
        self.counts = torch.zeros(2, BINS, dtype=torch.int64, device="cpu")

    @property
    def bin_width(self) -> float:
        return 2.0 ** (self.exponent - LOG2_BINS)

    def update(self, x: Tensor, low: float, high: float) -> None:
        super().update(x, low, high)
        if self.magnitude > 0:
            self._grow(math.frexp(self.magnitude)[1])
        for chunk in torch.split(x.reshape(-1), CHUNK):
            values = chunk.float()
            bins = (values.abs() * (1 / self.bin_width)).long()
            bins = torch.where(values < 0, bins, bins + BINS)
            bins = torch.where(values == 0, 2 * BINS, bins)
            counts = torch.bincount(bins, minlength=2 * BINS + 1).cpu()
            self.zeros += int(counts[-1])
            self.counts += counts[:-1].reshape(2, BINS)

    def _grow(self, exponent: int) -> None:
        if exponent <= self.exponent:
            return
        merged = min(BINS, 2 ** (exponent - self.exponent))
        kept = self.counts.reshape(2, BINS // merged, merged).sum(2)
        self.counts = F.pad(kept, (0, BINS - kept.shape[1]))
        self.exponent = exponent


S = TypeVar("S", bound=Extremes)


class Observer(abc.ABC, Generic[S]):
    """Base of the observers."""

    @abc.abstractmethod
    def start(self) -> S:
        """Fresh statistics for one layer."""

    @abc.abstractmethod
    def clip_range(self, seen: S, mapping: MappingType) -> tuple[float, float]:
        """The range (low, high) that int8 is to cover. A symmetric scale is taken from its larger side, an asymmetric one from both."""


@dataclass(frozen=True)
class MinMaxObserver(Observer[Extremes]):
    """The whole range of the values seen: nothing is clipped."""

    def start(self) -> Extremes:
        return Extremes()

    def clip_range(self, seen: Extremes, mapping: MappingType) -> tuple[float, float]:
        return seen.low, seen.high


@dataclass(frozen=True)
class PercentileObserver(Observer[Histogram]):
    """The smallest range, to one bin of the histogram, that keeps `percentile` percent of the values that are not zero.

    Symmetric: by magnitude. Asymmetric: with equal shares cut from both ends. Zeros do not count: they are exact at any scale, and an input
    that is mostly zero (behind a ReLU) would be clipped to nothing.

    percentile: above 0, at most 100.
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        if isinstance(self.percentile, bool) or not isinstance(self.percentile, (int, float)):
            raise TypeError(f"percentile must be a number, got {self.percentile!r}")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 0 and at most 100, got {self.percentile}")

    def start(self) -> Histogram:
        return Histogram()

    def clip_range(self, seen: Histogram, mapping: MappingType) -> tuple[float, float]:
        total = int(seen.counts.sum())
        cut = total - math.ceil(total * (self.percentile / 100))
        if mapping is MappingType.SYMMETRIC:
            limit = min(_bins_below(seen.counts.sum(0), cut) * seen.bin_width, seen.magnitude)
            return -limit, limit
        low, high = (_bins_below(side, cut // 2) * seen.bin_width for side in seen.counts)
        return max(-low, min(seen.low, 0.0)), min(high, max(seen.high, 0.0))


def _bins_below(counts: Tensor, cut: int) -> int:
    """The fewest bins, from zero up, beyond which at most `cut` values lie."""
    beyond = counts.sum() - F.pad(counts.cumsum(0), (1, 0))
    return int((beyond > cut).sum())


@dataclass(frozen=True)
class MSEObserver(Observer[Histogram]):
    """The range with the smallest expected squared quantization error, rounding and clipping together.

    The criterion is the MSE range setting of M. Nagel et al., A White Paper on Neural Network Quantization (arXiv:2106.08295, 2021), section 3.1.
    As in PyTorch's HistogramObserver, values are taken as uniform within a bin of the histogram, which gives the expectation a closed form.
    Searched are steps from that of the whole range down to 1 / 256 of it, 2.2 % apart, and, when asymmetric, all 256 zero points.
    """

    def start(self) -> Histogram:
        return Histogram()

    def clip_range(self, seen: Histogram, mapping: MappingType) -> tuple[float, float]:
        if seen.magnitude == 0:
            return 0.0, 0.0
        shrink = 2.0 ** (-torch.arange(257, dtype=torch.float64, device="cpu") / 32)
        if mapping is MappingType.SYMMETRIC:
            steps = seen.magnitude / INT8_MAX * shrink
            errors = expected_squared_error(seen.counts.sum(0), seen.bin_width, steps)[:, INT8_MAX]
            limit = INT8_MAX * float(steps[errors.argmin()])
            return -limit, limit
        low, high = min(seen.low, 0.0), max(seen.high, 0.0)
        steps = (high - low) / 255 * shrink
        # A zero point leaves n steps above zero and 255 - n below it.
        below, above = (expected_squared_error(side, seen.bin_width, steps) for side in seen.counts)
        best, n = divmod(int((above + below.flip(1)).argmin()), 256)
        return -(255 - n) * float(steps[best]), n * float(steps[best])


def expected_squared_error(counts: Tensor, bin_width: float, steps: Tensor) -> Tensor:
    """Sum of (x - quantized x)^2 over magnitudes x, for each step and each number of levels above zero: float64 [len(steps), 256].

    Column n is for the levels 0, step, ..., n * step, to which x is rounded, beyond which it is clipped.

    Args:
        counts: int64 [BINS], of the magnitudes in bins of `bin_width`, uniform within a bin.
        steps: float64 [S], positive.

    The integral of (x - value)^2 over the cell of values that round to one level is M2 - 2 value M1 + value^2 M0, with Mk the k-th moment of the
    density over the cell; the last level's cell has no upper end.
    """
    levels = torch.arange(256, dtype=torch.float64, device=counts.device)
    # In units of a bin: the moments up to a bin's edge are then whole numbers and thirds.
    values = levels * (steps / bin_width)[:, None]
    upper = (levels + 0.5) * (steps / bin_width)[:, None]
    density = counts.double()
    up_to_upper = _moments_up_to(upper, density)
    up_to_lower = F.pad(up_to_upper, (1, 0))[..., :-1]
    everything = _moments_up_to(torch.full_like(upper, float(len(density))), density)
    cell = _square_error(up_to_upper - up_to_lower, values)
    last_cell = _square_error(everything - up_to_lower, values)
    return (cell.cumsum(1) - cell + last_cell) * bin_width**2


def _moments_up_to(x: Tensor, density: Tensor) -> Tensor:
    """The integrals of density(u) u^k du over [0, x] for k = 0, 1, 2: [3, *x.shape]. `density` is constant on each [i, i + 1), 0 beyond."""
    edges = torch.arange(len(density) + 1, dtype=torch.float64, device=density.device)
    x = x.clamp(max=float(len(density)))
    bin_of_x = x.long().clamp(max=len(density) - 1)
    moments = []
    for k in range(3):
        power = edges ** (k + 1) / (k + 1)
        whole_bins = F.pad((density * power.diff()).cumsum(0), (1, 0))
        moments.append(whole_bins[bin_of_x] + density[bin_of_x] * (x ** (k + 1) / (k + 1) - power[bin_of_x]))
    return torch.stack(moments)


def _square_error(moments: Tensor, value: Tensor) -> Tensor:
    return moments[2] - 2 * value * moments[1] + value * value * moments[0]
