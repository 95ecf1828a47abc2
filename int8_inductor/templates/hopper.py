"""What the templates for Hopper share: the roles of a program's warps, tile order, tensor descriptors, and the tail.

One warp loads: box after box through descriptors, as stages of shared memory become free. Each of PARTS groups of four warps multiplies ROWS rows of
the left operand with the right one's BLOCK of rows, says when it has read a stage, and ends with the tail. Barriers in shared memory pass the
stages on. So loads never wait for a tail, and with two parts, or two programs on a multiprocessor, one's tail runs while the other multiplies. The
tile is turned to rows of 16 bytes a thread before it is stored: stored as the tensor cores leave it, 8192 cubed takes 15% longer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from ..gluon.program import Box, Launch
from ..gluon.template import GluonTemplate, swapped
from .problem import Device, Problem, tiles
from .tail import Tail, indented
from .weights import expanded

__all__ = ["HopperConfig", "Loop", "hopper_template", "is_legal", "launch_constants", "useful"]


@dataclass(frozen=True)
class HopperConfig:
    """Rows of a part of a tile, parts, rows of the right operand, pipeline stages, programs that share a multiprocessor, tile rows that share a run
    through the right operand (for L2).
    """

    rows: int
    parts: int
    columns: int
    stages: int
    programs: int = 1
    group: int = 8

    @property
    def max_registers(self) -> int | None:
        """Registers that the kernel is compiled for, where two programs have to fit; the warps that multiply take most of those of the one that loads."""
        return None if self.programs == 1 else 65536 // (self.programs * 128 * (self.parts + 1))


@dataclass(frozen=True)
class Loop:
    """A main loop. name: of its kernels. text: Gluon statements, from the place of a tile to `dot` [ROWS, COLUMNS], int32 or float32, in layout L.

    left, right: boxes of one step, of 0 rows; their rows are the config's. steps: boxes per trip of the loop, so that K is covered by whole trips.
    transposed: whether the weight is the left operand, so that the tile lies transposed. operands: that the loop reads besides a and b.
    functions: of its own. instruction_k: K of one tensor-core instruction. unpack: see Launch.
    """

    name: str
    text: str
    left: Box
    right: Box
    k: int
    instruction_k: int = 32
    steps: int = 1
    transposed: bool = False
    operands: tuple[str, ...] = ()
    functions: str = ""
    unpack: bool = False

    def stage_bytes(self, config: HopperConfig) -> int:
        """Bytes of shared memory of one stage."""
        left = config.rows * config.parts * self.left.columns * self.left.element.itemsize
        return left + config.columns * self.right.columns * self.right.element.itemsize

    def shared_memory(self, config: HopperConfig) -> int:
        """Bytes of shared memory that a program takes: stages, barriers, and what turning the tile around takes for each part."""
        turned = config.parts * config.rows * config.columns * WIDEST // 2
        return self.stage_bytes(config) * config.stages + turned + 1024


WIDEST = 2
"""Bytes of the widest element that is stored."""
RESERVED = 1024
"""Bytes of shared memory that every block takes for itself."""


def is_legal(loop: Loop, config: HopperConfig, problem: Problem, device: Device, tail: Tail) -> bool:
    """Whether the device runs that many programs at once on a multiprocessor, and descriptors can name the operands.

    A tail that sums tiles for a zero point, stores scales of its own, or float32 (whose erf spills, and whose tiles take twice the room) is another
    template's.
    """
    fits = config.programs * (loop.shared_memory(config) + RESERVED) <= device.shared_memory + RESERVED
    whole = all(rows % config.columns == 0 for rows in problem.side_by_side)
    plain = tail.fast and tail.block_size is None and not tail.loop_lines()
    return fits and whole and plain and device.warpgroups and problem.tma and problem.static_k is not None


def useful(loop: Loop, config: HopperConfig, problem: Problem) -> bool:
    """Whether tiles are not mostly padding."""
    high, wide = config.rows * config.parts, config.columns
    block_m, block_n = (wide, high) if loop.transposed else (high, wide)
    return tiles(problem, block_m, block_n) * block_m * block_n < 2 * problem.m * problem.n


_MODULE = """from triton.experimental import gluon
from triton.experimental.gluon import language as tl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra import libdevice

