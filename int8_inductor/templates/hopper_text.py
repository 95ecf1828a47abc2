"""The text of the kernels for Hopper: a Gluon module, in Jinja; the names in capitals that it does not define are put in by hopper.py."""

from __future__ import annotations

__all__ = ["DEPENDENT_LAUNCH", "LEFT_OPERAND", "MODULE", "STORE", "STORE_TRANSPOSED"]

MODULE = """from triton.experimental import gluon
from triton.experimental.gluon import language as tl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra import libdevice

# Triton 3.9 has renamed it.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

N = tl.constexpr(ALL_ROWS)
K = tl.constexpr({{size("A", 1)}})
ROWS = tl.constexpr({{ROWS}})
PARTS = tl.constexpr({{PARTS}})
COLUMNS = tl.constexpr({{COLUMNS}})
STAGES = tl.constexpr({{STAGES}})
GROUP = tl.constexpr({{GROUP}})
PROGRAMS = tl.constexpr({{PROGRAMS}})
TRIPS = tl.constexpr({{TRIPS}})
STEPS = tl.constexpr({{STEPS}})
SPLITS = tl.constexpr({{SPLITS}})
LEFT_STEP = tl.constexpr(LEFT_COLUMNS)
RIGHT_STEP = tl.constexpr(RIGHT_COLUMNS)
BOXES = tl.constexpr(RIGHT_BOXES)
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
    for tile in range(tl.program_id(0), grid_rows * grid_columns * SPLITS, tl.num_programs(0)):
        row, column = place(tile // SPLITS, grid_rows, grid_columns)
        first_right = column * COLUMNS
        first_step = tile % SPLITS * (TRIPS * STEPS)
PICK_TILES
        for step in range(first_step, first_step + TRIPS * STEPS):
            mbarrier.wait(free.index(stage), phase)
            mbarrier.expect(ready.index(stage), BYTES)
            for part in tl.static_range(PARTS):
                first_left = (row * PARTS + part) * ROWS
                load_box(
                    LEFT, [first_left, step * LEFT_STEP], ready.index(stage), left_boxes.index(stage * PARTS + part)
                )
            for box in tl.static_range(BOXES):
                load_box(
                    RIGHT, [first_right, (step * BOXES + box) * RIGHT_STEP], ready.index(stage), right_boxes.index(stage * BOXES + box)
                )
            stage, phase = advance(stage, phase)


@gluon.jit
def multiply(POINTERS left_boxes, right_boxes, ready, free, turns, OUT, M, PART: tl.constexpr):
    grid_rows = tl.cdiv(LEFT_ROWS, ROWS * PARTS)
    grid_columns = tl.cdiv(RIGHT_ROWS, COLUMNS)
    stage = 0
    phase = 0
    turn = 1 - PART
    for tile in range(tl.program_id(0), grid_rows * grid_columns * SPLITS, tl.num_programs(0)):
        row, column = place(tile // SPLITS, grid_rows, grid_columns)
        first_left = (row * PARTS + PART) * ROWS
        first_right = column * COLUMNS
        rl = first_left + tl.arange(0, ROWS, layout=tl.SliceLayout(1, L))
        rr = first_right + tl.arange(0, COLUMNS, layout=tl.SliceLayout(0, L))
        LEFT_INDEX = rl
        RIGHT_INDEX = rr
PICK_VECTORS
        ram = tl.where(rm < M, rm, 0)
        rbn = LOCAL_COLUMNS
        first_step = tile % SPLITS * (TRIPS * STEPS)
LOOP
{% if SPLITS | int == 1 %}
TAIL
STORE
{% else %}
        width = grid_columns * COLUMNS
        sums = OUT + (tile % SPLITS).to(tl.int64) * (grid_rows * ROWS * PARTS) * width
        tl.store(sums + rl.to(tl.int64)[:, None] * width + rr[None, :], dot)
{% endif %}


{% if SPLITS | int > 1 %}
WIDTH = tl.constexpr({{WIDTH}})
SUMMED = tl.constexpr(tl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))


@gluon.jit(do_not_specialize=["M"])
def finish(SUMS, POINTERS OUT, M):
DEPENDENT_LAUNCH
    grid_rows = tl.cdiv(LEFT_ROWS, ROWS)
    height = tl.cdiv(LEFT_ROWS, ROWS * PARTS) * (ROWS * PARTS)
    width = tl.cdiv(RIGHT_ROWS, COLUMNS) * COLUMNS
    for tile in range(tl.program_id(0), grid_rows * tl.cdiv(RIGHT_ROWS, WIDTH), tl.num_programs(0)):
        first_left = tile % grid_rows * ROWS
        first_right = tile // grid_rows * WIDTH
        rl = first_left + tl.arange(0, ROWS, layout=tl.SliceLayout(1, SUMMED))
        rr = first_right + tl.arange(0, WIDTH, layout=tl.SliceLayout(0, SUMMED))
        LEFT_INDEX = rl
        RIGHT_INDEX = rr
        ram = tl.where(rm < M, rm, 0)
        rbn = LOCAL_COLUMNS
        sums = SUMS + rl.to(tl.int64)[:, None] * width + rr[None, :]
        dot = tl.load(sums)
        for split in tl.static_range(1, SPLITS):
            dot += tl.load(sums + split * height.to(tl.int64) * width)
TAIL
FINISHED


{% endif %}
@gluon.jit(do_not_specialize=["M"])
def kernel(a_tiles, B_TILES, POINTERS OUT, M):
    left_boxes = tl.allocate_shared_memory(LEFT.dtype, [STAGES * PARTS, ROWS, LEFT_STEP], LEFT.layout)
    right_boxes = tl.allocate_shared_memory(RIGHT_0.dtype, [STAGES * BOXES, COLUMNS, RIGHT_STEP], RIGHT_0.layout)
    ready = tl.allocate_shared_memory(tl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = tl.allocate_shared_memory(tl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = tl.allocate_shared_memory(tl.int64, [2, 1], mbarrier.MBarrierLayout())
    for part in tl.static_range(2):
        mbarrier.init(turns.index(part), count=1)
    for stage in tl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=PARTS)
DEPENDENT_LAUNCH
    tl.warp_specialize(
        [
{% for part in range(PARTS | int) %}
            (multiply, (POINTERS left_boxes, right_boxes, ready, free, turns, OUT, M, {{part}})),
{% endfor %}
            (load, (a_tiles, B_TILES, left_boxes, right_boxes, ready, free, M)),
        ],
        [{{"4, " if PARTS | int == 2}}1],
        [{{"240, " if PARTS | int == 2}}24],
    )
"""

