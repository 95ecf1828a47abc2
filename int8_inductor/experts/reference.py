"""The eager truth of a layer of experts, in plain aten arithmetic.

    y[token] = sum over slots of routing[token, slot] * down(activation(gate(x)) * up(x)), each of expert index[token, slot]

int8 products are exact, in int32, over stretches of K that share their scales; scales, activation and sums are float32. An int8 x has a scale per
row; one per row and ACT_BLOCK columns, where the weight is int4, bought little and was half of the gate and up products' time on an H200. The hidden
value activation(gate) * up has heavier tails than x, and so a scale per row and ACT_BLOCK columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..epilogues import EPILOGUES
from .layouts import dequantize_weight, is_int4, unpack_int4

__all__ = ["ACT_BLOCK", "grouped_linear", "moe_experts", "quantize_activation", "scaled_linear"]

ACT_BLOCK = 128
"""Columns of hidden values that share a scale; the last block may be short."""


def quantize_activation(x: Tensor, block: int | None) -> tuple[Tensor, Tensor]:
    """float [R, K] -> int8 [R, K] and float32 scales [R, ceil(K / block)], symmetric; block None: one scale a row, [R, 1]."""
    rows, k = x.shape
    if block is None:
        block = k
    blocks = F.pad(x.float(), (0, -k % block)).reshape(rows, -(-k // block), block)
    scale = reference.choose_scale_symmetric(blocks, [-1])
    q = reference.quantize(blocks, scale, None, reference.SYMMETRIC_MIN)
    return q.reshape(rows, -1)[:, :k], scale.squeeze(-1)


def scaled_linear(q: Tensor, q_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """q @ weight.T in float32 [R, N]: q int8 [R, K] with scales [R, 1] or [R, ceil(K / ACT_BLOCK)], one expert's weight in either layout."""
    k = q.shape[1]
    values = unpack_int4(weight) if is_int4(weight) else weight
    groups, blocks = weight_scale.shape[1], q_scale.shape[1]
    group = k // groups
    stretch = min(group, ACT_BLOCK if blocks > 1 else k)
    y = torch.zeros(q.shape[0], weight.shape[0], dtype=torch.float32, device=q.device)
    for start in range(0, k, stretch):
        dot = reference.int_mm(q[:, start : start + stretch], values[:, start : start + stretch])
        block = start // ACT_BLOCK if blocks > 1 else 0
        y = y + dot.float() * q_scale[:, block, None] * weight_scale[:, start // group]
    return y


def _expert(x: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor, activation: str, weight_only: bool) -> Tensor:
    """One expert's float32 [R, N] for rows x [R, K]."""
    epilogue = EPILOGUES[activation].eager
    if weight_only:
        gate, up = (x.float() @ dequantize_weight(gate_up, gate_up_scale).t()).chunk(2, -1)
        hidden = (epilogue(gate) * up).to(x.dtype)
        return hidden.float() @ dequantize_weight(down, down_scale).t()
    q, scale = quantize_activation(x, None)
    gate, up = scaled_linear(q, scale, gate_up, gate_up_scale).chunk(2, -1)
    q, scale = quantize_activation(epilogue(gate) * up, ACT_BLOCK)
    return scaled_linear(q, scale, down, down_scale)


def moe_experts(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    activation: str = "silu",
    weight_only: bool = False,
) -> Tensor:
    """What operator moe_experts computes (ops.py has shapes and dtypes). A weighted result is stored in x's dtype before the sum over slots."""
    slots = top_k_index.shape[1]
    index, routing = top_k_index.reshape(-1), top_k_weights.reshape(-1).float()
    results = x.new_zeros(index.numel(), down.shape[1])
    for expert in index.unique().tolist():
        if 0 <= expert < gate_up.shape[0]:
            pairs = (index == expert).nonzero().squeeze(1)
            y = _expert(x[pairs // slots], gate_up[expert], gate_up_scale[expert], down[expert], down_scale[expert], activation, weight_only)
            results[pairs] = (y * routing[pairs, None]).to(x.dtype)
    return results.reshape(-1, slots, down.shape[1]).sum(1, dtype=torch.float32).to(x.dtype)


def grouped_linear(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, offs: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """What operator scaled_grouped_mm computes (ops.py has shapes and dtypes)."""
    y = torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype, device=a.device)
    row_scale, column_scale = a_scale.reshape(-1, 1).expand(a.shape[0], 1), b_scale.reshape(b.shape[0], -1).expand(b.shape[:2])
    start = 0
    for expert, end in enumerate(offs.tolist()):
        rows = slice(start, end)
        y[rows] = (reference.int_mm(a[rows], b[expert]).float() * row_scale[rows] * column_scale[expert]).to(out_dtype)
        start = end
    return y
