"""Device functions: the steps along K of which a product is made."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import MAGIC, MAGIC_BITS, nibbles_float, nibbles_int8


@triton.jit
def load_w(pointers, first, size, rk, EVEN: tl.constexpr):
    """A tile of weights [rows, k], of rows with `size` columns of which it begins at `first`; zeros past them."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=(rk < size - first)[None, :], other=0)


@triton.jit
def load_x(pointers, first, size, rk, EVEN: tl.constexpr):
    """A tile of activations [k, columns], likewise."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=(rk < size - first)[:, None], other=0)


@triton.jit
def start(ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """The accumulator of a product. WHOLE: one int32 dot over all of K; else float32, to which each step adds its dot times its scales."""
    return tl.zeros((ROWS, COLUMNS), tl.int32 if WHOLE else tl.float32)


@triton.jit
def joined(even, odd):
    """[rows, k] of even and of odd k as one operand [rows, 2 k], all of the first before all of the second: as the registers have them."""
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def dot_of(w, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INT4: tl.constexpr, INT8_X: tl.constexpr, PTX: tl.constexpr):
    """float32 dot of a step of int8 or (INT4) packed weights; with INT4 and INT8_X 16 times it."""
    if INT8_X:
        if INT4:
            even, odd = nibbles_int8(w, PTX)
            w = joined(even, odd)
        dot = tl.dot(w, x, tl.full((ROWS, COLUMNS), MAGIC_BITS, tl.int32), out_dtype=tl.int32)
        result = dot.to(tl.float32, bitcast=True) - MAGIC
    else:
        even, odd = nibbles_float(w, tl.bfloat16 if x.dtype == tl.float32 else x.dtype, PTX)
        w = joined(even, odd)
        result = tl.zeros((ROWS, COLUMNS), tl.float32)
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
def add_step(
    acc,
    w,
    x,
    w_scale,
    group,
    groups,
    x_scale,
    GROUPS_A_STEP: tl.constexpr,
    WHOLE: tl.constexpr,
    INT4: tl.constexpr,
    INT8_X: tl.constexpr,
    PTX: tl.constexpr,
):
    """acc plus one step along K.

    w_scale: where INT4, pointers [rows] to the scales of a row's `groups` groups of K, of which the step's first is `group`. x_scale: [1, columns] of
    the activation in this step, or 1.0.
    """
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    if WHOLE:
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
    elif not INT4:
        acc += dot_of(w, x, ROWS, COLUMNS, INT4, INT8_X, PTX) * x_scale
    elif GROUPS_A_STEP == 1:
        scale = tl.load(w_scale + group)[:, None] * x_scale
        acc += dot_of(w, x, ROWS, COLUMNS, INT4, INT8_X, PTX) * scale
    else:
        HALF: tl.constexpr = x.shape[0] // 2
        for i in tl.static_range(GROUPS_A_STEP):
            # The tensor cores multiply 32 values at once, and a group of 32 has 16 of each parity: all others are zeroed.
            mine = (tl.arange(0, 2 * HALF) % HALF // (HALF // GROUPS_A_STEP) == i)[:, None]
            scale = tl.load(w_scale + tl.where(group + i < groups, group + i, 0))[:, None] * x_scale
            acc += dot_of(w, tl.where(mine, x, 0.0).to(x.dtype), ROWS, COLUMNS, INT4, INT8_X, PTX) * scale
    return acc
