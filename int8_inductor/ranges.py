"""Ranges of M: where M is symbolic a product has a kernel for each, chosen for one M that stands for the range, whatever M is seen first.

A kernel is right for every M; which range it was chosen for is a matter of speed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
from torch._inductor.virtualized import V

from ._compat import hints, writes_python

__all__ = ["LAST_ROWS", "MANY_ROWS", "Range", "described", "has_ranges", "last_without", "ranges_of"]

LAST_ROWS = (16, 64, 256, 2048)
"""Where ranges end: a tile of 16 rows; a tile of 64 that reads the weight once; too few tiles for the chip; tiles that just fill it. Few, as each
range's candidates are compiled and timed."""
MANY_ROWS = 4096
"""What stands for the range without an end: enough to fill any chip, and operands of that many rows fit beside a model."""
LARGEST_BITS = 24
"""A symbol of M is not tried beyond so many bits."""


@dataclass(frozen=True)
class Range:
    """M up to `last` (None: without an end), beyond the range before. symbols: values of the symbols of M, by which M is `rows`."""

    last: int | None
    rows: int
    symbols: tuple[tuple[sympy.Symbol, int], ...]

    @contextmanager
    def stands(self) -> Iterator[None]:
        """Inside the block Inductor renders and times for `rows` rows."""
        with hints(dict(self.symbols)):
            yield


def _bounds(size: sympy.Expr) -> tuple[int, int | None]:
    """The least and the largest value that Inductor knows a size to have; None: it knows no largest."""
    bounds = V.graph.sizevars.shape_env.bound_sympy(size)
    lower, upper = (int(each) if isinstance(each, (int, sympy.Integer)) else None for each in (bounds.lower, bounds.upper))
    return max(lower or 0, 1), upper


def _with_rows(m: sympy.Expr, rows: int) -> Range:
    """The range without an end that the largest M of at most `rows` stands for: one symbol grows, the others have their least value."""
    first, *others = sorted(m.free_symbols, key=str)
    values = {symbol: _bounds(symbol)[0] for symbol in (first, *others)}

    def m_of(value: int) -> int:
        return int(m.xreplace({symbol: sympy.Integer(each) for symbol, each in (values | {first: value}).items()}))

    for step in (2**i for i in reversed(range(LARGEST_BITS))):
        if m_of(values[first] + step) <= rows:
            values[first] += step
    return Range(None, m_of(values[first]), tuple(values.items()))


def has_ranges(m: Any, *others: Any) -> bool:
    """Whether there is to be a kernel for each range of M: it is symbolic, the others of a product's sizes are known, and Python launches kernels."""
    return bool(sympy.sympify(m).free_symbols) and not any(sympy.sympify(size).free_symbols for size in others) and writes_python()


def last_without(m: sympy.Expr, holds: Callable[[int], bool]) -> int | None:
    """The last M for which not `holds`, which then holds for every larger one; None where it holds for all or for none that M may be."""
    lower, upper = _bounds(m)
    upper = upper or 2**31
    if holds(lower) or not holds(upper):
        return None
    while upper - lower > 1:
        middle = (lower + upper) // 2
        lower, upper = (lower, middle) if holds(middle) else (middle, upper)
    return lower


def ranges_of(m: Any, *others: Any, most: int | None = None) -> tuple[Range, ...]:
    """The ranges that a symbolic M, which is `most` at the most, may fall in; none where all M have one kernel."""
    if not has_ranges(m, *others):
        return ()
    lower, upper = _bounds(m)
    upper = min(filter(None, (upper, most)), default=None)
    ranges = []
    for last in (*LAST_ROWS, None):
        if last is not None and last < lower:
            continue
        ends = last is None or (upper is not None and upper <= last)
        stands = _with_rows(m, max(lower, min(last or MANY_ROWS, upper or MANY_ROWS)))
        ranges.append(Range(None if ends else last, stands.rows, stands.symbols))
        if ends:
            break
    return tuple(ranges)


def described(lasts: tuple[int | None, ...]) -> str:
    """Ranges that end there, in words: 'M <= 16, M <= 64, above'."""
    return ", ".join("above" if last is None else f"M <= {last}" for last in lasts)
