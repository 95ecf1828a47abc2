"""How the main loops of weight-only and int4 products read their operands: what is loaded of a weight, and how it becomes what tensor cores multiply.

The integers alone are converted, exactly: int8 and int4 values fit into bfloat16, float16 and int8. Scales are applied in float32, to the sum of
each group or, per row, by the tail. So the float weight is never in memory, and never rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["INT4", "INT8", "INT8_GROUPS", "INT8_INT4", "INT8_INT4_GROUPS", "Weight"]


@dataclass(frozen=True)
class Weight:
    """One kind of operands. name: in those of kernels. packed: two int4 a byte, else int8. floats: the activation is bfloat16 or float16, else int8.
    scales: operands that the loop reads besides A and B, in groups along K.
    """

    name: str
    packed: bool
    floats: bool
    scales: tuple[str, ...] = ()

    @property
    def values_a_byte(self) -> int:
        """How many values a byte of the weight holds."""
        return 2 if self.packed else 1

    @property
    def factor(self) -> float:
        """What the integers that are multiplied come out too large by. int4 in int8 keeps its place in the high half of the byte."""
        return 16.0 if self.packed and not self.floats else 1.0

    @property
    def group_scales(self) -> str:
        """Statements that apply the scales of group `group` to its product `partial` [BLOCK_N, BLOCK_M]."""
        return "\n".join(_GROUP_SCALES[name] for name in self.scales)

    def convert(self, ptx: bool, shape: str = "(BLOCK_N, BLOCK_K)") -> str:
        """Statements that make the left operand of a product of the tile `b` of weights: `w` of that shape, or, of int4 for floats, `low` and `high`,
        the values of even and of odd k. `ptx`: four bytes at a time, in a GPU's own instructions.
        """
        if not self.packed:
            return _INT8_TO_FLOAT if ptx else "w = b.to(A.dtype.element_ty)"
        if self.floats:
            return _INT4_TO_FLOAT if ptx else _INT4_TO_FLOAT_PORTABLE
        return (_INT4_TO_INT8 if ptx else _INT4_TO_INT8_PORTABLE) + f"\nw = tl.reshape(tl.join(low, high), {shape})"

    @staticmethod
    def convert_words(ptx: bool) -> str:
        """Statements that make of words `b` of eight int4 their values `n0` to `n7`, in floats. `ptx`: two at a time, i and i + 4."""
        return _WORDS_TO_FLOAT if ptx else _WORDS_TO_FLOAT_PORTABLE


_GROUP_SCALES = {
    "B_SCALE": 'partial *= tl.load(B_SCALE + rbn * {{stride("B_SCALE", 0)}} + group * {{stride("B_SCALE", 1)}}{{INSIDE_ROW}})[:, None]',
    "A_SCALE": 'partial *= tl.load(A_SCALE + ram * {{stride("A_SCALE", 0)}} + group * {{stride("A_SCALE", 1)}}{{INSIDE_ROW}})[None, :]',
}

# bfloat16 of an int8 v: the byte in the mantissa of 128 is 128 + (v & 127); what is too much, 128 or, for a negative v, 256, has v's sign bit in the
# same place. float16 has room for v + 128 in the mantissa of 1024.
_INT8_TO_FLOAT = '''if A.dtype.element_ty == tl.bfloat16:
    w = tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c, d;
        prmt.b32 a, $2, 0x43434343, 0x4140; prmt.b32 b, $2, 0x43434343, 0x4342;
        and.b32 c, a, 0xFF80FF80; and.b32 d, b, 0xFF80FF80; and.b32 a, a, 0xFF7FFF7F; and.b32 b, b, 0xFF7FFF7F;
        mov.b32 $0, 0xBF80BF80;
        fma.rn.bf16x2 $1, d, $0, b; fma.rn.bf16x2 $0, c, $0, a; }""",
        "=&r,=&r,r", [b], dtype=tl.bfloat16, is_pure=True, pack=4,
    )
elif A.dtype.element_ty == tl.float16:
    w = tl.inline_asm_elementwise(
        """{ .reg .b32 t, u;
        xor.b32 t, $2, 0x80808080; mov.b32 u, 0x64806480;
        prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342;
        sub.rn.f16x2 $0, $0, u; sub.rn.f16x2 $1, $1, u; }""",
        "=&r,=&r,r", [b], dtype=tl.float16, is_pure=True, pack=4,
    )
