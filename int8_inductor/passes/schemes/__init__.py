"""SCHEMES: how layouts of weights, activations and scales look in a graph, and which of PRODUCTS computes them. One module each.

    weights.py int8 and int4 weights beside floats, int4 weights beside int8
    blocks.py  int8 times int8, scales for blocks of 1 x B and B x B
    w8a8.py    int8 times int8, scales and zero points per tensor or per row

They are asked in this order: special before general, as the first that reads a matrix product has it, and where none does the first reason is given.
"""

from .blocks import BLOCKS
from .types import Operand, Reading, Scheme
from .w8a8 import W8A8
from .weights import INT4, WEIGHT_ONLY

__all__ = ["SCHEMES", "Operand", "Reading", "Scheme"]

SCHEMES: tuple[Scheme, ...] = (INT4, WEIGHT_ONLY, BLOCKS, W8A8)
