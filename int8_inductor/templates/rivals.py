"""What AUTO times against the templates of a product: a library's kernels, and one pass over their result for all that follows it.

A rival makes operands of a product's sizes and returns what runs its kernels on them once. The pass is a copy to the result's dtype: it reads and
writes what the compiled epilogue does, which is bound by that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .problem import Problem

__all__ = ["EXPANDED_ROWS", "Rival", "expanded_mm", "int_mm"]

Rival = Callable[[Problem, torch.dtype, torch.dtype, torch.device], Callable[[], object] | None]
"""(problem, the activation's dtype, the result's, device) -> what runs it once, or None where the library does not take such operands as they are."""


def _int8(rows: int, columns: int, device: torch.device) -> Tensor:
    """Random values, as zeros are multiplied faster; the user's generators are left as they are."""
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device, generator=torch.Generator(device).manual_seed(0))


def int_mm(problem: Problem, a_dtype: torch.dtype, out_dtype: torch.dtype, device: torch.device) -> Callable[[], object] | None:
    """aten._int_mm, which wants M > 16, and N and K in multiples of 8."""
    m, n, k = problem.m, problem.n, problem.k
    if m <= 16 or n % 8 or k % 8 or not problem.tma:
        return None
    a, b = _int8(m, k, device), _int8(n, k, device)
    dot, out = torch.empty(m, n, dtype=torch.int32, device=device), torch.empty(m, n, dtype=out_dtype, device=device)

    def run() -> None:
        torch._int_mm(a, b.t(), out=dot)
        out.copy_(dot)

    return run


EXPANDED_ROWS = 192
"""From so many rows on expanding can pay: before, it takes longer than reading the weight."""


def expanded_mm(problem: Problem, a_dtype: torch.dtype, out_dtype: torch.dtype, device: torch.device) -> Callable[[], object] | None:
    """aten.mm on an int8 weight that is expanded to the activation's dtype, N x K elements, before."""
    m, n, k = problem.m, problem.n, problem.k
    if m < EXPANDED_ROWS:
        return None
    a, b = _int8(m, k, device).to(a_dtype), _int8(n, k, device)
    weight, dot = torch.empty(n, k, dtype=a_dtype, device=device), torch.empty(m, n, dtype=a_dtype, device=device)
    out = torch.empty(m, n, dtype=out_dtype, device=device)

    def run() -> None:
        weight.copy_(b)
        torch.mm(a, weight.t(), out=dot)
        out.copy_(dot)

    return run
