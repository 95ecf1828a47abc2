"""What a template is chosen for: the product's sizes and operands, and the device it runs on."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["INTERPRETER", "TILE_ORDER", "Device", "Problem", "padded", "tiles"]


@dataclass(frozen=True)
class Problem:
    """A product of a [M, K] and a weight b of N rows.

    m, n, k: sizes, or what symbolic ones are compiled for. static_m, static_k: M and K where they are known at compile time. tma: whether both
    operands can be read through tensor descriptors, whatever the symbolic sizes are: K contiguous, and rows and their beginning at multiples of 16
    bytes. one_row: whether M is known to be 1. groups: what a product's main loop must know of its own operands: the sizes of their groups or blocks.
    a_bytes: bytes of an element of a. side_by_side: rows of each of several weights that lie side by side; n is their sum.
    """

    m: int
    n: int
    k: int
    static_k: int | None
    tma: bool
    one_row: bool = False
    groups: tuple[int, ...] = ()
    a_bytes: int = 1
    side_by_side: tuple[int, ...] = ()
    static_m: int | None = None


@dataclass(frozen=True)
class Device:
    """shared_memory: bytes of shared memory that one block can have. multiprocessors: how many there are. tma: whether it has tensor descriptors.
    warpgroups: whether it has Hopper's products of four warps, and this process can write kernels for them. dependent: whether kernels are launched
    before the ones that they follow have ended (launching.py).
    """

    shared_memory: int
    multiprocessors: int
    tma: bool
    warpgroups: bool = False
    dependent: bool = False


INTERPRETER = Device(shared_memory=2**31, multiprocessors=2, tma=True)
"""Triton's interpreter on a CPU: no limits, and few programs, so that each takes several tiles."""


def tiles(problem: Problem, block_m: int, block_n: int) -> int:
    """How many tiles of block_m x block_n cover the result."""
    return -(-problem.m // block_m) * -(-problem.n // block_n)


def padded(problem: Problem, block_m: int, block_n: int) -> int:
    """How many elements those tiles hold, those past the edge of the result included."""
    return tiles(problem, block_m, block_n) * block_m * block_n


TILE_ORDER = """# Programs that run together share rows of A and columns of B in L2.
width = GROUP_M * grid_n
group_id = tile // width
group_size = min(grid_m - group_id * GROUP_M, GROUP_M)
pid_m = group_id * GROUP_M + (tile % group_size)
pid_n = (tile % width) // group_size"""
"""Triton statements that set a tile's row pid_m and column pid_n from its number `tile`, in a grid of grid_m x grid_n."""
