"""The Triton kernels of a layer of experts: prepare the activation, sort the tokens, gate and up products, down product, combine.

    arithmetic.py   activations of the gate, and the conversions of int8 and int4
    steps.py        the steps along K of which a product is made
    products.py     gate and up with what follows them, down, and a product of rows that are sorted already
    routing.py      before and after: quantize, count, sort, cut into tiles, sum up

A *pair* is a token and one of the experts chosen for it, pair = token * TOP_K + slot; hidden values and results are rows of pairs, so nothing is
gathered or scattered in memory. Pairs are sorted by expert, and cut into tiles of BLOCK_M of which none has two experts.

The products are computed transposed, weight [BLOCK_N, BLOCK_K] times activation [BLOCK_K, BLOCK_M]: the tensor cores of Hopper take only their left
operand from registers, so unpacked int4 values never go through shared memory. A tile can be as low as 16 pairs. The bytes of int4 weights hold the
values of an even and an odd k; activations for them are kept with all even k in the first half of a row and all odd in the second, so that a tile of
low nibbles and one of high nibbles meet a contiguous tile each.

PTX: a GPU's own instructions may be used; the interpreter takes the portable twins.
"""

from .arithmetic import gelu, gelu_tanh, none, relu, silu
from .products import down, gate_up, grouped
from .routing import combine, place, prepare, schedule

__all__ = ["combine", "down", "gate_up", "gelu", "gelu_tanh", "grouped", "none", "place", "prepare", "relu", "schedule", "silu"]
