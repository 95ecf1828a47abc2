"""Operands of near misses, and how to look at what was left and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from dialect_cases import K, M, N, int8, near, rand, weight
from support import Compiled, run
from torch import Tensor

W, W_SCALE, BIAS = weight()
Q, SCALE = int8(M, K, seed=5), torch.tensor([0.02])
X = near(Q, 0.02, seed=6)
SHIFT = torch.tensor([3], dtype=torch.int32)
ALONG_K, ROW_BIAS, WHOLE_BIAS, ONE, WHOLE = rand(1, K), rand(M, 1), rand(M, N), rand(1), rand(N, K)
OUT = torch.tensor([0.1234])


def wide(w: Tensor = W) -> Tensor:
    return w.float() * W_SCALE


def left_alone(fn: Callable[..., Any], *inputs: Tensor, **kwargs: Any) -> Compiled:
    """Compile `fn` with the passes and without: where nothing is rewritten, the outputs must have the same bits."""
    compiled, stock = run(fn, *inputs, **kwargs), run(fn, *inputs, backend="inductor", **kwargs)
    for mine, theirs in zip(*(torch.utils._pytree.tree_leaves(each.output) for each in (compiled, stock)), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num()), (mine, theirs)
    return compiled


def reasons(compiled: Compiled, kind: str) -> list[str]:
    return [entry.reason for entry in compiled.report.left() if entry.kind == kind]


def assert_left(compiled: Compiled, kind: str, *expected: str) -> None:
    """The entries of `kind` that were left, each with a reason that matches, in order."""
    found = reasons(compiled, kind)
    assert len(found) == len(expected), f"\n{compiled.report}"
    for reason, pattern in zip(found, expected, strict=True):
        assert re.fullmatch(pattern, reason), f"{reason!r} is not {pattern!r}"


def to_int8(t: Tensor) -> Tensor:
    return torch.clamp(t, -128, 127).to(torch.int8)
