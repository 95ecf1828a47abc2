"""The operators of layers of experts: schema, checks, fake, and which implementation runs.

`moe_experts` is a whole layer: gate and up products of the experts chosen for each token, activation(gate) * up, down product, weighted sum.

    x [M, K] float32, bfloat16 or float16                           -> [M, N] of the same dtype
    gate_up int8 [E, 2 I, K], gate rows first, and gate_up_scale float32 [E, 2 I, 1]; down int8 [E, N, I] and down_scale [E, N, 1]; or
    gate_up uint8 [E, 2 I, K / 2], gate_up_scale [E, 2 I, K / g], down uint8 [E, N, I / 2] and down_scale [E, N, I / g]: int4 in groups of g
    top_k_index [M, k] int32 or int64, where what is not in [0, E) counts for nothing; top_k_weights [M, k] float
    activation of the gate: one of EPILOGUES; weight_only (int4): activations are not quantized

`scaled_grouped_mm` is one product for rows that are sorted by expert, torch._grouped_mm for int8.

    a int8 [S, K], a_scale float32 [S, 1] or [1, 1]; b int8 [E, N, K], b_scale float32 [E, N]; offs int32 [E], where each expert's rows end
                                                                    -> [S, N] of out_dtype (float32); rows past the last expert's are 0

Both run the Triton kernels where they can, eagerly
too, and never wait for the device; elsewhere, and for kernel_preference "torch", they are their definition (reference.py), which does wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference as int8
from ..epilogues import EPILOGUES
from ..kernels import KernelPreference, parse, resolve
from ..ops import KERNEL_PREFERENCES, OPERATORS
from ..ops import _library as library
from . import reference
from .layouts import GROUP_SIZES, is_int4

__all__ = ["moe_experts", "scaled_grouped_mm"]

INDEX_DTYPES = (torch.int32, torch.int64)

library.define(
    "moe_experts(Tensor x, Tensor gate_up, Tensor gate_up_scale, Tensor down, Tensor down_scale, Tensor top_k_index, Tensor top_k_weights, *, "
    'str activation="silu", bool weight_only=False, str kernel_preference="auto") -> Tensor',
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "scaled_grouped_mm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor offs, *, ScalarType? out_dtype=None, "
    'str kernel_preference="auto") -> Tensor',
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(str, dtypes))


def _check_tensor(op: str, name: str, t: Tensor, shape: tuple[Any, ...], dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if t.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be one of {_names(dtypes)}, got {t.dtype}")
    if t.ndim != len(shape) or any(actual != wanted for actual, wanted in zip(t.shape, shape, strict=True)):
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(t.shape)}")
    if t.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, the device of the activation, got {t.device}")


def _check_weight(name: str, weight: Tensor, scale: Tensor, shape: tuple[Any, ...], device: torch.device) -> None:
    """A weight [E, N, K] in either layout, and its scales."""
    experts, n, k = shape
    int4 = is_int4(weight)
    if int4 and k % 2:
        raise ValueError(f"moe_experts: {name} is packed int4, whose K must be even, got {k}")
    _check_tensor("moe_experts", name, weight, (experts, n, k // 2 if int4 else k), (torch.int8, torch.uint8), device)
    if not weight.is_contiguous() or not scale.is_contiguous():
        raise ValueError(f"moe_experts: {name} and {name}_scale must be contiguous")
    if not int4:
        _check_tensor("moe_experts", f"{name}_scale", scale, (experts, n, 1), (torch.float32,), device)
        return
    groups = scale.shape[-1] if scale.ndim == 3 else 0
    if groups == 0 or k % groups or k // groups not in GROUP_SIZES:
        allowed = ", ".join(f"{k}/{size}" for size in GROUP_SIZES)
        raise ValueError(f"moe_experts: {name}_scale must have shape [{experts}, {n}, {allowed}], a group each, got {list(scale.shape)}")
    _check_tensor("moe_experts", f"{name}_scale", scale, (experts, n, groups), (torch.float32,), device)


def _check_choices(op: str, kernel_preference: str) -> None:
    if kernel_preference not in KERNEL_PREFERENCES:
        raise ValueError(f"{op}: kernel_preference must be one of {', '.join(KERNEL_PREFERENCES)}, got {kernel_preference!r}")


def _check_moe_experts(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    activation: str,
    weight_only: bool,
    kernel_preference: str,
) -> None:
    """TypeError or ValueError, naming the argument, what came and what is allowed."""
    if x.dtype not in int8.OUT_DTYPES:
        raise TypeError(f"moe_experts: x must be one of {_names(int8.OUT_DTYPES)}, got {x.dtype}")
    if x.ndim != 2 or gate_up.ndim != 3 or down.ndim != 3:
        shapes = f"{list(x.shape)}, {list(gate_up.shape)} and {list(down.shape)}"
        raise ValueError(f"moe_experts: x, gate_up and down must have 2, 3 and 3 dimensions, got shapes {shapes}")
    (tokens, k), (experts, two_i, _), n = x.shape, gate_up.shape, down.shape[1]
    if experts < 1 or k < 1 or n < 1 or two_i < 2 or two_i % 2:
        raise ValueError(f"moe_experts: gate_up must be [E, 2 I, K] and down [E, N, I] with E, I, K, N at least 1, got {list(gate_up.shape)}")
    if gate_up.dtype != down.dtype:
        raise TypeError(f"moe_experts: gate_up and down must have the same dtype, got {gate_up.dtype} and {down.dtype}")
    _check_weight("gate_up", gate_up, gate_up_scale, (experts, two_i, k), x.device)
    _check_weight("down", down, down_scale, (experts, n, two_i // 2), x.device)
    slots = top_k_index.shape[1] if top_k_index.ndim == 2 else 0
    if slots < 1:
        raise ValueError(f"moe_experts: top_k_index must have shape [{tokens}, k] with k at least 1, got {list(top_k_index.shape)}")
    _check_tensor("moe_experts", "top_k_index", top_k_index, (tokens, slots), INDEX_DTYPES, x.device)
    _check_tensor("moe_experts", "top_k_weights", top_k_weights, (tokens, slots), int8.OUT_DTYPES, x.device)
    if weight_only and not is_int4(gate_up):
        raise ValueError("moe_experts: weight_only must be False for int8 weights, got True: it is for packed int4")
    if k > int8.MAX_K:
        raise ValueError(f"moe_experts: K must be at most {int8.MAX_K}, or int32 could overflow; got {k}")
    if activation not in EPILOGUES:
        raise ValueError(f"moe_experts: activation must be one of {', '.join(EPILOGUES)}, got {activation!r}")
    _check_choices("moe_experts", kernel_preference)


def _moe_experts(*tensors: Tensor, activation: str = "silu", weight_only: bool = False, kernel_preference: str = "auto") -> Tensor:
    _check_moe_experts(*tensors, activation=activation, weight_only=weight_only, kernel_preference=kernel_preference)
    if resolve(parse(kernel_preference), tensors[0].device) is KernelPreference.TRITON:
        from . import launch

        with torch.cuda.device_of(tensors[0]):
            return launch.moe_experts(*tensors, activation=activation, weight_only=weight_only)
    return reference.moe_experts(*tensors, activation=activation, weight_only=weight_only)


def _moe_experts_fake(*tensors: Tensor, activation: str = "silu", weight_only: bool = False, kernel_preference: str = "auto") -> Tensor:
    _check_moe_experts(*tensors, activation=activation, weight_only=weight_only, kernel_preference=kernel_preference)
    x, down = tensors[0], tensors[3]
    return x.new_empty((x.shape[0], down.shape[1]))


def _check_scaled_grouped_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, offs: Tensor, *, out_dtype: torch.dtype | None, kernel_preference: str
) -> None:
    """TypeError or ValueError, naming the argument, what came and what is allowed."""
    op = "scaled_grouped_mm"
    if a.ndim != 2 or b.ndim != 3:
        raise ValueError(f"{op}: a must be [S, K] and b [E, N, K], got {list(a.shape)} and {list(b.shape)}")
    (rows, k), (experts, n, _) = a.shape, b.shape
    if experts < 1 or n < 1 or not 1 <= k <= int8.MAX_K:
        raise ValueError(f"{op}: E, N and K must be at least 1 and K at most {int8.MAX_K}, got b {list(b.shape)}")
    _check_tensor(op, "a", a, (rows, k), (torch.int8,), a.device)
    _check_tensor(op, "b", b, (experts, n, k), (torch.int8,), a.device)
    if not b.is_contiguous():
        raise ValueError(f"{op}: b must be contiguous, got strides {b.stride()}")
    _check_tensor(op, "a_scale", a_scale, (1, 1) if a_scale.shape == (1, 1) else (rows, 1), (torch.float32,), a.device)
    _check_tensor(op, "b_scale", b_scale, (experts, n), (torch.float32,), a.device)
    _check_tensor(op, "offs", offs, (experts,), (torch.int32,), a.device)
    if out_dtype is not None and out_dtype not in int8.OUT_DTYPES:
        raise TypeError(f"{op}: out_dtype must be one of {_names(int8.OUT_DTYPES)}, got {out_dtype}")
    _check_choices(op, kernel_preference)


def _scaled_grouped_mm(*tensors: Tensor, out_dtype: torch.dtype | None = None, kernel_preference: str = "auto") -> Tensor:
    _check_scaled_grouped_mm(*tensors, out_dtype=out_dtype, kernel_preference=kernel_preference)
    dtype = out_dtype or torch.float32
    if resolve(parse(kernel_preference), tensors[0].device) is KernelPreference.TRITON:
        from . import launch

        with torch.cuda.device_of(tensors[0]):
            return launch.scaled_grouped_mm(*tensors, out_dtype=dtype)
    return reference.grouped_linear(*tensors, out_dtype=dtype)


def _scaled_grouped_mm_fake(*tensors: Tensor, out_dtype: torch.dtype | None = None, kernel_preference: str = "auto") -> Tensor:
    _check_scaled_grouped_mm(*tensors, out_dtype=out_dtype, kernel_preference=kernel_preference)
    a, b = tensors[:2]
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype or torch.float32)


library.impl("moe_experts", _moe_experts, "CompositeExplicitAutograd")
library.impl("scaled_grouped_mm", _scaled_grouped_mm, "CompositeExplicitAutograd")
torch.library.register_fake("int8_inductor::moe_experts", _moe_experts_fake, lib=library)
torch.library.register_fake("int8_inductor::scaled_grouped_mm", _scaled_grouped_mm_fake, lib=library)


def _no_gradient(context: Any, gradient: Tensor) -> None:
    raise RuntimeError("experts of int8_inductor have no gradient: rounding to int8 has none; call them under torch.no_grad()")


for _name in ("moe_experts", "scaled_grouped_mm"):
    torch.library.register_autograd(f"int8_inductor::{_name}", _no_gradient, lib=library)

moe_experts = torch.ops.int8_inductor.moe_experts.default
scaled_grouped_mm = torch.ops.int8_inductor.scaled_grouped_mm.default
OPERATORS.update((moe_experts, scaled_grouped_mm))
