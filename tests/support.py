"""What the tests of passes and numerics share: compile and look, float64 references with error bounds, and layouts of operands.

Tolerances are derived, not tuned. U is the largest relative error of one float32 rounding. A float32 result y of scaled_mm comes from these steps:

    acc -> float32              relative error U          (exact below 2**24)
    times a_scale, b_scale      U each                    so p = acc * a_scale * b_scale has an error of at most 3.01 U |p|
    plus bias                   U |p + bias|              x = p + bias
    activation                  an error of x, times the activation's Lipschitz constant (at most 1.13, that of gelu near 1.4), and its own
                                evaluation, an absolute error of a few U |x|:
                                - 0.5 x (1 + erf(z)): z good to 2 U, worth 0.97 U, erf to 2 ulp, the sum U: 4 U, times |x| / 2, and two
                                  products: at most 4 U |x|. With tanh for erf: z good to 5 U, worth 2.3 U: at most 5 U |x|
                                - x / (1 + exp(z)): z good to 5 U, worth 1.2 U, exp to 2 ulp, worth 1 U, the sum U, the division 2 ulp
                                  (which is what Triton's is good to): at most 8 U |x|
                                - a gelu that is stored narrower than float32 is a fitted one (epilogues.py): min(1.6e-5, 1.3e-4 |gelu|),
                                  and 2.5e-8 in the far tail, where |gelu| < 1e-6
    subnormal results           2**-149 each, the first product's error being multiplied by b_scale
    store as dtype              2 ulp of dtype

An int8 result is clamp(round(y / out_scale) + zero_point): with t = y / out_scale in float64 and e the error of the float32 quotient (that of y
over out_scale, and 6 U |t| for the reciprocal, 2 ulp, and the product), it must lie between what t - e and t + e give. That is: off by at most 1, and
only where t lies within e of a tie.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config as inductor_config
from hypothesis import Phase, settings
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from int8_inductor import Report, reference
from int8_inductor.epilogues import EPILOGUES
from int8_inductor.explain import STATUSES, recording

U = 2.0**-24
SUBNORMAL = 2.0**-149
LIPSCHITZ = 1.13
EVALUATION = 8.0
PRECISION = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
FLOATS = tuple(PRECISION)


def examples(count: int) -> settings:
    """`count` examples in CI, where each compiles something; forty times as many with the thorough profile, which also shrinks what fails."""
    if os.environ.get("INT8_INDUCTOR_HYPOTHESIS_PROFILE", "ci") == "thorough":
        return settings(max_examples=count * 40)
    return settings(max_examples=count, phases=[Phase.explicit, Phase.generate])


# Compile and look -----------------------------------------------------------------------------------------------------------------


@dataclass
class Compiled:
    """What one compiled call gave: its output, the generated code of each graph, the report, and the Triton kernels launched, in order."""

    output: Any
    code: list[str]
    report: Report
    kernels: list[str]

    def linears(self, status: str = "rewritten") -> int:
        """Number of linears with that status."""
        return self.report.counts()["linear"][status]

    def check_report(self, **expected: dict[str, int]) -> None:
        """Assert the exact counts of every status of every kind; statuses that are not given are 0."""
        wanted = {kind: dict.fromkeys(STATUSES, 0) | expected.get(kind, {}) for kind in ("linear", "quant", "dequant")}
        assert self.report.counts() == wanted, f"\n{self.report}"

    def has(self, text: str) -> bool:
        """Whether the generated code has `text`."""
        return any(text in code for code in self.code)


@contextmanager
def fresh_compile() -> Iterator[None]:
    """Compile as if for the first time: a cached graph would run no passes."""
    torch._dynamo.reset()
    with inductor_config.patch(force_disable_caches=True):
        yield


def run(
    fn: Callable[..., Any], *inputs: Any, grad: bool = False, backend: str = "int8_inductor", cpu_backend: str | None = None, **kwargs: Any
) -> Compiled:
    """Compile `fn` and call it once; `kwargs` are torch.compile's, `cpu_backend` Inductor's ("cpp" for plain C++ in place of the interpreter)."""
    patches = {} if cpu_backend is None else {"cpu_backend": cpu_backend}
    with fresh_compile(), inductor_config.patch(patches), recording() as report, torch.set_grad_enabled(grad):
        output, code = run_and_get_code(torch.compile(fn, backend=backend, **kwargs), *inputs)
    return Compiled(output, code, report, [kernel for each in code for kernel in launches(each)])


def launches(code: str) -> list[str]:
    """The Triton kernels that a generated module launches, in order; those in Gluon count as a template's."""
    calls = re.findall(r"^\s+(?:(triton_\w+)\.run|extern_kernels\.(int8_inductor_gluon))\(", code, re.M)
    return [name or "triton_tem_gluon" for name, _ in calls]


