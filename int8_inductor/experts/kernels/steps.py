"""Device functions: the steps along K of which a product is made."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import nibbles_float, nibbles_int8


@triton.jit
def load_w(pointers, first, size, rk, EVEN: tl.constexpr):
    """A tile of weights [rows, k], of rows with `size` columns of which it begins at `first`; zeros past them."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=(rk < size - first)[None, :], other=0)


@triton.jit
def load_x(pointers, first, size, rk, EVEN: tl.constexpr):
    """A tile of activations [k, columns], likewise."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=(rk < size - first)[:, None], other=0)


@triton.jit
def joined(even, odd):
    """[rows, k] of even and of odd k as one operand [rows, 2 k], all of the first before all of the second: as the registers have them."""
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def dot_of(w, x, INT4: tl.constexpr, INT8_X: tl.constexpr, PTX: tl.constexpr):
    """float32 dot of a step of int8 or (INT4) packed weights; with INT4 and INT8_X 16 times it."""
    if INT8_X:
        if INT4:
            even, odd = nibbles_int8(w, PTX)
            w = joined(even, odd)
        result = tl.dot(w, x, out_dtype=tl.int32).to(tl.float32)
    else:
        even, odd = nibbles_float(w, tl.bfloat16 if x.dtype == tl.float32 else x.dtype, PTX)
        w = joined(even, odd)
        result = tl.zeros((w.shape[0], x.shape[1]), tl.float32)
        if x.dtype == tl.float32:
            # A float32 is the sum of three bfloat16, and an int4 value is one: three products are as exact as float32's.
            for _ in tl.static_range(3):
                part = x.to(tl.bfloat16)
                result = tl.dot(w, part, result)
                x -= part.to(tl.float32)
        else:
            result = tl.dot(w, x, result)
    return result


@triton.jit
def scales_of(pointers, first, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """COUNT scales of each row from its scale `first` on, [rows, COUNT] or, for one, [rows]; `pointers` [rows] are those of a row's first of SIZE.
    What is past the last is another's.
    """
    if COUNT == 1:
        scales = tl.load(pointers + tl.minimum(first, SIZE - 1))
    else:
        scales = tl.load(pointers[:, None] + tl.minimum(first + tl.arange(0, COUNT), SIZE - 1)[None, :])
    return scales


@triton.jit
def multiply(
    w,
    w_scale,
    x,
    x_scale,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    X_BLOCK: tl.constexpr,
    INT4: tl.constexpr,
    INT8_X: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The products of several weights with one activation, a tuple of tiles [rows, BLOCK_M]: float32, or int32 where no scale changes along K.

    w: a tuple of pointers [rows, 1] to rows of K columns, or K / 2 packed ones (INT4); w_scale: where INT4, as many of pointers [rows] to the scales
    of a row's K / GROUP groups, which are applied. x: pointers [1, BLOCK_M] to rows of K columns, where INT4 even before odd ones; x_scale: where
    X_BLOCK, a multiple of BLOCK_K, is not 0, pointers [BLOCK_M] to a scale for each X_BLOCK columns, which are applied.

    Tiles of 64 rows one after the other need fewer registers than one of 128, and so let more programs share a multiprocessor; which matters, as a
    program waits for each of its int8 products. Scales are loaded a step before their use.
    """
    PACK: tl.constexpr = 2 if INT4 else 1
    COLUMNS: tl.constexpr = K // PACK
    STEP: tl.constexpr = BLOCK_K // PACK
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    GROUPS: tl.constexpr = K // GROUP
    MASKED: tl.constexpr = (BLOCK_K // GROUP if BLOCK_K > GROUP else 1) if INT4 else 1
    EVEN: tl.constexpr = K % BLOCK_K == 0
    WHOLE: tl.constexpr = not INT4 and X_BLOCK == 0
    HALF: tl.constexpr = BLOCK_K // 2
    X_BLOCKS: tl.constexpr = (K + X_BLOCK - 1) // X_BLOCK if X_BLOCK else 1
    rw = tl.arange(0, STEP)
    rx = tl.arange(0, BLOCK_K)
    x_tile = x + (rx % STEP + rx // STEP * COLUMNS)[:, None]
    w_tiles = ()
    acc = ()
    next_w_scale = ()
    for i in tl.static_range(len(w)):
        w_tiles += (w[i] + rw[None, :],)
        acc += (tl.zeros((w[i].shape[0], BLOCK_M), tl.int32 if WHOLE else tl.float32),)
        if INT4:
            next_w_scale += (scales_of(w_scale[i], 0, GROUPS, MASKED),)
    next_x_scale = tl.load(x_scale) if X_BLOCK > 0 else 0.0
    for step in range(STEPS):
        k = step * STEP
        ahead = tl.minimum(step + 1, STEPS - 1)
        this_w_scale = next_w_scale
        next_w_scale = ()
        if INT4:
            for i in tl.static_range(len(w)):
                next_w_scale += (scales_of(w_scale[i], ahead * BLOCK_K // GROUP, GROUPS, MASKED),)
        this_x_scale = next_x_scale
        if X_BLOCK > 0:
            next_x_scale = scales_of(x_scale, ahead * BLOCK_K // X_BLOCK, X_BLOCKS, 1)
        values = load_x(x_tile + k, k, COLUMNS, rx % STEP, EVEN)
        sums = ()
        for i in tl.static_range(len(w)):
            weights = load_w(w_tiles[i] + k, k, COLUMNS, rw, EVEN)
            total = acc[i]
            if WHOLE:
                total = tl.dot(weights, values, total, out_dtype=tl.int32)
            else:
                scale_w = (1.0,)
                if INT4:
                    scale_w = (this_w_scale[i],)
                    if MASKED == 2:
                        scale_w = tl.split(this_w_scale[i])
                for j in tl.static_range(MASKED):
                    mine = values
                    if MASKED > 1:
                        # The tensor cores multiply 32 values at once, and a group of 32 has 16 of each parity: all others are zeroed.
                        member = rx % HALF // (HALF // MASKED) == j
                        mine = tl.where(member[:, None], mine, 0.0).to(mine.dtype)
                    dot = dot_of(weights, mine, INT4, INT8_X, PTX)
                    if INT4 and X_BLOCK > 0:
                        dot *= scale_w[j][:, None] * this_x_scale[None, :]
                    elif INT4:
                        dot *= scale_w[j][:, None]
                    else:
                        dot *= this_x_scale[None, :]
                    total += dot
            sums += (total,)
        acc = sums
    return acc
