"""What the templates for Hopper share: the roles of a program's warps, tile order, tensor descriptors, and the tail.

One warp loads: box after box through descriptors, as stages of shared memory become free. Each of PARTS groups of four warps multiplies ROWS rows of
the left operand with the right one's BLOCK of rows, says when it has read a stage, and ends with the tail. Barriers in shared memory pass the
stages on. So loads never wait for a tail, and with two parts, or two programs on a multiprocessor, one's tail runs while the other multiplies. The
tile is turned to rows of 16 bytes a thread before it is stored: stored as the tensor cores leave it, 8192 cubed takes 15% longer.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from typing import Any

from ..gluon.program import Box, Launch
from ..gluon.template import GluonTemplate, swapped
from .hopper_text import DEPENDENT_LAUNCH, MODULE, STORE, STORE_TRANSPOSED
from .problem import Device, Problem, tiles
from .tail import Tail, indented
from .weights import expanded

__all__ = ["HopperConfig", "HopperTemplate", "Loop", "hopper_template", "is_legal", "launch_constants", "useful"]


@dataclass(frozen=True)
class HopperConfig:
    """Rows of a part of a tile, parts, rows of the right operand, pipeline stages, programs that share a multiprocessor, tile rows that share a run
    through the right operand (for L2), splits of K, whose sums a second kernel adds up, the most steps of a trip through the loop, and whether parts
    take turns with the tensor cores.
    """

    rows: int
    parts: int
    columns: int
    stages: int
    programs: int = 1
    group: int = 8
    splits: int = 1
    steps: int = 8
    turns: bool = False

    @property
    def max_registers(self) -> int | None:
        """Registers of a thread where two programs have to fit; the warps that multiply take most of those of the one that loads."""
        threads = 128 * (self.parts + 1)
        return None if self.programs == 1 else 65536 // (self.programs * threads) // 8 * 8


@dataclass(frozen=True)
class Loop:
    """A main loop. name: of its kernels. text: Gluon statements, from the place of a tile to `dot` [ROWS, COLUMNS], int32 or float32, in layout L.

    left, right: boxes of one step, of 0 rows; their rows are the config's, and an activation's dtype its own. boxes: how many of the right operand a
    step has side by side. k: of a step. steps: how many a trip of the loop may have, the best first; trips are whole.
    transposed: whether the weight is the left operand, so that the tile lies transposed. operands: that the loop reads besides a and b.
    functions: of its own. instruction_k: K of one tensor-core instruction. unpack: whether the weight is int4, unpacked in memory.
    splits: whether it may be given a part of K: it counts steps from `first_step`, or does not count them.
    """

    name: str
    text: str
    left: Box
    right: Box
    k: int
    instruction_k: int = 32
    steps: tuple[int, ...] = (1,)
    transposed: bool = False
    operands: tuple[str, ...] = ()
    functions: str = ""
    unpack: bool = False
    splits: bool = False
    boxes: int = 1

    def stage_bytes(self, config: HopperConfig) -> int:
        """Bytes of shared memory of one stage."""
        left = config.rows * config.parts * self.left.columns * self.left.element.itemsize
        return left + self.boxes * config.columns * self.right.columns * self.right.element.itemsize

    def shared_memory(self, config: HopperConfig) -> int:
        """Bytes of shared memory that a program takes: stages, barriers, and what turning the tile around takes for each part."""
        turned = config.parts * config.rows * config.columns * WIDEST // 2
        return self.stage_bytes(config) * config.stages + turned + 1024


WIDEST = 2
"""Bytes of the widest element that is stored."""
WIDTH = 32
"""Rows of the right operand that a program of the second kernel of a split product takes."""
RESERVED = 1024
"""Bytes of shared memory that every block takes for itself."""


def is_legal(loop: Loop, config: HopperConfig, problem: Problem, device: Device, tail: Tail) -> bool:
    """Whether the device runs that many programs at once on a multiprocessor, and descriptors can name the operands.

    A tail that sums tiles for a zero point, stores scales of its own, or float32 (whose erf spills, and whose tiles take twice the room) is another
    template's.
    """
    fits = config.programs * (loop.shared_memory(config) + RESERVED) <= device.shared_memory + RESERVED
    whole = all(rows % config.columns == 0 for rows in problem.side_by_side)
    if config.splits > 1 and (not loop.splits or problem.side_by_side or problem.static_m is None):
        return False  # the memory for the sums is stated
    if config.turns and config.parts != 2:
        return False  # nobody would pass the turn on
    plain = tail.fast and tail.block_size is None and not tail.loop_lines()
    return fits and whole and plain and device.warpgroups and problem.tma and problem.static_k is not None


def useful(loop: Loop, config: HopperConfig, problem: Problem) -> bool:
    """Whether tiles are not mostly padding."""
    high, wide = config.rows * config.parts, config.columns
    block_m, block_n = (wide, high) if loop.transposed else (high, wide)
    return tiles(problem, block_m, block_n) * block_m * block_n < 2 * problem.m * problem.n


def _tail_statements(tail: Tail, transposed: bool) -> list[str]:
    """The tail's, as Gluon has them: a constant is a scalar by itself."""
    lines = [re.sub(r"tl\.full\(\(\), (\w+), tl\.float32\)", r"tl.to_tensor({{\1}})", line) for line in tail.statements()]
    return swapped(lines) if transposed else lines


def _torch_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _names(loop: Loop, tail: Tail) -> tuple[str, ...]:
    """The kernel's operands."""
    return ("A", *tail.weights.names, *loop.operands, *tail.arguments())