def branches(code: str) -> list[tuple[int | None, str]]:
    """The kernels that a generated module launches behind conditions on a size, and the largest size of each."""
    pattern = r"^ +(?:(?:el)?if .+ <= (\d+)|else):\n(?:.+\n)?? +(triton_tem_\w+)\.run\("
    return [(int(last) if last else None, kernel) for last, kernel in re.findall(pattern, code, re.M)]


# float64, and how far float32 may be from it --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounded:
    """A float64 value, and how far from it the float32 arithmetic of the module's docstring may end."""

    value: Tensor
    error: Tensor


def _column(t: Tensor | None) -> Tensor | float:
    return 0.0 if t is None else t.double().reshape(-1, 1)


def _row(t: Tensor | None) -> Tensor | float:
    return 0.0 if t is None else t.double().reshape(1, -1)


def linear64(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    narrow: bool = False,
) -> Bounded:
    """scaled_mm's float result from the same int8 values; `narrow`: it is stored as less than float32. float64 holds the int product exactly."""
    acc = (a.double() - _column(a_zero_point)) @ (b.double() - _column(b_zero_point)).t()
    p = acc * _column(a_scale) * _row(b_scale)
    x = p + _row(bias)
    error = 3.01 * U * p.abs() + 1.01 * U * x.abs() + SUBNORMAL * (1 + _row(b_scale))
    return after_bias(x, error, activation, narrow)


def after_bias(x: Tensor, error: Tensor, activation: str, narrow: bool) -> Bounded:
    """An activation of x, which float32 knows to within `error`."""
    if activation == "none":
        return Bounded(x, error)
    y = EPILOGUES[activation].eager(x)
    error = LIPSCHITZ * error + EVALUATION * U * x.abs() + SUBNORMAL
    if narrow and EPILOGUES[activation].triton_fast:
        error = error + (1.3e-4 * y.abs()).clamp(max=1.6e-5) + 2.5e-8 * ((y.abs() < 1e-6) & (x < -1))
    return Bounded(y, error)