N = tl.constexpr(ALL_ROWS)
K = tl.constexpr({{size("A", 1)}})
ROWS = tl.constexpr({{ROWS}})
PARTS = tl.constexpr({{PARTS}})
COLUMNS = tl.constexpr({{COLUMNS}})
STAGES = tl.constexpr({{STAGES}})
GROUP = tl.constexpr({{GROUP}})
PROGRAMS = tl.constexpr({{PROGRAMS}})
TRIPS = tl.constexpr({{TRIPS}})
STEPS = tl.constexpr(STEPS_A_TRIP)
LEFT_STEP = tl.constexpr(LEFT_COLUMNS)
RIGHT_STEP = tl.constexpr(RIGHT_COLUMNS)
BYTES = tl.constexpr({{BYTES}})
L = tl.constexpr(
    tl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, {{INSTRUCTION_N}}, INSTRUCTION_K])
)
STORED = tl.constexpr(tl.BlockedLayout([1, 8], STORED_THREADS, [4, 1], [1, 0]))


@gluon.jit
def place(tile, grid_rows, grid_columns):
    width = GROUP * grid_columns
    first = tile // width * GROUP
    height = min(grid_rows - first, GROUP)
    return first + tile % width % height, tile % width // height


@gluon.jit
def advance(stage, phase):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase
FUNCTIONS

@gluon.jit
def load(a_tiles, B_TILES, left_boxes, right_boxes, ready, free, M):
    grid_rows = tl.cdiv(LEFT_ROWS, ROWS * PARTS)
    grid_columns = tl.cdiv(RIGHT_ROWS, COLUMNS)
    stage = 0
    phase = 1
    for tile in range(tl.program_id(0), grid_rows * grid_columns, tl.num_programs(0)):
        row, column = place(tile, grid_rows, grid_columns)
        first_right = column * COLUMNS
PICK_TILES
        for step in range(0, TRIPS * STEPS):
            mbarrier.wait(free.index(stage), phase)
            mbarrier.expect(ready.index(stage), BYTES)
            for part in tl.static_range(PARTS):
                first_left = (row * PARTS + part) * ROWS
                tma.async_copy_global_to_shared(
                    LEFT, [first_left, step * LEFT_STEP], ready.index(stage), left_boxes.index(stage * PARTS + part)
                )
            tma.async_copy_global_to_shared(RIGHT, [first_right, step * RIGHT_STEP], ready.index(stage), right_boxes.index(stage))
            stage, phase = advance(stage, phase)


@gluon.jit
def multiply(POINTERS, left_boxes, right_boxes, ready, free, OUT, M, PART: tl.constexpr):
    grid_rows = tl.cdiv(LEFT_ROWS, ROWS * PARTS)
    grid_columns = tl.cdiv(RIGHT_ROWS, COLUMNS)
    stage = 0
    phase = 0
    for tile in range(tl.program_id(0), grid_rows * grid_columns, tl.num_programs(0)):
        row, column = place(tile, grid_rows, grid_columns)
        first_left = (row * PARTS + PART) * ROWS
        first_right = column * COLUMNS
        rl = first_left + tl.arange(0, ROWS, layout=tl.SliceLayout(1, L))
        rr = first_right + tl.arange(0, COLUMNS, layout=tl.SliceLayout(0, L))
        LEFT_INDEX = rl
        RIGHT_INDEX = rr
PICK_VECTORS
        ram = tl.where(rm < M, rm, 0)
        rbn = LOCAL_COLUMNS
LOOP
TAIL
STORE


