"""Calls of oneDNN's int8 linear on a CPU in what Inductor generates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.lowering import lowerings, make_pointwise
from torch._inductor.virtualized import V
from torch._inductor.virtualized import ops as inductor_ops

from ..epilogues import PostOp
from .forms import Form, pack

__all__ = ["Linear", "Store", "decoded", "encoded", "lower_linear"]

NOTHING = PostOp("none")


@dataclass(frozen=True)
class Linear:
    """The constants of one linear: int8 weight [N, K], float32 weight_scale [N], the activation's scale and (signed) zero point, float32 bias [N]
    or None, and what follows it.
    """

    weight: Tensor
    weight_scale: Tensor
    scale: float = 1.0
    zero_point: int = 0
    bias: Tensor | None = None
    post_op: PostOp = NOTHING


@dataclass(frozen=True)
class Store:
    """How the result is stored: as float32 or bfloat16; or as 8 bits of an activation's form, by a scale and the zero point of the signed value."""

    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    zero_point: int = 0


def _shifted(box: Any, by: int, dtype: torch.dtype) -> Any:
    """8-bit integers plus a number, by way of float32, which Inductor's C++ does a vector at a time."""

    def shift(x: Any) -> Any:
        return inductor_ops.to_dtype(inductor_ops.to_dtype(x, torch.float32) + inductor_ops.constant(float(by), torch.float32), dtype)

    return make_pointwise(shift, override_return_dtype=dtype)(box)


def encoded(box: Any, form: Form) -> Any:
    """A box of int8 in a form: in memory, written by the kernel that computes it where it is not there yet."""
    found = _shifted(box, form.offset, form.dtype) if form.offset else box
    found.realize()
    return found


def decoded(box: Any, form: Form) -> Any:
    """The reverse, computed by what reads it."""
    return _shifted(box, -form.offset, torch.int8) if form.offset else box


def lower_linear(a: Any, form: Form, rows: int | None, linear: Linear, store: Store, addend: Any = None) -> Any:
    """The box [M, N] of a call on the box a [M, K] of a form: post_op(scale (a - zero_point) @ weight.T weight_scale + bias), stored.

    rows: M, where it is known. addend: a float32 box [M, N] in memory, to which the result is added, in its place.
    """
    name = V.graph.current_node.name
    packed = V.graph.add_tensor_constant(pack(linear.weight, rows), name=f"{name}_packed")
    scale = V.graph.add_tensor_constant(linear.weight_scale, name=f"{name}_scale")
    zeros = V.graph.add_tensor_constant(torch.zeros(linear.weight.shape[0], dtype=torch.int32), name=f"{name}_zeros")
    bias = None if linear.bias is None or not linear.bias.any() else V.graph.add_tensor_constant(linear.bias, name=f"{name}_bias")
    # Where a has a stride of 0 oneDNN computes something else.
    product = (ir.ExternKernel.require_contiguous(a), linear.scale, linear.zero_point + form.offset, packed, scale, zeros)
    stored = (store.scale, store.zero_point + (0 if store.dtype.is_floating_point else form.offset), store.dtype)
    post_op: tuple[Any, ...] = (linear.post_op.name, [], linear.post_op.algorithm)
    # Not Inductor's own template beside it, which would correct the zero point in float32.
    with inductor_config.patch(max_autotune=False, max_autotune_gemm=False):
        if addend is None:
            return lowerings[torch.ops.onednn.qlinear_pointwise.tensor](*product, bias, *stored, *post_op)
        return lowerings[torch.ops.onednn.qlinear_pointwise.binary_tensor](*product, addend, bias, *stored, 1.0, 0, "sum", 1.0, *post_op)
