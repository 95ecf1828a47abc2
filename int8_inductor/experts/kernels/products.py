"""The products of a layer of experts, and what follows each before it is stored."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import NIBBLE_SCALE, largest, scale_of, to_int8
from .steps import multiply


@triton.jit
def _place(N_TILES: tl.constexpr, GROUP_M: tl.constexpr):
    """This program's tile of rows and of columns. Of GROUP_M tiles of rows all take a tile of columns before any takes the next, so that weights that
    do not fit into the L2 are read once for all of them.
    """
    tiles = tl.num_programs(0) // N_TILES
    group = tl.program_id(0) // (GROUP_M * N_TILES)
    place = tl.program_id(0) % (GROUP_M * N_TILES)
    height = tl.minimum(tiles - group * GROUP_M, GROUP_M)
    return group * GROUP_M + place % height, place // height


@triton.jit
def _pairs(TILE_FIRST, ENDS, ORDER, tile, expert, BLOCK_M: tl.constexpr):
    """The pairs of a tile, and which of them are there; those that are not repeat the first."""
    first = tl.load(TILE_FIRST + tile)
    position = first + tl.arange(0, BLOCK_M)
    live = position < tl.load(ENDS + expert)
    return tl.load(ORDER + tl.where(live, position, first)), live


@triton.jit
def gate_up(
    X,
    X_SCALE,
    W,
    W_SCALE,
    H,
    H_SCALE,
    ORDER,
    ENDS,
    TILE_EXPERT,
    TILE_FIRST,
    K: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    TOP_K: tl.constexpr,
    INT4: tl.constexpr,
    INT8_X: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PTX: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[pair] = activation(x[token] @ gate[expert].T) * (x[token] @ up[expert].T): int8 with a scale for each BLOCK_N columns, or X's dtype.

    X [M, K]: int8 (INT8_X) with X_SCALE [M], or floats. W [E, 2 INNER, K], gate first, or packed [E, 2 INNER, K / 2]; W_SCALE
    [E, 2 INNER, K / GROUP]. H [pairs, INNER], split into even and odd columns where INT4; H_SCALE [pairs, ceil(INNER / BLOCK_N)]. The BLOCK_N columns
    are computed in PARTS.
    """
    N_TILES: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    tile, pid_n = _place(N_TILES, GROUP_M)
    expert = tl.load(TILE_EXPERT + tile)
    if expert < 0:
        return
    pair, live = _pairs(TILE_FIRST, ENDS, ORDER, tile, expert, BLOCK_M)
    token = (pair // TOP_K).to(tl.int64)
    COLUMNS: tl.constexpr = K // 2 if INT4 else K
    GROUPS: tl.constexpr = K // GROUP
    ROWS: tl.constexpr = BLOCK_N // PARTS
    HALF: tl.constexpr = BLOCK_N // 2
    weights = W + expert.to(tl.int64) * (2 * INNER * COLUMNS)
    weight_scales = W_SCALE + expert.to(tl.int64) * (2 * INNER * GROUPS)
    inside = ()
    column = ()  # where each row's result is stored
    w = ()
    w_scale = ()
    for i in tl.static_range(PARTS):
        rn = i * ROWS + tl.arange(0, ROWS)
        if INT4:
            # Even columns in the upper half of the tile and odd ones in the lower: each is stored as one run.
            half = pid_n * HALF + rn % HALF
            column += (half + rn // HALF * (INNER // 2),)
            inside += (half < INNER // 2,)
            row = tl.where(inside[i], 2 * half + rn // HALF, 0)
        else:
            rn += pid_n * BLOCK_N
            column += (rn,)
            inside += (rn < INNER,)
            row = tl.where(inside[i], rn, 0)
        gate = weights + row.to(tl.int64)[:, None] * COLUMNS
        gate_scale = weight_scales + row * GROUPS
        w += (gate, gate + INNER * COLUMNS)
        w_scale += (gate_scale, gate_scale + INNER * GROUPS)
    sums = multiply(w, w_scale, X + token[None, :] * K, X_SCALE, K, GROUP, 0, INT4, INT8_X, PTX, BLOCK_M, BLOCK_K)
    h = ()
    for i in tl.static_range(PARTS):
        g = sums[2 * i].to(tl.float32)
        u = sums[2 * i + 1].to(tl.float32)
        if INT8_X:
            row_scale = tl.load(X_SCALE + token)[None, :]
            g *= row_scale
            u *= row_scale
        if not INT4:
            g *= tl.load(w_scale[2 * i])[:, None]
            u *= tl.load(w_scale[2 * i + 1])[:, None]
        elif INT8_X:
            g *= NIBBLE_SCALE
            u *= NIBBLE_SCALE
        h += (ACTIVATION(g) * u,)
    inverse = 1.0
    if INT8_X:
        amax = tl.zeros((BLOCK_M,), tl.float32)
        for i in tl.static_range(PARTS):
            amax = tl.maximum(amax, largest(tl.where(inside[i][:, None], h[i], 0.0), 0))
        scale, inverse = scale_of(amax, False)
        tl.store(H_SCALE + pair.to(tl.int64) * N_TILES + pid_n, scale, mask=live)
    for i in tl.static_range(PARTS):
        q = to_int8(h[i] * inverse[None, :], PTX) if INT8_X else h[i].to(H.dtype.element_ty)
        tl.store(H + pair.to(tl.int64)[:, None] * INNER + column[i][None, :], tl.trans(q), mask=live[:, None] & inside[i][None, :])


@triton.jit
def down(
    H,
    H_SCALE,
    W,
    W_SCALE,
    Y,
    ROUTING,
    ORDER,
    ENDS,
    TILE_EXPERT,
    TILE_FIRST,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    H_BLOCK: tl.constexpr,
    INT4: tl.constexpr,
    INT8_X: tl.constexpr,
    PTX: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[pair] = routing[pair] * (h[pair] @ w[expert].T), [pairs, N]. H [pairs, K] and H_SCALE [pairs, ceil(K / H_BLOCK)] as gate_up stores them.

    W [E, N, K], or packed [E, N, K / 2]; W_SCALE [E, N, K / GROUP]. The BLOCK_N columns are computed in PARTS.
    """
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile, pid_n = _place(N_TILES, GROUP_M)
    expert = tl.load(TILE_EXPERT + tile)
    if expert < 0:
        return
    pair, live = _pairs(TILE_FIRST, ENDS, ORDER, tile, expert, BLOCK_M)
    COLUMNS: tl.constexpr = K // 2 if INT4 else K
    GROUPS: tl.constexpr = K // GROUP
    ROWS: tl.constexpr = BLOCK_N // PARTS
    weights = W + expert.to(tl.int64) * (N * COLUMNS)
    weight_scales = W_SCALE + expert.to(tl.int64) * (N * GROUPS)
    w = ()
    w_scale = ()
    for i in tl.static_range(PARTS):
        rn = pid_n * BLOCK_N + i * ROWS + tl.arange(0, ROWS)
        row = tl.where(rn < N, rn, 0)
        w += (weights + row.to(tl.int64)[:, None] * COLUMNS,)
        w_scale += (weight_scales + row * GROUPS,)
    row_of = pair.to(tl.int64)
    h_scale = H_SCALE + row_of * ((K + H_BLOCK - 1) // H_BLOCK)
    X_BLOCK: tl.constexpr = H_BLOCK if INT8_X else 0
    sums = multiply(w, w_scale, H + row_of[None, :] * K, h_scale, K, GROUP, X_BLOCK, INT4, INT8_X, PTX, BLOCK_M, BLOCK_K)
    routing = tl.load(ROUTING + pair).to(tl.float32)
    if INT4 and INT8_X:
        routing *= NIBBLE_SCALE
    for i in tl.static_range(PARTS):
        y = sums[i]
        if not INT4:
            y *= tl.load(w_scale[i])[:, None]
        y = tl.trans(y * routing[None, :]).to(Y.dtype.element_ty)
        rn = pid_n * BLOCK_N + i * ROWS + tl.arange(0, ROWS)
        tl.store(Y + row_of[:, None] * N + rn[None, :], y, mask=live[:, None] & (rn < N)[None, :])


@triton.jit
def grouped(
    A,
    A_SCALE,
    B,
    B_SCALE,
    Y,
    ENDS,
    TILE_EXPERT,
    TILE_FIRST,
    N: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    A_SCALE_STEP: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = a @ b[expert].T with scales, for rows of `a` that are sorted by expert already: int8 A [S, K], B [E, N, K], B_SCALE [E, N], Y [S, N].

    A_SCALE_STEP: 1 for a scale a row, 0 for one of the whole. Rows past the last expert's are tiles of an expert E, and become zeros.
    """
    tile, pid_n = _place((N + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    owner = tl.load(TILE_EXPERT + tile)
    if owner < 0:
        return
    first = tl.load(TILE_FIRST + tile)
    rm = first + tl.arange(0, BLOCK_M)
    live = rm < tl.load(ENDS + owner)
    ram = tl.where(live, rm, first).to(tl.int64)
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rn < N
    row = tl.where(inside, rn, 0)
    expert = tl.minimum(owner, E - 1).to(tl.int64)
    b = B + expert * (N * K) + row.to(tl.int64)[:, None] * K
    (dot,) = multiply((b,), (), A + ram[None, :] * K, A_SCALE, K, K, 0, False, True, False, BLOCK_M, BLOCK_K)
    y = dot.to(tl.float32) * tl.load(A_SCALE + ram * A_SCALE_STEP)[None, :] * tl.load(B_SCALE + expert * N + row)[:, None]
    y = tl.where(owner < E, y, 0.0)
    tl.store(Y + rm.to(tl.int64)[:, None] * N + rn[None, :], tl.trans(y).to(Y.dtype.element_ty), mask=live[:, None] & inside[None, :])