@gluon.jit(do_not_specialize=["M"])
def kernel(a_tiles, B_TILES, POINTERS, OUT, M):
    left_boxes = tl.allocate_shared_memory(LEFT.dtype, [STAGES * PARTS, ROWS, LEFT_STEP], LEFT.layout)
    right_boxes = tl.allocate_shared_memory(RIGHT_0.dtype, [STAGES, COLUMNS, RIGHT_STEP], RIGHT_0.layout)
    ready = tl.allocate_shared_memory(tl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = tl.allocate_shared_memory(tl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in tl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=PARTS)
    tl.warp_specialize(
        [
{% for part in range(PARTS | int) %}
            (multiply, (POINTERS, left_boxes, right_boxes, ready, free, OUT, M, {{part}})),
{% endfor %}
            (load, (a_tiles, B_TILES, left_boxes, right_boxes, ready, free, M)),
        ],
        [{{"4, " if PARTS | int == 2}}1],
        [{{"240, " if PARTS | int == 2}}24],
    )
"""

_STORE = """y = tl.convert_layout(y.to(OUT.dtype.element_ty), STORED)
sm = first_left + tl.arange(0, ROWS, layout=tl.SliceLayout(1, STORED))
sn = first_right + tl.arange(0, COLUMNS, layout=tl.SliceLayout(0, STORED))
tl.store(OUT + sm.to(tl.int64)[:, None] * N + sn[None, :], y, mask=(sm < M)[:, None] & (sn < N)[None, :])"""
_STORE_TRANSPOSED = """y = tl.convert_layout(tl.permute(y.to(OUT.dtype.element_ty), (1, 0)), STORED)
sm = first_right + tl.arange(0, COLUMNS, layout=tl.SliceLayout(1, STORED))
sn = first_left + tl.arange(0, ROWS, layout=tl.SliceLayout(0, STORED))
tl.store(OUT + sm.to(tl.int64)[:, None] * N + sn[None, :], y, mask=(sm < M)[:, None] & (sn < N)[None, :])"""


def _tail_statements(tail: Tail, transposed: bool) -> list[str]:
    """The tail's, as Gluon has them: a constant is a scalar by itself."""
    lines = [re.sub(r"tl\.full\(\(\), (\w+), tl\.float32\)", r"tl.to_tensor({{\1}})", line) for line in tail.statements()]
    return swapped(lines) if transposed else lines


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
    local_tile = [] if weights.count == 1 else ["first_right -= first_column"]
    left, right = ("b_tiles", "a_tiles") if loop.transposed else ("a_tiles", "b_tiles")
    parts = {
        "ALL_ROWS": weights.rows,
        "STEPS_A_TRIP": str(loop.steps),
        "LEFT_COLUMNS": str(loop.left.columns),
        "RIGHT_COLUMNS": str(loop.right.columns),
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
        "POINTERS, ": "".join(f"{each}, " for each in vectors),
        "LOOP": indented(loop.text.splitlines(), 8),
        "TAIL": indented(_tail_statements(tail, loop.transposed), 8),
        "STORE": indented((_STORE_TRANSPOSED if loop.transposed else _STORE).splitlines(), 8),
    }
    return re.sub(r"\b(?:POINTERS, |(?:%s)\b)" % "|".join(name for name in parts if name != "POINTERS, "), lambda match: parts[match.group()], _MODULE)


def hopper_template(loop: Loop, tail: Tail) -> GluonTemplate:
    """The template of a main loop with that tail."""

    def launch(operands: Any, layout: Any, constants: dict[str, Any]) -> Launch:
        high, wide = constants["ROWS"] * constants["PARTS"], constants["COLUMNS"]
        a_box, b_box = replace(loop.left, rows=constants["ROWS"]), replace(loop.right, rows=wide)
        if loop.transposed:
            a_box, b_box = b_box, a_box
        others = operands[1 + tail.weights.count :]
        return Launch(
            boxes=(a_box, *[b_box] * tail.weights.count),
            arguments=tuple(str(each).removeprefix("torch.") for each in (*(box.get_dtype() for box in others), layout.dtype)),
            tile=(wide, high) if loop.transposed else (high, wide),
            columns=int(layout.size[1]),
            programs=constants["PROGRAMS"],
            max_registers=constants["MAX_REGISTERS"],
            unpack=loop.unpack,
        )

    return GluonTemplate(_source(loop, tail), _names(loop, tail), launch)


def launch_constants(loop: Loop, config: HopperConfig, problem: Problem) -> dict[str, Any]:
    """A config as the constants of a kernel."""
    assert problem.static_k is not None
    return {
        "ROWS": config.rows,
        "PARTS": config.parts,
        "COLUMNS": config.columns,
        "STAGES": config.stages,
        "GROUP": config.group,
        "PROGRAMS": config.programs,
        "MAX_REGISTERS": config.max_registers,
        "TRIPS": -(-problem.static_k // (loop.k * loop.steps)),
        "BYTES": loop.stage_bytes(config),
        "INSTRUCTION_N": min(config.columns, 128 if loop.instruction_k == 32 else 256),
    }
