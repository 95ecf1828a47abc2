"""The products of a layer of experts, and what follows each before it is stored."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import NIBBLE_SCALE, scale_of, to_int8
from .steps import add_step, load_w, load_x, start


@triton.jit
def _tile(TILE_EXPERT, TILE_FIRST, ENDS, ORDER, tile, expert, BLOCK_M: tl.constexpr):
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
    X_BLOCK: tl.constexpr,
    INT4: tl.constexpr,
    INT8_X: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[pair] = activation(x[token] @ gate[expert].T) * (x[token] @ up[expert].T): int8 with a scale for each BLOCK_N columns, or X's dtype.

    X [M, K]: int8 (INT8_X) with X_SCALE [M] or, where X_BLOCK is not 0, [M, ceil(K / X_BLOCK)]; or floats. W [E, 2 INNER, K], gate first, or
    packed [E, 2 INNER, K / 2]; W_SCALE [E, 2 INNER, K / GROUP]. H [pairs, INNER], split into even and odd columns where INT4; H_SCALE
    [pairs, ceil(INNER / BLOCK_N)].
    """
    N_TILES: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // N_TILES
    pid_n = tl.program_id(0) % N_TILES
    expert = tl.load(TILE_EXPERT + tile)
    if expert < 0:
        return
    pair, live = _tile(TILE_EXPERT, TILE_FIRST, ENDS, ORDER, tile, expert, BLOCK_M)
    token = pair // TOP_K
    rn = tl.arange(0, BLOCK_N)
    if INT4:
        # Even columns in the upper half of the tile and odd ones in the lower: each is stored as one run.
        rn = 2 * (rn % (BLOCK_N // 2)) + rn // (BLOCK_N // 2)
    rn = pid_n * BLOCK_N + rn
    inside = rn < INNER
    row = tl.where(inside, rn, 0)
    PACK: tl.constexpr = 2 if INT4 else 1
    COLUMNS: tl.constexpr = K // PACK
    STEP: tl.constexpr = BLOCK_K // PACK
    GROUPS: tl.constexpr = K // GROUP
    GROUPS_A_STEP: tl.constexpr = (BLOCK_K // GROUP if BLOCK_K > GROUP else 1) if INT4 else 1
    EVEN: tl.constexpr = K % BLOCK_K == 0
    WHOLE: tl.constexpr = INT8_X and not INT4
    X_BLOCKS: tl.constexpr = (K + X_BLOCK - 1) // X_BLOCK if X_BLOCK else 1
    rk = tl.arange(0, STEP)
    rx = tl.arange(0, BLOCK_K)
    gate_tile = W + expert.to(tl.int64) * (2 * INNER * COLUMNS) + row.to(tl.int64)[:, None] * COLUMNS + rk[None, :]
    up_tile = gate_tile + INNER * COLUMNS
    x_tile = X + token.to(tl.int64)[None, :] * K + (rx % STEP + rx // STEP * COLUMNS)[:, None]
    gate_scale = W_SCALE + expert.to(tl.int64) * (2 * INNER * GROUPS) + row * GROUPS
    up_scale = gate_scale + INNER * GROUPS
    x_scale = X_SCALE + token.to(tl.int64) * X_BLOCKS
    gate = start(BLOCK_N, BLOCK_M, WHOLE)
    up = start(BLOCK_N, BLOCK_M, WHOLE)
    for step in range((K + BLOCK_K - 1) // BLOCK_K):
        k = step * STEP
        gate_w = load_w(gate_tile + k, k, COLUMNS, rk, EVEN)
        up_w = load_w(up_tile + k, k, COLUMNS, rk, EVEN)
        x = load_x(x_tile + k, k, COLUMNS, rx % STEP, EVEN)
        scale = 1.0
        if X_BLOCK > 0:
            scale = tl.load(x_scale + step * BLOCK_K // X_BLOCK)[None, :]
        group = step * GROUPS_A_STEP
        gate = add_step(gate, gate_w, x, gate_scale, group, GROUPS, scale, GROUPS_A_STEP, WHOLE, INT4, INT8_X, PTX)
        up = add_step(up, up_w, x, up_scale, group, GROUPS, scale, GROUPS_A_STEP, WHOLE, INT4, INT8_X, PTX)
    g = gate.to(tl.float32)
    u = up.to(tl.float32)
    if INT8_X and X_BLOCK == 0:
        row_scale = tl.load(x_scale)[None, :]
        g *= row_scale
        u *= row_scale
    if WHOLE:
        g *= tl.load(gate_scale)[:, None]
        u *= tl.load(up_scale)[:, None]
    elif INT8_X:
        g *= NIBBLE_SCALE
        u *= NIBBLE_SCALE
    h = ACTIVATION(g) * u
    if INT8_X:
        h = tl.where(inside[:, None], h, 0.0)
        scale, inverse = scale_of(h, 0, False)
        tl.store(H_SCALE + pair.to(tl.int64) * N_TILES + pid_n, scale, mask=live)
        q = to_int8(h * inverse[None, :], PTX)
    else:
        q = h.to(H.dtype.element_ty)
    column = rn // 2 + rn % 2 * (INNER // 2) if INT4 else rn
    tl.store(H + pair.to(tl.int64)[:, None] * INNER + column[None, :], tl.trans(q), mask=live[:, None] & inside[None, :])


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[pair] = routing[pair] * (h[pair] @ w[expert].T), [pairs, N]. H [pairs, K] and H_SCALE [pairs, ceil(K / H_BLOCK)] as gate_up stores them.

    W [E, N, K], or packed [E, N, K / 2]; W_SCALE [E, N, K / GROUP].
    """
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // N_TILES
    pid_n = tl.program_id(0) % N_TILES
    expert = tl.load(TILE_EXPERT + tile)
    if expert < 0:
        return
    pair, live = _tile(TILE_EXPERT, TILE_FIRST, ENDS, ORDER, tile, expert, BLOCK_M)
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rn < N
    row = tl.where(inside, rn, 0)
    PACK: tl.constexpr = 2 if INT4 else 1
    COLUMNS: tl.constexpr = K // PACK
    STEP: tl.constexpr = BLOCK_K // PACK
    GROUPS: tl.constexpr = K // GROUP
    GROUPS_A_STEP: tl.constexpr = (BLOCK_K // GROUP if BLOCK_K > GROUP else 1) if INT4 else 1
    EVEN: tl.constexpr = K % BLOCK_K == 0
    H_BLOCKS: tl.constexpr = (K + H_BLOCK - 1) // H_BLOCK
    rk = tl.arange(0, STEP)
    rx = tl.arange(0, BLOCK_K)
    w_tile = W + expert.to(tl.int64) * (N * COLUMNS) + row.to(tl.int64)[:, None] * COLUMNS + rk[None, :]
    h_tile = H + pair.to(tl.int64)[None, :] * K + (rx % STEP + rx // STEP * COLUMNS)[:, None]
    w_scale = W_SCALE + expert.to(tl.int64) * (N * GROUPS) + row * GROUPS
    h_scale = H_SCALE + pair.to(tl.int64) * H_BLOCKS
    y = start(BLOCK_N, BLOCK_M, False)
    for step in range((K + BLOCK_K - 1) // BLOCK_K):
        k = step * STEP
        w = load_w(w_tile + k, k, COLUMNS, rk, EVEN)
        h = load_x(h_tile + k, k, COLUMNS, rx % STEP, EVEN)
        scale = 1.0
        if INT8_X:
            scale = tl.load(h_scale + step * BLOCK_K // H_BLOCK)[None, :]
        y = add_step(y, w, h, w_scale, step * GROUPS_A_STEP, GROUPS, scale, GROUPS_A_STEP, False, INT4, INT8_X, PTX)
    if not INT4:
        y *= tl.load(w_scale)[:, None]
    routing = tl.load(ROUTING + pair).to(tl.float32)
    if INT4 and INT8_X:
        routing *= NIBBLE_SCALE
    y *= routing[None, :]
    tl.store(Y + pair.to(tl.int64)[:, None] * N + rn[None, :], tl.trans(y).to(Y.dtype.element_ty), mask=live[:, None] & inside[None, :])


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = a @ b[expert].T with scales, for rows of `a` that are sorted by expert already: int8 A [S, K], B [E, N, K], B_SCALE [E, N], Y [S, N].

    A_SCALE_STEP: 1 for a scale a row, 0 for one of the whole. Rows past the last expert's are tiles of an expert E, and become zeros.
    """
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // N_TILES
    pid_n = tl.program_id(0) % N_TILES
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
    EVEN: tl.constexpr = K % BLOCK_K == 0
    expert = tl.minimum(owner, E - 1).to(tl.int64)
    rk = tl.arange(0, BLOCK_K)
    b_tile = B + expert * (N * K) + row.to(tl.int64)[:, None] * K + rk[None, :]
    a_tile = A + ram[None, :] * K + rk[:, None]
    dot = start(BLOCK_N, BLOCK_M, True)
    for step in range((K + BLOCK_K - 1) // BLOCK_K):
        k = step * BLOCK_K
        b = load_w(b_tile + k, k, K, rk, EVEN)
        a = load_x(a_tile + k, k, K, rk, EVEN)
        dot = tl.dot(b, a, dot, out_dtype=tl.int32)
    y = dot.to(tl.float32) * tl.load(A_SCALE + ram * A_SCALE_STEP)[None, :] * tl.load(B_SCALE + expert * N + row)[:, None]
    y = tl.where(owner < E, y, 0.0)
    tl.store(Y + rm.to(tl.int64)[:, None] * N + rn[None, :], tl.trans(y).to(Y.dtype.element_ty), mask=live[:, None] & inside[None, :])
