"""Random operands for each number format, the float64 truth of what a peer computes from them, and the check of its output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from int8_inductor import reference
from int8_inductor.epilogues import EPILOGUES

from .cases import Case
from .common import float_dtype

INT8_STD = 73.3
"""Standard deviation of integers drawn evenly from -127 to 127; scales are drawn so that results have a spread of about 1."""
OUT_SCALE = 3.0 / 127
TIE_DISTANCE = 1e-2
"""An int8 result may be off by one where the float64 value lies this near (in steps) to a tie: float32 epilogue and a fitted activation."""
TOLERANCE = {torch.bfloat16: 2e-3, torch.float32: 1e-6}
"""Largest ||out - ref|| / ||ref|| of an exact integer product with a float32 epilogue. Rounding to bfloat16 alone makes 1.5e-3 of values of random
magnitude; with scales in bfloat16 too it would be 2.2e-3, so that is caught."""
FLOAT_TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
"""The same for products that round while they accumulate."""

_POISON_BLOCKS = 8
BLOCK = 128
"""Size of the blocks that share a scale: 1 x 128 of a, 128 x 128 of b."""


@dataclass(frozen=True)
class Operands:
    """A number format: `pair` draws (a [M, K], b [N, K], a_scale [M, 1] or None, b_scale [N] or None).

    dequantized: of a format with other operands, all of which `pair` draws: the float64 (a, b) that they stand for.
    block_size: of scales in blocks, a_scale [M, ceil(K / B)] and b_scale [ceil(N / B), ceil(K / B)].
    """

    name: str
    pair: Callable[[Case, torch.device], tuple[Tensor, ...]]
    exact: bool
    dequantized: Callable[[tuple[Tensor, ...]], tuple[Tensor, Tensor]] | None = None
    block_size: int | None = None

    def draw(self, case: Case, device: torch.device) -> tuple[Tensor, ...]:
        """Fresh random operands: a, b, scales where the format has them, then bias and, for INT8 formats, out_scale where the case has them."""
        operands = list(self.pair(case, device))
        if case.tail.bias:
            bias = torch.randn(case.n, device=device)
            operands.append(bias if len(operands) > 2 else bias.to(operands[0].dtype))
        if case.tail.int8_out and case.tail.block_size is None and len(operands) > 3:
            operands.append(torch.full((1,), OUT_SCALE, device=device))
        return tuple(operands)

    def bytes_of_one(self, case: Case, device: torch.device) -> int:
        """Bytes of one operand set and its output."""
        return case.m * case.n * case.tail.out_bytes(float_dtype(device).itemsize) + sum(t.nbytes for t in self.draw(case, device))


def _scales(case: Case, device: torch.device, std: float) -> tuple[Tensor, Tensor]:
    """Scales [M, 1] and [N], float32, over a factor of three, that bring the product of numbers with this spread to about 1."""
    a_scale = (torch.rand(case.m, 1, device=device) + 0.5) / std
    b_scale = (torch.rand(case.n, device=device) + 0.5) / (std * math.sqrt(case.k))
    return a_scale, b_scale


def _int8(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    a = torch.randint(-127, 128, (case.m, case.k), device=device, dtype=torch.int8)
    b = torch.randint(-127, 128, (case.n, case.k), device=device, dtype=torch.int8)
    return (a, b, *_scales(case, device, INT8_STD))


def _int8_bf16_scales(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    a, b, a_scale, b_scale = _int8(case, device)
    return a, b, a_scale.bfloat16(), b_scale.bfloat16()


def _float(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    dtype = float_dtype(device)
    a = torch.randn(case.m, case.k, device=device)
    b = torch.randn(case.n, case.k, device=device) / math.sqrt(case.k)
    return a.to(dtype), b.to(dtype)


def _fp8(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    a = torch.randn(case.m, case.k, device=device).to(torch.float8_e4m3fn)
    b = torch.randn(case.n, case.k, device=device).to(torch.float8_e4m3fn)
    return (a, b, *_scales(case, device, 1.0))


def _block_scales(case: Case, device: torch.device, std: float) -> tuple[Tensor, Tensor]:
    """The same in blocks of BLOCK, those of a with the rows running fastest, as cuBLAS wants them."""
    blocks = -(-case.k // BLOCK)
    a_scale = (torch.rand(blocks, case.m, device=device).t() + 0.5) / std
    b_scale = (torch.rand(-(-case.n // BLOCK), blocks, device=device) + 0.5) / (std * math.sqrt(case.k))
    return a_scale, b_scale


def _int8_blocks(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    a, b, *_ = _int8(case, device)
    a_scale, b_scale = _block_scales(case, device, INT8_STD)
    return a, b, a_scale.contiguous(), b_scale


def _fp8_blocks(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    a, b, *_ = _fp8(case, device)
    return (a, b, *_block_scales(case, device, 1.0))


INT8 = Operands("int8", _int8, exact=True)
INT8_BF16_SCALES = Operands("int8, bf16 scales", _int8_bf16_scales, exact=True)
FLOAT = Operands("float", _float, exact=False)
FP8 = Operands("fp8", _fp8, exact=False)
INT8_BLOCKS = Operands("int8 in blocks", _int8_blocks, exact=True, block_size=BLOCK)
FP8_BLOCKS = Operands("fp8 in blocks", _fp8_blocks, exact=False, block_size=BLOCK)


def float64_truth(case: Case, operands: tuple[Tensor, ...], block_size: int | None = None) -> Tensor:
    """activation(a @ b.T * scales + bias) in float64, in steps of out_scale when there is one; [M, N]. block_size: of scales in blocks.

    An int8 tail in blocks has steps of its own: the largest magnitude of each row of a block, over 127.
    """
    rest = list(operands)
    a, b = rest.pop(0).double(), rest.pop(0).double()
    scaled = len(rest) >= 2
    if block_size is not None:
        a = a * reference.expand_blocks(rest.pop(0), a.shape[-1:], (block_size,)).double()
        b = b * reference.expand_blocks(rest.pop(0), b.shape, (block_size, block_size)).double()
    truth = a @ b.t()
    if scaled and block_size is None:
        truth = truth.mul_(rest.pop(0).double()).mul_(rest.pop(0).double())
    if case.tail.bias:
        truth = truth.add_(rest.pop(0).double())
    truth = EPILOGUES[case.tail.activation].eager(truth)
    if case.tail.block_size is not None and scaled:
        steps = reference.in_blocks(truth, (case.tail.block_size,)).abs().amax(-1) / reference.INT8_MAX
        return truth / reference.expand_blocks(steps, truth.shape[-1:], (case.tail.block_size,))
    return truth / rest.pop(0).double() if rest else truth


@dataclass(frozen=True)
class Check:
    """How far an output is from the truth.

    error: ||out - ref|| / ||ref||, int8 outputs against the rounded and clamped reference. off_by: for int8 output, the largest difference in steps.
    tie_distance: the largest distance from a tie, in steps, of a value that came out off by one. poisoned: whether the output lay in memory that had
    been filled with poison just before. wrong: what is wrong, or None.
    """

    error: float
    off_by: int | None
    tie_distance: float | None
    poisoned: bool
    wrong: str | None

    def record(self) -> dict[str, Any]:
        """As JSON has it: an error that is not a number is None, and `wrong` says so."""
        return asdict(self) | {"error": self.error if math.isfinite(self.error) else None}


def run_poisoned(call: Callable[..., Tensor], stale: tuple[Tensor, ...], operands: tuple[Tensor, ...]) -> tuple[Tensor, bool]:
    """call(*operands) with the memory of its output poisoned, and whether the output came to lie there.

    The allocator gives freed memory out again, so blocks of the output's size are filled with NaN (int8: 85) and freed.
    """
    sample = call(*stale)
    value = 85 if sample.dtype == torch.int8 else float("nan")
    blocks = [sample.fill_(value), *(torch.full_like(sample, value) for _ in range(_POISON_BLOCKS))]
    spans = sorted((block.data_ptr(), block.data_ptr() + block.nbytes) for block in blocks)
    del sample, blocks
    out = call(*operands)
    start = out.data_ptr()
    for low, high in spans:
        if low <= start < high:
            start = high
    return out, start >= out.data_ptr() + out.nbytes


def check(case: Case, form: Operands, call: Callable[..., Tensor], stale: tuple[Tensor, ...], device: torch.device) -> Check:
    """Run `call` on fresh operands and hold its output against float64. `stale` are other operands, for the run that finds the output's size."""
    operands = form.draw(case, device)
    out, poisoned = run_poisoned(call, stale, operands)
    truth = float64_truth(case, operands if form.dequantized is None else form.dequantized(operands), form.block_size)
    wanted = torch.int8 if case.tail.int8_out and form.exact else float_dtype(device)
    if out.dtype != wanted or out.shape != truth.shape:
        described = f"{out.dtype} {list(out.shape)}, wanted {wanted} {list(truth.shape)}"
        return Check(math.inf, None, None, poisoned, f"output is {described}")
    if out.dtype == torch.int8:
        return _check_int8(out, truth, poisoned)
    error = ((out.double() - truth).norm() / truth.norm()).item()
    limit = (TOLERANCE if form.exact else FLOAT_TOLERANCE)[out.dtype]
    # NaN compares false: it is wrong.
    return Check(error, None, None, poisoned, None if error <= limit else f"relative error {error:.2e} is above {limit:.2e}")


def _check_int8(out: Tensor, truth: Tensor, poisoned: bool) -> Check:
    rounded = truth.round().clamp(-128, 127)
    difference = (out.double() - rounded).abs()
    off_by = int(difference.max())
    error = (difference.norm() / rounded.norm()).item()
    if off_by == 0:
        return Check(error, 0, None, poisoned, None)
    distance = ((truth - truth.floor()) - 0.5).abs()[difference > 0].max().item()
    if off_by > 1:
        return Check(error, off_by, distance, poisoned, f"int8 output is off by {off_by}")
    wrong = None if distance <= TIE_DISTANCE else f"int8 output is off by one {distance:.3f} steps away from a tie"
    return Check(error, off_by, distance, poisoned, wrong)
