"""Dialects: the ways in which graphs write quantize and dequantize. Each recognises a node and says what it means, without touching the graph.

    aten.py          (q - zero_point) * scale, clamp(round(x / scale) + zero_point).to(int8): what Int8Linear writes, and people by hand
    decomposed.py    torch.ops.quantized_decomposed: PT2E's per tensor, per channel and per token

torchao's quantize_affine / dequantize_affine decompose to plain aten before the joint graph, with views that do nothing: aten.py covers them.
To add a dialect, write one module and list it in DIALECTS.
"""

from __future__ import annotations

from torch.fx import Node

from .aten import PLAIN_ATEN
from .decomposed import QUANTIZED_DECOMPOSED
from .types import Dequant, Dialect, Quant, Value, varying_dims

__all__ = ["DIALECTS", "Dequant", "Dialect", "Quant", "Value", "find_dequant", "find_quant", "varying_dims"]

DIALECTS = (PLAIN_ATEN, QUANTIZED_DECOMPOSED)


def find_dequant(node: Node) -> Dequant | None:
    """The first dialect's reading of `node` as a dequantize."""
    return next((found for d in DIALECTS if (found := d.dequant(node)) is not None), None)


def find_quant(node: Node) -> Quant | None:
    """The first dialect's reading of `node` as a quantize."""
    return next((found for d in DIALECTS if (found := d.quant(node)) is not None), None)
