"""Lowering of scaled_mm_side_by_side: the templates of scaled_mm on several weights, whose pointers a program picks from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.select_algorithm import realize_inputs
from torch._inductor.virtualized import V

from .ahead import KERNELS, compile_all_ahead
from .autotune import Kernel, autotune
from .explain import TAG, record_kernel
from .lowering import in_words
from .operands import as_operand, computed_once, device_of, has_ptx, is_thorough, problem_of
from .ranges import ranges_of
from .side_by_side import scaled_mm_side_by_side
from .templates import LOWERINGS
from .templates.tail import OF_EACH_WEIGHT, Indexing, Tail

__all__: list[str] = []


def _vectors(boxes: list[Any]) -> list[Any]:
    """One contiguous vector for each weight."""
    flat = (lowerings[torch.ops.aten.reshape](box, [-1]) for box in boxes)
    return [ir.ExternKernel.require_stride1(realize_inputs(each)) for each in flat]


def _kernel(given: dict[str, Any], box_like: Callable[[Tensor], Any] | None = None) -> Kernel:
    """The kernel that runs a call with these arguments."""
    a = realize_inputs(computed_once(given["a"]))
    weights = [realize_inputs(computed_once(b)) for b in given["b"]]
    device, dtype = a.get_device(), given["out_dtype"]
    indexings: dict[str, Indexing] = {"b_scale": OF_EACH_WEIGHT}
    indexings["a_scale"], a_scale = as_operand("a_scale", given["a_scale"])
    inputs = [a, *weights, *([a_scale] if indexings["a_scale"].is_argument else []), *_vectors(given["b_scale"])]
    if given["bias"]:
        indexings["bias"] = OF_EACH_WEIGHT
        inputs += _vectors(given["bias"])
    tail = dataclasses.replace(Tail.of(indexings), activations=tuple(given["activations"]), fast=dtype != torch.float32, ptx=has_ptx(device))
    return Kernel(
        name="int8_scaled_mm_side_by_side",
        templates=LOWERINGS["scaled_mm"].templates,
        tail=tail,
        problem=problem_of(a, *weights),
        device=device_of(device, a.get_size()[0]),
        inputs=inputs,
        layout=ir.FixedLayout(device, dtype, [a.get_size()[0], sum(b.get_size()[0] for b in weights)]),
        mutated=[],
        literals={} if indexings["a_scale"].is_argument else {"A_SCALE": a_scale},
        thorough=is_thorough(),
        ranges=ranges_of(*a.get_size(), *(b.get_size()[0] for b in weights)),
    )


@register_lowering(scaled_mm_side_by_side, type_promotion_kind=None)
def _lower_side_by_side(a: Any, b: Any, a_scale: Any, b_scale: Any, bias: Any, *, activations: list[str], out_dtype: torch.dtype) -> Any:
    compile_all_ahead(a.get_device())
    kernel = _kernel({"a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale, "bias": bias, "activations": activations, "out_dtype": out_dtype})
    result, lasts = autotune(kernel)
    tags = V.graph.current_node.meta.get(TAG)  # a linear's for each, where a pass has joined linears
    for tag, activation in zip(tags, activations, strict=True) if isinstance(tags, tuple) else ():
        epilogue = dataclasses.replace(kernel.tail, activations=(), activation=activation).describe()
        record_kernel(V.graph.current_node, in_words(kernel, lasts), epilogue, tag)
    return result


KERNELS[scaled_mm_side_by_side] = _kernel
