"""Device functions: the activations of EPILOGUES, under their names, and what int8 and int4 values are made of and into."""

from __future__ import annotations

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754943508222875e-38)
"""reference.SMALLEST_SCALE: no scale is smaller."""
MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 of at most 2^22 plus it is rounded half to even, and ends in the bits of that integer."""
NIBBLE_SCALE = tl.constexpr(0.0625)
"""int4 values are unpacked as 16 times themselves, which is exact in int8 and one instruction cheaper; scales make up for it."""


# Silu, gelu and the like --------------------------------------------------------------------------------------------------------------


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu(x):
    """0.5 x (1 + erf(x / sqrt(2)))."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(u)) as x sigmoid(2 u)."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def relu(x):
    """max(x, 0); NaN passes through."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def none(x):
    """x itself."""
    return x


# int8, int4 ---------------------------------------------------------------------------------------------------------------------------


@triton.jit
def to_int8(x, PTX: tl.constexpr):
    """clamp(round(x), -127, 127) as int8, half to even; NaN is 0."""
    if PTX:
        steps = tl.inline_asm_elementwise("cvt.rni.sat.s8.f32 $0, $1; max.s32 $0, $0, -127;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
    else:
        clamped = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -127.0), 127.0)
        steps = (clamped + MAGIC).to(tl.int32, bitcast=True)
    return steps.to(tl.int8)


@triton.jit
def largest(x, axis: tl.constexpr):
    """max|x| along `axis`, infinity where x is not finite: tl.max may drop a NaN."""
    return tl.max(tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf")), axis)


@triton.jit
def scale_of(amax, IEEE: tl.constexpr):
    """Scale of symmetric int8 for values up to amax, amax / 127, and its reciprocal; NaN for infinity. IEEE: as eager torch rounds them on a CPU.

    Triton's `/` is good to 2 ulp. Half of the largest value of a row is 63.5 steps, a tie, and there an ulp decides which int8 it becomes: of rows of
    256 bfloat16 every third has such a value. Hidden values are not exact, so for them it does not matter, and IEEE divisions take
    up to a fifth more instructions of the kernel.
    """
    scale = tl.maximum(tl.div_rn(amax, 127.0) if IEEE else amax / 127.0, TINY)
    scale = tl.where(amax < float("inf"), scale, float("nan"))
    return scale, tl.div_rn(1.0, scale) if IEEE else 1.0 / scale


@triton.jit
def nibbles_int8(packed, PTX: tl.constexpr):
    """uint8 that hold (value + 8) of an even k low and of an odd k high -> 16 * value of the even, 16 * value of the odd, as int8."""
    if PTX:
        # Four bytes at once: (x & 0xF0) ^ 0x80 in each is one lop3.
        even, odd = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $2, 4; lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A; lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A; }",
            "=&r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        even = ((packed << 4) ^ 0x80).to(tl.int8, bitcast=True)
        odd = ((packed & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
    return even, odd


@triton.jit
def nibbles_float(packed, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The same as floats of DTYPE, and not 16 times."""
    if PTX and tl.bfloat16 == DTYPE:
        # A byte under 0x43 is 128 + nibble in bfloat16; 136 less is the value.
        even, odd = tl.inline_asm_elementwise(
            """{ .reg .b32 t, u, one, off; mov.b32 one, 0x3F803F80; mov.b32 off, 0xC308C308;
            and.b32 t, $4, 0x0F0F0F0F; shr.u32 u, $4, 4; and.b32 u, u, 0x0F0F0F0F;
            prmt.b32 $0, t, 0x43434343, 0x4140; prmt.b32 $1, t, 0x43434343, 0x4342;
            prmt.b32 $2, u, 0x43434343, 0x4140; prmt.b32 $3, u, 0x43434343, 0x4342;
            fma.rn.bf16x2 $0, $0, one, off; fma.rn.bf16x2 $1, $1, one, off;
            fma.rn.bf16x2 $2, $2, one, off; fma.rn.bf16x2 $3, $3, one, off; }""",
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    elif PTX and tl.float16 == DTYPE:
        # Under 0x64 it is 1024 + nibble in float16.
        even, odd = tl.inline_asm_elementwise(
            """{ .reg .b32 t, u, off; mov.b32 off, 0xE408E408;
            and.b32 t, $4, 0x0F0F0F0F; shr.u32 u, $4, 4; and.b32 u, u, 0x0F0F0F0F;
            prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342;
            prmt.b32 $2, u, 0x64646464, 0x4140; prmt.b32 $3, u, 0x64646464, 0x4342;
            add.rn.f16x2 $0, $0, off; add.rn.f16x2 $1, $1, off;
            add.rn.f16x2 $2, $2, off; add.rn.f16x2 $3, $3, off; }""",
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        even = ((packed & 15).to(tl.float32) - 8.0).to(DTYPE)
        odd = ((packed >> 4).to(tl.float32) - 8.0).to(DTYPE)
    return even, odd
