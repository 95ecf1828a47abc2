"""Programmatic dependent launch: on Hopper and on, a kernel may start while the one before it ends, and says itself when it waits for that one.

A kernel here waits before it reads or writes anything, and at once lets the next one start. So whatever a kernel sees has been written, and what is
left of the gap between two kernels is what it does before it waits: compute its place, and, where there are few rows, ask the L2 for the beginning
of its part of the weight, which is a hint and reads nothing. CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

from typing import Any

from .problem import Problem
from .tail import indented
from .weights import Weights

__all__ = ["constants", "prelude"]

AHEAD_BYTES = 2048
"""Bytes of each row of its tile of the weight that a program asks for."""
ALIGNMENT = 16
"""Bytes that a request's address and size are multiples of."""

_WAIT = """{% if DEPENDENT is defined %}
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
{% endif %}
"""
_AHEAD = """{{% if AHEAD_CHUNK is defined %}}
    pid_n = tl.program_id(0)
{pick}
    ahead = tl.arange(0, AHEAD_LANES)
    ahead_row = {row}
    ahead_bytes = B.to(tl.pointer_type(tl.int8)) + ahead_row.to(tl.int64) * {stride} + (ahead % AHEAD_ROW_LANES) * AHEAD_CHUNK
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], {{{{AHEAD_CHUNK}}}}; mov.b32 $0, 0;", "=r,l", [ahead_bytes], dtype=tl.int32, is_pure=False, pack=1
    )
{{% endif %}}
"""


def prelude(weights: Weights) -> str:
    """Statements, for Jinja, that come first in a template's kernel; nothing where it is not launched so."""
    row = f"{weights.local_tile} + ahead // AHEAD_ROW_LANES"
    if weights.count == 1:  # no tile ends past the end of one of several
        row = f"tl.minimum({row}, {weights.rows} - 1)"
    return _AHEAD.format(pick=indented(weights.pick(["B"]), 4), row=row, stride=weights.stride(0)) + _WAIT


def constants(problem: Problem, row_bytes: int | None, config: dict[str, Any]) -> dict[str, int | bool]:
    """The compile-time constants of that text beside a config's: of a kernel that is launched so.

    row_bytes: of the weight, one after the other, or None where they are not known or cannot be asked for. Only where a single tile covers M are
    programs numbered as tiles of the weight are.
    """
    one_tile = problem.static_m is not None and problem.static_m <= config.get("BLOCK_M", 0) and "NUM_SMS" not in config
    if row_bytes is None or not one_tile or not problem.tma:
        return {"DEPENDENT": True}
    lanes = max(32 * config["num_warps"], config["BLOCK_N"])
    row_lanes = lanes // config["BLOCK_N"]
    chunk = min(AHEAD_BYTES, row_bytes) // row_lanes // ALIGNMENT * ALIGNMENT
    if chunk == 0:
        return {"DEPENDENT": True}
    return {"DEPENDENT": True, "AHEAD_LANES": lanes, "AHEAD_ROW_LANES": row_lanes, "AHEAD_CHUNK": chunk}
