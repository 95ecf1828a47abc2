"""Near misses of quants: behind a linear that is rewritten they stay as they are, give what stock Inductor gives, and are named with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decline_cases import BIAS, ONE, OUT, SCALE, SHIFT, W_SCALE, WHOLE_BIAS, Q, W, X, assert_left, to_int8, wide
from dialect_cases import M, N, decomposed, rand
from support import linear64, run
from torch import Tensor

COLUMNS_OUT, ROWS_OUT = rand(N) * 0.1, rand(M, 1) * 0.1

WRONG_QUANTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "floor": (lambda y: to_int8(torch.floor(y / OUT)), "it rounds by floor, not to nearest even"),
    "ceil": (lambda y: to_int8(torch.ceil(y / OUT)), "it rounds by ceil, not to nearest even"),
    "trunc": (lambda y: to_int8(torch.trunc(y / OUT)), "it rounds by trunc, not to nearest even"),
    "round half up": (lambda y: to_int8(torch.floor(y / OUT + 0.5)), "it rounds by floor, not to nearest even"),
    "decimals": (lambda y: to_int8(torch.round(y / OUT, decimals=1)), "it does not round before the cast to int8"),
    "no rounding": (lambda y: to_int8(y / OUT), "it does not round before the cast to int8"),
    "no clamp": (lambda y: torch.round(y.clamp(-9, 9) / OUT).to(torch.int8), "it does not clamp before the cast to int8"),
    "narrower": (lambda y: torch.clamp(torch.round(y / OUT), -100, 100).to(torch.int8), r"it clamps to \[-100, 100\], not to int8's range"),
    "not negative": (lambda y: torch.clamp(torch.round(y / OUT), 0, 127).to(torch.int8), r"it clamps to \[0, 127\], not to int8's range"),
    "four bits": (lambda y: torch.clamp(torch.round(y / OUT), -8, 7).to(torch.int8), r"it clamps to \[-8, 7\], not to int8's range"),
    "one side": (
        lambda y: torch.clamp(torch.round(y.clamp(min=-9) / OUT), max=127).to(torch.int8),
        r"it clamps to \[-inf, 127.0\], not to whole numbers",
    ),
    "fractions": (lambda y: torch.clamp(y / OUT, -99.5, 99.5).round().to(torch.int8), r"it clamps to \[-99.5, 99.5\], not to whole numbers"),
    "clamp before the zero point": (lambda y: (torch.clamp(torch.round(y / OUT), -100, 100) + SHIFT).to(torch.int8), "it clamps before .*"),
    "zero point before rounding": (lambda y: to_int8(torch.round(y / OUT + SHIFT)), "it adds the zero point before it rounds"),
    "a zero point of floats": (lambda y: to_int8(torch.round(y / OUT) + ONE), r"its zero point \w+ is torch.float32, not an integer"),
    "a large zero point": (lambda y: to_int8(torch.round(y / OUT) + 300), "its zero point 300 is not an int8 value"),
    "scaled by columns": (
        lambda y: to_int8(torch.round(y / COLUMNS_OUT)),
        r"the quant's scale varies along dimensions \[1\] of \[6, 23\], not along \[0\]",
    ),
    "shifted by columns": (
        lambda y: to_int8(torch.round(y / OUT) + torch.arange(N)),
        r"the quant's zero point varies along dimensions \[1\] of \[6, 23\], not along \[0\]",
    ),
    "by rows that are rearranged": (
        lambda y: to_int8(torch.round(y.reshape(2, 3, N).transpose(0, 1) / ROWS_OUT.reshape(3, 2, 1))),
        "the linear's rows are rearranged before they are quantized row by row",
    ),
    "scale from the value": (
        lambda y: to_int8(torch.round(y / (y.abs().amax(-1, keepdim=True) / 127))),
        "its scale is computed from the value that it quantizes",
    ),
    "zero point from the value": (
        lambda y: to_int8(torch.round(y / OUT) + y.amax(-1, keepdim=True).to(torch.int32)),
        "its zero point is computed from the value that it quantizes",
    ),
    "another user": (lambda y: (to_int8(torch.round(y / OUT)), y.sin()), r"the float value \w+ has another user"),
    "two quants": (
        lambda y: (to_int8(torch.round(y / OUT)), to_int8(torch.round(y / (OUT * 2)))),
        r"the float value \w+ has another user",
    ),
    "something in between": (lambda y: to_int8(torch.round(torch.cos(y) / OUT)), "no linear comes right before it"),
    "a residual in between": (lambda y: to_int8(torch.round((y + WHOLE_BIAS) / OUT)), "no linear comes right before it"),
    "decomposed, narrower": (
        lambda y: decomposed.quantize_per_tensor(y, 0.1, 0, -100, 100, torch.int8),
        r"it clamps to \[-100, 100\], not to int8's range",
    ),
    "decomposed, by columns": (
        lambda y: decomposed.quantize_per_channel(y, COLUMNS_OUT, torch.zeros(N, dtype=torch.int64), 1, -128, 127, torch.int8),
        r"the quant's scale varies along dimensions \[1\] of \[6, 23\], not along \[0\]",
    ),
    "per token, which rounds last": (
        lambda y: decomposed.quantize_per_token(y, ROWS_OUT, SHIFT.expand(M, 1), -128, 127, torch.int8),
        "it adds the zero point before it rounds",
    ),
    "decomposed, tensor limits": (
        lambda y: decomposed.quantize_per_tensor.tensor2(y, OUT, SHIFT, torch.tensor(-128), torch.tensor(127), torch.int8),
        "quantized_decomposed.quantize_per_tensor.tensor2 is not one that is matched",
    ),
}


@pytest.mark.parametrize("name", WRONG_QUANTS)
def test_a_quant_that_is_not_exactly_the_pattern(name: str) -> None:
    """It stays as it is, behind a linear that is rewritten."""
    quantize, reason = WRONG_QUANTS[name]

    def fn(q: Tensor) -> Any:
        return quantize(F.linear(q.float() * SCALE, wide(), BIAS))

    compiled = run(fn, Q)
    assert compiled.linears() == 1, f"\n{compiled.report}"
    assert_left(compiled, "quant", *[reason] * (2 if name == "two quants" else 1))
    stock = run(fn, Q, backend="inductor")
    for mine, theirs in zip(*(torch.utils._pytree.tree_leaves(each.output) for each in (compiled, stock)), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-5, atol=1e-5)


def test_an_int8_value_with_another_user_stays_available() -> None:
    """A quant that is folded gives its int8 value to everybody; one before a linear is named, as it is more than the linear's operand."""

    def fn(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q = to_int8(torch.round(x / SCALE))
        folded = to_int8(torch.round(F.linear(q.float() * SCALE, wide(), BIAS) / OUT))
        return q, q.int() + 1, folded, folded.int() + 1

    compiled = run(fn, X)
    compiled.check_report(linear={"rewritten": 1}, quant={"left": 1, "rewritten": 1}, dequant={"rewritten": 2})
    q, next_q, folded, next_folded = compiled.output
    assert torch.equal(q, Q)
    assert torch.equal(next_q, Q.int() + 1)
    assert torch.equal(next_folded, folded.int() + 1)
    steps = torch.round(linear64(Q, W, SCALE, W_SCALE, None, None, BIAS).value / OUT.double()).clamp(-128, 127)
    assert int((folded.double() - steps).abs().max()) <= 1
