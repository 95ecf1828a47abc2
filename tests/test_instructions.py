"""Quantizing in fewer instructions: the same int8 and the same scales, bit for bit, and what is left as it was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support import Compiled, run
from torch import Tensor

from int8_inductor import ops, reference
from int8_inductor.passes import instructions

WEIGHT = torch.randint(-127, 128, (16, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))

HALVES = [0.5, 1.5, 2.5, 126.5, 127.5, 128.5]
SPECIAL = [0.0, -0.0, *HALVES, *(-each for each in HALVES), 1e30, -1e30, 1e-45, float("inf"), -float("inf"), float("nan")]


def steps() -> Tensor:
    """Every special value, every tie from -130 to 130, and random ones: float32 [8, 64]."""
    ties = torch.arange(-130, 131, dtype=torch.float32) + 0.5
    noise = 100 * torch.randn(512 - len(ties) - len(SPECIAL), generator=torch.Generator().manual_seed(1))
    return torch.cat([torch.tensor(SPECIAL), ties, noise]).reshape(8, 64)


def beside_a_linear(fn: Callable[[Tensor], Tensor], device: str) -> Compiled:
    """`fn` in a graph that has a scaled_mm, where alone anything is changed."""
    weight, one = WEIGHT.to(device), torch.ones(1, device=device)

    def both(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return fn(x), ops.scaled_mm(q, weight, one, one)

    return run(both, steps().to(device), torch.zeros(2, 64, dtype=torch.int8, device=device))


@pytest.mark.parametrize("quant_min", [-128, -127])
def test_rounding_is_one_operator_and_the_same_bits(device: str, quant_min: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    make = instructions.make
    monkeypatch.setattr(instructions, "make", lambda graph, like, target, *args: calls.append(1) or make(graph, like, target, *args))
    compiled = beside_a_linear(lambda x: reference.saturate(torch.round(x), None, quant_min), device)
    assert len(calls) == 1
    assert torch.equal(compiled.output[0].cpu(), reference.saturate(torch.round(steps()), None, quant_min))
    assert compiled.has("cvt.rni.sat.s8.f32") == (device == "cuda")


@pytest.mark.parametrize("dims", [[-1], [0], [0, 1]])
def test_the_largest_magnitude_is_taken_of_bits(device: str, dims: list[int]) -> None:
    compiled = beside_a_linear(lambda x: x.abs().amax(dims, keepdim=True), device)
    assert compiled.has(".to(tl.int32, bitcast=True)")
    torch.testing.assert_close(compiled.output[0].cpu(), steps().abs().amax(dims, keepdim=True), rtol=0, atol=0, equal_nan=True)


@dataclass(frozen=True)
class NearMiss:
    """reference.saturate(round(x)) but for one thing."""

    low: int = -127
    high: int = 127
    for_nan: float = 0.0
    rounding: Callable[[Tensor], Tensor] = torch.round
    condition: Callable[[Tensor], Tensor] = torch.round
    integer: torch.dtype = torch.int8
    of: torch.dtype = torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        r, other = self.rounding(x.to(self.of)), self.condition(x.to(self.of))
        return torch.clamp(torch.where(r == other, r, self.for_nan), self.low, self.high).to(self.integer)


def halved(x: Tensor) -> Tensor:
    return torch.round(x * 0.5)


NEAR_MISSES = {
    "another lower limit": NearMiss(low=-100),
    "another upper limit": NearMiss(high=126),
    "another value for NaN": NearMiss(for_nan=5.0),
    "another rounding": NearMiss(rounding=torch.floor, condition=torch.floor),
    "another condition": NearMiss(condition=halved),
    "another integer": NearMiss(integer=torch.int16),
    "float16": NearMiss(of=torch.float16),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_as_they_are(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "make", lambda *args: pytest.fail("rewritten"))
    fn = NEAR_MISSES[name]
    compiled = beside_a_linear(fn, device)
    off = 1 if fn.of == torch.float16 else 0  # Inductor computes a cast to float16 and back in float32
    torch.testing.assert_close(compiled.output[0].cpu(), fn(steps()), rtol=0, atol=off)


def test_the_pattern_of_the_near_misses_is_rewritten(device: str) -> None:
    """With nothing else, so that the one thing is what each of them fails for."""
    assert beside_a_linear(NearMiss(), device).has("round_to_int8")


def test_a_graph_without_a_linear_and_plain_cpp_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "make", lambda *args: pytest.fail("rewritten"))

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.saturate(torch.round(x)), x.abs().amax(-1)

    for got, want in zip(run(fn, steps()).output, fn(steps()), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    one = torch.ones(1)
    plain = run(lambda x, q: (reference.saturate(torch.round(x)), ops.scaled_mm(q, WEIGHT, one, one)), steps(), WEIGHT[:2], cpu_backend="cpp")
    assert torch.equal(plain.output[0], reference.saturate(torch.round(steps())))


def test_the_operator_in_eager() -> None:
    t = steps()
    assert torch.equal(ops.round_to_int8(t, -127), reference.saturate(torch.round(t), None, -127))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.round_to_int8, (t,), {"quant_min": -127}, test_utils=checks)
    with pytest.raises(TypeError, match=r"round_to_int8: t must be torch.float32, got torch.float16"):
        ops.round_to_int8(t.half())
    with pytest.raises(ValueError, match=r"round_to_int8: quant_min must be -128 or -127, got 0"):
        ops.round_to_int8(t, 0)
