"""Inductor's choice for the kernels that quantize: one pass over a row, not two.

Inductor keeps a whole reduced row in registers up to 1024 elements and loops twice over longer ones. A kernel that chooses a row's scale and
quantizes the row reads it in both loops, and so moves 5 bytes a bf16 element instead of 3 (6304 x 3072 on an H200: 43 us, against 35 in one pass).
Kernels that store int8 keep rows of up to MAX_ROW elements.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

__all__ = ["MAX_ROW", "with_persistent_quants"]

MAX_ROW = 16384
"""16384 float32 values are 32 registers a thread in 16 warps."""


def _stores_int8(features: Any) -> bool:
    return any(node.node is not None and node.node.get_dtype() == torch.int8 for node in features.scheduler_nodes())


@functools.cache
def _with_long_rows(base: Any) -> type:
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        from torch._inductor import config
        from torch._inductor.runtime.hints import ReductionHint
        from torch._inductor.virtualized import V

        if base.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        rows = config.triton.persistent_reductions and not cooperative_reduction and features.get_reduction_hint() == ReductionHint.INNER
        return bool(rows and V.graph.sizevars.statically_known_leq(features.reduction_numel, MAX_ROW) and _stores_int8(features))

    return type(f"Int8{base.__name__}", (base,), {"should_use_persistent_reduction": staticmethod(should_use_persistent_reduction)})


def with_persistent_quants() -> Any:
    """A context in which Inductor compiles with that choice, on top of whatever choices are in force."""
    from torch._inductor.virtualized import V

    base: Any = type(V.choices)
    if base.__name__.startswith("Int8"):
        return V.set_choices_handler(V.choices)
    return V.set_choices_handler(_with_long_rows(base)())
