"""`int8_inductor::scaled_mm_side_by_side`: one activation times several weights, as one product whose columns are those of all.

    cat([activations[i](scaled_mm(a, b[i], a_scale, b_scale[i], bias=bias[i])) for i], dim=1)

A pass writes it where a template will run it (passes/side_by_side.py); weights, scales and biases stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops

__all__ = ["scaled_mm_side_by_side"]


def _check_counts(b: Sequence[Tensor], b_scale: Sequence[Tensor], bias: Sequence[Tensor], activations: Sequence[str]) -> None:
    if len(b) < 2:
        raise ValueError(f"scaled_mm_side_by_side: b must hold two weights or more, got {len(b)}")
    for name, each, counts in (("b_scale", b_scale, (len(b),)), ("bias", bias, (0, len(b))), ("activations", activations, (len(b),))):
        if len(each) not in counts:
            raise ValueError(f"scaled_mm_side_by_side: {name} must hold {' or '.join(map(str, counts))} for {len(b)} weights, got {len(each)}")


def _eager(
    a: Tensor,
    b: Sequence[Tensor],
    a_scale: Tensor,
    b_scale: Sequence[Tensor],
    bias: Sequence[Tensor],
    *,
    activations: Sequence[str],
    out_dtype: torch.dtype,
) -> Tensor:
    _check_counts(b, b_scale, bias, activations)
    biases: Sequence[Tensor | None] = bias or [None] * len(b)
    each = zip(b, b_scale, biases, activations, strict=True)
    parts = [
        ops.scaled_mm(a, weight, a_scale, scale, bias=vector, activation=activation, out_dtype=out_dtype)
        for weight, scale, vector, activation in each
    ]
    return torch.cat(parts, dim=1)


SCHEMA = "(Tensor a, Tensor[] b, Tensor a_scale, Tensor[] b_scale, Tensor[] bias, *, str[] activations, ScalarType out_dtype) -> Tensor"

# Its fake is the eager definition too: scaled_mm has one, which checks each product.
ops.define_operator("scaled_mm_side_by_side", SCHEMA, _eager, _eager)
scaled_mm_side_by_side = torch.ops.int8_inductor.scaled_mm_side_by_side.default
ops.OPERATORS.add(scaled_mm_side_by_side)