def block_linear64(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    size: int,
    bias: Tensor | None = None,
    activation: str = "none",
    narrow: bool = False,
) -> Bounded:
    """block_scaled_mm's float result from the same int8 values, in blocks of `size`.

    Each block's term has an error of 3 U (the scales' product, the term; its conversion is exact) and each of the sums one of U, of at most the sum
    of the terms' magnitudes. A subnormal product of scales has an absolute error, which the int product multiplies.
    """
    (m, k), n = a.shape, len(b)
    blocks = -(-k // size)
    starts = [slice(i * size, (i + 1) * size) for i in range(blocks)]
    x, size_of_terms, subnormal = torch.zeros(3, m, n, dtype=torch.float64)
    for block, part in enumerate(starts):
        dot = a[:, part].double() @ b[:, part].double().t()
        scale = a_scale[:, block, None].double() * b_scale[:, block].double().repeat_interleave(size)[None, :n]
        x += dot * scale
        size_of_terms += (dot * scale).abs()
        subnormal += dot.abs() + 1
    x = x + _row(bias)
    error = (blocks + 3) * U * size_of_terms + 1.01 * U * x.abs() + SUBNORMAL * subnormal
    return after_bias(x, error, activation, narrow)


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at each value."""
    smallest = math.frexp(torch.finfo(dtype).tiny)[1]
    exponent = torch.frexp(value)[1].clamp(min=smallest)
    return torch.ldexp(torch.ones_like(value), exponent - PRECISION[dtype])


def check_float(got: Tensor, want: Bounded) -> None:
    """Assert that every value of `got` lies within 2 ulp of its dtype, and the float32 error, of the float64 value. NaN is NaN."""
    value, dtype = want.value, got.dtype
    assert got.shape == value.shape
    got = got.double()
    assert torch.equal(got.isnan(), value.isnan())
    tolerance = 2 * ulp(value, dtype) + want.error
    close = (got - value).abs() <= tolerance
    overflowed = got.isinf() & (got.sign() == value.sign()) & (value.abs() + tolerance >= torch.finfo(dtype).max)
    wrong = ~(close | overflowed | value.isnan())
    assert not bool(wrong.any()), _show(wrong, got, value, tolerance)


def check_int8(
    got: Tensor, want: Bounded, scale: Tensor, zero_point: Tensor | None = None, quant_min: int = reference.INT8_MIN, scale_error: float = 0.0
) -> None:
    """Assert that `got` is the quantized float64 value, off by at most 1 and only where that is within the error of a tie."""
    assert got.dtype == torch.int8
    assert got.shape == want.value.shape
    t, e = _steps(want, scale, scale_error)
    low, high = (_saturate((t + shift).round() + _column(zero_point), quant_min) for shift in (-e, e))
    assert bool((high - low <= 1).all()), "the float32 error spans more than one step: see well_conditioned"
    wrong = ~((low <= got) & (got <= high))
    assert not bool(wrong.any()), _show(wrong, got.double(), t + _column(zero_point), e)


def _steps(want: Bounded, scale: Tensor, scale_error: float) -> tuple[Tensor, Tensor]:
    scale = scale.double() if scale.ndim == want.value.ndim else _column(scale)
    t = want.value / scale
    return t, want.error / scale + (6 * U + scale_error) * t.abs()


def well_conditioned(want: Bounded, scale: Tensor) -> bool:
    """Whether float32 tells each value's int8 to within one step: not so where a step is small against the terms that cancel in the value."""
    return bool((_steps(want, scale, 0.0)[1] < 0.1).all())


def _saturate(steps: Tensor, quant_min: int) -> Tensor:
    return steps.clamp(quant_min, reference.INT8_MAX)


def in_blocks(want: Bounded, block_size: int) -> tuple[Bounded, Tensor]:
    """[M, N] as [M, ceil(N / block_size), block_size], filled up with zeros, and in float64 the scale of each block that is not all zeros."""
    blocks = Bounded(*(reference.in_blocks(t, (block_size,)) for t in (want.value, want.error)))
    return blocks, (blocks.value.abs().amax(-1) / 127).clamp(min=reference.SMALLEST_SCALE)


def check_blocks(q: Tensor, scale: Tensor, want: Bounded, block_size: int) -> None:
    """The same for int8 with a scale for each row and block of columns: the scale is within 2 ulp of max|y| / 127, errors of y counted.

    A block of zeros, or of what float32 may not tell from zeros, has the scale 0 and the values 0.
    """
    blocks, exact = in_blocks(want, block_size)
    error = blocks.error.amax(-1) / 127
    filled = reference.in_blocks(q, (block_size,))
    zeros = (scale == 0) & (blocks.value.abs().amax(-1) <= blocks.error.amax(-1))
    assert not bool(filled[zeros].any())
    check_float(scale, Bounded(torch.where(zeros, 0.0, exact), error))
    relative = float((error / exact).max()) + 4 * U
    check_int8(filled, blocks, torch.where(zeros, float("inf"), exact).unsqueeze(-1), None, reference.SYMMETRIC_MIN, relative)


def _show(wrong: Tensor, got: Tensor, want: Tensor, tolerance: Tensor) -> str:
    where = wrong.nonzero()[0].tolist()
    at = tuple(where)
    return (
        f"{int(wrong.sum())} of {wrong.numel()} values are wrong; the first, at {where}: got {got[at].item()!r}, "
        f"want {want.expand_as(got)[at].item()!r} within {tolerance.expand_as(got)[at].item():.3g}"
    )


def away_from_ties(y: Tensor, scale: float, margin: float = 0.002) -> float:
    """A scale near `scale` with which no y / scale lies within `margin` of a tie, so that rounding it is beyond doubt."""
    for step in range(400):
        candidate = float(torch.tensor(scale * (1 + step / 173), dtype=torch.float32))
        t = (y.double() / candidate).clamp(-200, 200)
        if bool(((t - t.floor() - 0.5).abs() > margin).all()):
            return candidate
    raise AssertionError(f"no scale near {scale} keeps {y.numel()} values away from ties")


# Operands -------------------------------------------------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded")


def with_layout(t: Tensor, layout: str) -> Tensor:
    """The matrix `t` (for "expanded": its first row, repeated) in another layout of memory."""
    rows, columns = t.shape
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "sliced":
        wide = t.new_full((2 * rows, 3 * columns + 1), 99)
        wide[::2, 1::3] = t
        return wide[::2, 1::3]
    if layout == "offset":
        tall = t.new_full((rows + 1, columns + 3), 99)
        tall[1:, 3:] = t
        return tall[1:, 3:]
    if layout == "expanded":
        return t[:1].expand(rows, columns)
    return t.contiguous()