def _source(loop: Loop, tail: Tail) -> str:
    """The kernel's module, for Jinja."""
    weights = tail.weights
    b_tiles = expanded("b_tiles", weights.count)
    vectors = [*loop.operands, *tail.arguments()]
    # The tail's text and the choice among weights speak of BLOCK_N columns at pid_n.
    pick = [line.replace("pid_n * BLOCK_N", "first_right") for line in weights.pick(["b_tiles"])]
    pick_vectors = [line.replace("pid_n * BLOCK_N", "first_right") for line in weights.pick(tail.of_each_weight())]
    local = weights.local_columns
    store = STORE_TRANSPOSED if loop.transposed else STORE
    local_tile = [] if weights.count == 1 else ["first_right -= first_column"]
    left, right = ("b_tiles", "a_tiles") if loop.transposed else ("a_tiles", "b_tiles")
    parts = {
        "ALL_ROWS": weights.rows,
        "LEFT_COLUMNS": str(loop.left.columns),
        "RIGHT_COLUMNS": str(loop.right.columns),
        "RIGHT_BOXES": str(loop.boxes),
        "INSTRUCTION_K": str(loop.instruction_k),
        "STORED_THREADS": "[4, 8]" if loop.transposed else "[2, 16]",
        "FUNCTIONS": loop.functions,
        "PICK_TILES": indented([*pick, *local_tile], 8),
        "PICK_VECTORS": indented(pick_vectors, 8),
        "LOCAL_COLUMNS": local,
        "LEFT_INDEX": "rn" if loop.transposed else "rm",
        "RIGHT_INDEX": "rm" if loop.transposed else "rn",
        "LEFT_ROWS": "N" if loop.transposed else "M",
        "RIGHT_ROWS": "M" if loop.transposed else "N",
        "RIGHT_0": "a_tiles" if loop.transposed else b_tiles[0],
        "LEFT": left,
        "RIGHT": right,
        "B_TILES": ", ".join(b_tiles),
        "POINTERS": "".join(f"{each}, " for each in vectors),
        "LOOP": indented(loop.text.splitlines(), 8),
        "TAIL": indented(_tail_statements(tail, loop.transposed), 8),
        "STORE": indented(store.splitlines(), 8),
        "FINISHED": indented(store.replace("COLUMNS", "WIDTH").splitlines(), 8),
        "DEPENDENT_LAUNCH": DEPENDENT_LAUNCH,
    }
    return re.sub(rf"\b(?:{'|'.join(parts)})\b", lambda match: parts[match.group()], MODULE)


@functools.cache
def hopper_template(loop: Loop, tail: Tail) -> GluonTemplate:
    """The template of a main loop with that tail."""

    def launch(operands: Any, layout: Any, constants: dict[str, Any]) -> Launch:
        rows, splits = constants["ROWS"], constants["SPLITS"]
        high, wide = rows * constants["PARTS"], constants["COLUMNS"]
        a_box, b_box = replace(loop.left, rows=rows), replace(loop.right, rows=wide)
        if loop.transposed:
            a_box, b_box = b_box, a_box
        a_box = replace(a_box, dtype=_torch_name(operands[0].get_dtype()))
        others = operands[1 + tail.weights.count :]
        return Launch(
            boxes=(a_box, *[b_box] * tail.weights.count),
            arguments=tuple(map(_torch_name, (*(box.get_dtype() for box in others), layout.dtype))),
            tile=(wide, high) if loop.transposed else (high, wide),
            splits=splits,
            last_tile=(constants["WIDTH"], rows) if loop.transposed else (rows, constants["WIDTH"]),
            columns=int(layout.size[1]),
            programs=constants["PROGRAMS"],
            max_registers=constants["MAX_REGISTERS"],
            unpacked=int(layout.size[1]) * int(operands[0].get_size()[1]) if loop.unpack else 0,
            dependent="DEPENDENT" in constants,
        )

    return GluonTemplate(_source(loop, tail), _names(loop, tail), launch)


def launch_constants(loop: Loop, config: HopperConfig, problem: Problem) -> dict[str, Any]:
    """A config as the constants of a kernel."""
    assert problem.static_k is not None
    needed = -(-problem.static_k // (loop.k * config.splits))
    steps = min((each for each in loop.steps if each <= config.steps), key=lambda each: -needed % each)
    return {
        "ROWS": config.rows,
        "PARTS": config.parts,
        "COLUMNS": config.columns,
        "STAGES": config.stages,
        "GROUP": config.group,
        "PROGRAMS": config.programs,
        "MAX_REGISTERS": config.max_registers,
        "STEPS": steps,
        "TRIPS": -(-needed // steps),
        "SPLITS": config.splits,
        "WIDTH": min(WIDTH, config.columns),
        "BYTES": loop.stage_bytes(config),
        "INSTRUCTION_N": min(config.columns, 128 if loop.instruction_k == 32 else 256),
    } | ({"TURNS": True} if config.turns else {})


@dataclass(frozen=True)
class HopperTemplate:
    """What templates that are objects have in common."""

    loop: Loop

    def template(self, tail: Tail) -> GluonTemplate:
        """The template with that tail."""
        return hopper_template(self.loop, tail)

    def constants(self, config: HopperConfig, problem: Problem, device: Device, tail: Tail) -> dict[str, Any]:
        """The constants of a kernel."""
        return launch_constants(self.loop, config, problem)
