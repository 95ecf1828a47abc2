"""What comes before and after the products: activations quantized, pairs sorted by expert and cut into tiles, results summed up."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import largest, scale_of, to_int8


@triton.jit
def prepare(
    X,
    Q,
    X_SCALE,
    INDEX,
    COUNTS,
    RANK,
    K: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    HALF: tl.constexpr,
    SPLIT: tl.constexpr,
    INT8_X: tl.constexpr,
    PTX: tl.constexpr,
):
    """One token a program: quantize its row of X [M, K] (INT8_X), with a scale X_SCALE [M], split it into even and odd columns (SPLIT), and count
    it at its experts.

    The int8 is that of reference.quantize_activation on a CPU, bit for bit.

    INDEX [M, TOP_K]: experts; one that is not in [0, E) is none. COUNTS [E], zeros before: how many pairs an expert has. RANK [M, TOP_K]: a pair's
    place among its expert's pairs, in no particular order, as no pair's result depends on its place; -1 where there is no expert.
    HALF, SLOTS: powers of 2 that cover half of K, and TOP_K.
    """
    token = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    expert = tl.load(INDEX + token * TOP_K + slot, mask=slot < TOP_K, other=-1)
    chosen = (expert >= 0) & (expert < E)
    rank = tl.atomic_add(COUNTS + tl.where(chosen, expert, 0), 1, mask=chosen, sem="relaxed")
    tl.store(RANK + token * TOP_K + slot, tl.where(chosen, rank, -1), mask=slot < TOP_K)
    column = tl.arange(0, 2 * HALF)
    x = tl.load(X + token.to(tl.int64) * K + column, mask=column < K, other=0.0)
    if INT8_X:
        x = x.to(tl.float32)
        scale, inverse = scale_of(largest(x, 0), True)
        tl.store(X_SCALE + token, scale)
        x = to_int8(x * inverse, PTX)
    base = Q + token.to(tl.int64) * K
    if SPLIT:
        even, odd = tl.split(tl.reshape(x, (HALF, 2)))
        half = tl.arange(0, HALF)
        tl.store(base + half, even, mask=half < K // 2)
        tl.store(base + K // 2 + half, odd, mask=half < K // 2)
    else:
        tl.store(base + column, x, mask=column < K)


@triton.jit
def _cut(counts, T, TILE_EXPERT, TILE_FIRST, E: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr):
    """Store expert (-1: none) and first position of this program's TILES tiles, of T; `counts`: positions of each expert, zero from E on."""
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, 0)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    # A tile is of the expert at which all before it have ended.
    expert = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)
    live = expert < E
    expert = tl.where(live, expert, 0)
    before = tl.gather(tl.cumsum(counts, 0) - counts, expert, 0)
    first = before + (tile - tl.gather(tile_ends - tiles, expert, 0)) * BLOCK_M
    tl.store(TILE_EXPERT + tile, tl.where(live, expert, -1), mask=tile < T)
    tl.store(TILE_FIRST + tile, tl.where(live, first, 0), mask=tile < T)


@triton.jit(do_not_specialize=["S", "T"])
def place(
    INDEX,
    COUNTS,
    RANK,
    ORDER,
    ENDS,
    TILE_EXPERT,
    TILE_FIRST,
    S,
    T,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr,
    TILES: tl.constexpr,
):
    """ORDER [S]: the pairs, sorted by expert. ENDS [E]: where each expert's end. TILE_EXPERT, TILE_FIRST [T]: see _cut. EXPERTS: power of 2 >= E."""
    expert = tl.arange(0, EXPERTS)
    counts = tl.load(COUNTS + expert, mask=expert < E, other=0)
    ends = tl.cumsum(counts, 0)
    if tl.program_id(0) == 0:
        tl.store(ENDS + expert, ends, mask=expert < E)
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    rank = tl.load(RANK + pair, mask=pair < S, other=-1)
    chosen = tl.load(INDEX + pair, mask=rank >= 0, other=0).to(tl.int32)
    tl.store(ORDER + tl.gather(ends - counts, chosen, 0) + rank, pair, mask=rank >= 0)
    _cut(counts, T, TILE_EXPERT, TILE_FIRST, E, BLOCK_M, TILES)


@triton.jit(do_not_specialize=["S", "T"])
def schedule(
    OFFS,
    ENDS,
    TILE_EXPERT,
    TILE_FIRST,
    S,
    T,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
):
    """The same tiles for S rows that are sorted already: OFFS [E], where each expert's rows end. ENDS [E + 1]; rows past the last are of expert E."""
    expert = tl.arange(0, EXPERTS)
    ends = tl.load(OFFS + expert, mask=expert < E, other=S).to(tl.int32)
    ends = tl.where(expert < E, tl.minimum(ends, S), S)
    starts = tl.load(OFFS + expert - 1, mask=(expert > 0) & (expert <= E), other=0).to(tl.int32)
    starts = tl.where(expert <= E, tl.minimum(starts, S), S)
    if tl.program_id(0) == 0:
        tl.store(ENDS + expert, ends, mask=expert <= E)
    _cut(ends - starts, T, TILE_EXPERT, TILE_FIRST, E + 1, BLOCK_M, TILES)


@triton.jit
def combine(Y, INDEX, OUT, N: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[token] = the sum of its pairs' rows of Y [pairs, N], in the order of their slots; a pair without an expert has none."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for slot in range(TOP_K):
        expert = tl.load(INDEX + token * TOP_K + slot)
        y = tl.load(Y + (token * TOP_K + slot) * N + column, mask=column < N, other=0.0).to(tl.float32)
        total += tl.where((expert >= 0) & (expert < E), y, 0.0)
    tl.store(OUT + token * N + column, total.to(OUT.dtype.element_ty), mask=column < N)