DEPENDENT_LAUNCH = """{% if DEPENDENT is defined %}
    tl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
{% endif %}"""

STORE = """y = tl.convert_layout(y.to(OUT.dtype.element_ty), STORED)
sm = first_left + tl.arange(0, ROWS, layout=tl.SliceLayout(1, STORED))
sn = first_right + tl.arange(0, COLUMNS, layout=tl.SliceLayout(0, STORED))
tl.store(OUT + sm.to(tl.int64)[:, None] * N + sn[None, :], y, mask=(sm < M)[:, None] & (sn < N)[None, :])"""
STORE_TRANSPOSED = """y = tl.convert_layout(tl.permute(y.to(OUT.dtype.element_ty), (1, 0)), STORED)
sm = first_right + tl.arange(0, COLUMNS, layout=tl.SliceLayout(1, STORED))
sn = first_left + tl.arange(0, ROWS, layout=tl.SliceLayout(0, STORED))
tl.store(OUT + sm.to(tl.int64)[:, None] * N + sn[None, :], y, mask=(sm < M)[:, None] & (sn < N)[None, :])"""

LEFT_OPERAND = """

@gluon.jit
def left_operand(pairs, dtype: tl.constexpr):
    # int32 of two floats each, where the tensor cores want them -> 64 rows and columns of floats, as a left operand in registers.
    low = (pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.convert_layout(tl.reshape(tl.join(low, high), [64, 64]), tl.DotOperandLayout(0, L, 2), assert_trivial=True)
"""
