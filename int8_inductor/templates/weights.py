"""The weight's side of a main loop: one weight, or several that lie side by side without having been moved.

Linears that read one activation (Q, K and V, or gate and up) are one product whose columns are those of the first weight, then those of the second.
No tile spans two weights, so a program picks the pointers of its tile's weight once, before its loop over K, and all else is as for one weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from .problem import Problem

__all__ = ["Weights", "whole_tiles"]


def whole_tiles(problem: Problem, block_n: int) -> bool:
    """Whether no tile of `block_n` columns spans two of several weights."""
    return all(rows % block_n == 0 for rows in problem.side_by_side)


@dataclass(frozen=True)
class Weights:
    """`count` weights [N_i, K], contiguous where there are several. Their kernel arguments are B, or B_0, B_1, ..."""

    count: int = 1

    @property
    def names(self) -> list[str]:
        """Of the kernel's arguments."""
        return expanded("B", self.count)

    @property
    def rows(self) -> str:
        """How many there are in all, the N of the product."""
        return " + ".join(f'{{{{size("{name}", 0)}}}}' for name in self.names)

    def stride(self, dim: int) -> str:
        """Of each of them."""
        return f'{{{{stride("{self.names[0]}", {dim})}}}}'

    @property
    def local_columns(self) -> str:
        """The tile's columns `rn` in its weight; where there is one, those past its end read the first."""
        return "tl.where(rn < N, rn, 0)" if self.count == 1 else "rn - first_column"

    @property
    def local_tile(self) -> str:
        """The tile's first column in its weight."""
        return "pid_n * BLOCK_N" if self.count == 1 else "pid_n * BLOCK_N - first_column"

    def pick(self, pointers: list[str]) -> list[str]:
        """Statements that set each of `pointers` to that of the tile's weight, `weight` to its number and `first_column` to its place among all."""
        if self.count == 1:
            return []
        lines = []
        for i in range(self.count):
            end = " + ".join(f'{{{{size("{name}", 0)}}}}' for name in self.names[: i + 1])
            start = " + ".join(f'{{{{size("{name}", 0)}}}}' for name in self.names[:i]) or "0"
            lines.append("else:" if i == self.count - 1 else f"{'el' if i else ''}if pid_n * BLOCK_N < {end}:")
            lines += [f"    {pointer} = {pointer}_{i}" for pointer in pointers]
            lines += [f"    weight = {i}", f"    first_column = {start}"]
        return lines


def expanded(name: str, count: int) -> list[str]:
    """The arguments that `name` stands for where there are `count` weights."""
    return [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