else:
    w = b.to(tl.float32)'''

# A nibble, value + 8, in the mantissa of 128 (bfloat16) or 1024 (float16), less 136 or 1032.
_INT4_TO_FLOAT = '''if A.dtype.element_ty == tl.bfloat16:
    low, high = tl.inline_asm_elementwise(
        """{ .reg .b32 t, u, one, off;
        mov.b32 one, 0x3F803F80; mov.b32 off, 0xC308C308;
        and.b32 t, $4, 0x0F0F0F0F; shr.u32 u, $4, 4; and.b32 u, u, 0x0F0F0F0F;
        prmt.b32 $0, t, 0x43434343, 0x4140; prmt.b32 $1, t, 0x43434343, 0x4342;
        prmt.b32 $2, u, 0x43434343, 0x4140; prmt.b32 $3, u, 0x43434343, 0x4342;
        fma.rn.bf16x2 $0, $0, one, off; fma.rn.bf16x2 $1, $1, one, off;
        fma.rn.bf16x2 $2, $2, one, off; fma.rn.bf16x2 $3, $3, one, off; }""",
        "=&r,=&r,=&r,=&r,r", [b], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
    )
elif A.dtype.element_ty == tl.float16:
    low, high = tl.inline_asm_elementwise(
        """{ .reg .b32 t, u, off;
        mov.b32 off, 0x64086408;
        and.b32 t, $4, 0x0F0F0F0F; shr.u32 u, $4, 4; and.b32 u, u, 0x0F0F0F0F;
        prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342;
        prmt.b32 $2, u, 0x64646464, 0x4140; prmt.b32 $3, u, 0x64646464, 0x4342;
        sub.rn.f16x2 $0, $0, off; sub.rn.f16x2 $1, $1, off; sub.rn.f16x2 $2, $2, off; sub.rn.f16x2 $3, $3, off; }""",
        "=&r,=&r,=&r,=&r,r", [b], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
    )
else:
    low = (b & 15).to(tl.float32) - 8.0
    high = (b >> 4).to(tl.float32) - 8.0'''
_INT4_TO_FLOAT_PORTABLE = """low = ((b & 15).to(tl.float32) - 8.0).to(A.dtype.element_ty)
high = ((b >> 4).to(tl.float32) - 8.0).to(A.dtype.element_ty)"""

# The same without bytes taken apart: nibble i of a word and nibble i + 4 lie 16 bits apart. lop3 0xEA: (a & b) | c.
_WORD_TO_FLOAT = '''    n0, n1, n2, n3, n4, n5, n6, n7 = tl.inline_asm_elementwise(
        """{{ .reg .b32 t, p, q, r, s, one, off;
        mov.b32 one, {one}; mov.b32 off, {off};
        lop3.b32 p, $8, 0x000F000F, {high}, 0xEA;
        shr.u32 t, $8, 4; lop3.b32 q, t, 0x000F000F, {high}, 0xEA;
        shr.u32 t, $8, 8; lop3.b32 r, t, 0x000F000F, {high}, 0xEA;
        shr.u32 t, $8, 12; lop3.b32 s, t, 0x000F000F, {high}, 0xEA;
        fma.rn.{kind}x2 p, p, one, off; fma.rn.{kind}x2 q, q, one, off;
        fma.rn.{kind}x2 r, r, one, off; fma.rn.{kind}x2 s, s, one, off;
        mov.b32 {{$0, $4}}, p; mov.b32 {{$1, $5}}, q; mov.b32 {{$2, $6}}, r; mov.b32 {{$3, $7}}, s; }}""",
        "=h,=h,=h,=h,=h,=h,=h,=h,r", [b], dtype=({dtypes}), is_pure=True, pack=1,
    )'''
_WORDS_TO_FLOAT = f"""if A.dtype.element_ty == tl.bfloat16:
{_WORD_TO_FLOAT.format(kind="bf16", one="0x3F803F80", off="0xC308C308", high="0x43004300", dtypes=", ".join(["tl.bfloat16"] * 8))}
else:
{_WORD_TO_FLOAT.format(kind="f16", one="0x3C003C00", off="0xE408E408", high="0x64006400", dtypes=", ".join(["tl.float16"] * 8))}"""
_WORDS_TO_FLOAT_PORTABLE = "\n".join(f"n{i} = (((b >> {4 * i}) & 15).to(tl.float32) - 8.0).to(A.dtype.element_ty)" for i in range(8))

# 16 * (value + 8) with its highest bit turned is 16 * value in two's complement; lop3 0x6A: (a & b) ^ c.
_INT4_TO_INT8 = '''low, high = tl.inline_asm_elementwise(
    """{ .reg .b32 t;
    shl.b32 t, $2, 4; lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A; lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A; }""",
    "=&r,=&r,r", [b], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
)'''
_INT4_TO_INT8_PORTABLE = """low = ((b << 4) ^ 0x80).to(tl.int8, bitcast=True)
high = ((b & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)"""

INT8 = Weight("int8", packed=False, floats=True)
INT8_GROUPS = Weight("int8_groups", packed=False, floats=True, scales=("B_SCALE",))
INT4 = Weight("int4", packed=True, floats=True, scales=("B_SCALE",))
INT8_INT4 = Weight("int8_int4", packed=True, floats=False, scales=("B_SCALE",))
INT8_INT4_GROUPS = Weight("int8_int4_groups", packed=True, floats=False, scales=("A_SCALE", "B_SCALE"))
