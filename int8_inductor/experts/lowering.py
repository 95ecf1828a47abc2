"""How torch.compile runs the operators of experts: as calls of the operators, which launch their kernels themselves; the report learns which.

They are several kernels with buffers between, not one template; Inductor plans no memory in them, and CUDA graphs record them as they are.
"""

from __future__ import annotations

from typing import Any

from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.virtualized import V

from ..explain import record_kernel
from ..kernels import parse, resolve
from . import ops

__all__: list[str] = []


def _record(kernel_preference: str, activation: Any, epilogue: str) -> None:
    record_kernel(V.graph.current_node, resolve(parse(kernel_preference), activation.get_device()).value, epilogue)


@register_lowering(ops.moe_experts, type_promotion_kind=None)
def _lower_moe_experts(x: Any, *tensors: Any, activation: str = "silu", weight_only: bool = False, kernel_preference: str = "auto") -> Any:
    parts = ["scales", f"{activation} * up", *([] if weight_only else ["int8"]), "weighted sum"]
    _record(kernel_preference, x, " + ".join(parts))
    options = {"activation": activation, "weight_only": weight_only, "kernel_preference": kernel_preference}
    return fallback_handler(ops.moe_experts)(x, *tensors, **options)


@register_lowering(ops.scaled_grouped_mm, type_promotion_kind=None)
def _lower_scaled_grouped_mm(a: Any, *tensors: Any, kernel_preference: str = "auto", **options: Any) -> Any:
    _record(kernel_preference, a, "scales")
    return fallback_handler(ops.scaled_grouped_mm)(a, *tensors, kernel_preference=kernel_preference, **options)
