"""Inductor's choices for the float code around int8 products: one pass over a row that is quantized, and sums that are stored before they grow.

Inductor keeps a whole reduced row in registers up to 1024 elements and loops twice over longer ones. A kernel that chooses a row's scale and
quantizes the row reads it in both loops, and so moves 5 bytes a bf16 element instead of 3 (6304 x 3072 on an H200: 43 us, against 35 in one pass).
Kernels that store int8 keep rows of up to MAX_ROW elements. Nor is the reduction of such a row split where there are few rows, as in decoding: the
parts would be reduced by a second kernel and quantized by a third (32 x 14336 on an H200: 1.9 + 1.1 + 1.8 us, and two launches more).

Inductor computes a value that several kernels need anew in each of them, until that takes more than four reads. A transformer's residual sum grows by
one read with each linear that way, and every fourth norm reads five tensors and stores one, where two and one would do. With MAX_READS every second
sum is stored (ViT-B/16, batch 32, on an H200: 2.74 ms instead of 2.83; a norm 11 us instead of 13).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["MAX_READS", "MAX_ROW", "with_own_choices"]

MAX_ROW = 16384
"""16384 float32 values are 32 registers a thread in 16 warps."""
MAX_READS = 2
"""How many reads a value may take where it is computed anew; Inductor's realize_reads_threshold."""


def _stores_int8(features: Any) -> bool:
    return any(node.node is not None and node.node.get_dtype() == torch.int8 for node in features.scheduler_nodes())


def _keeps_row(stock: Callable[..., bool], features: Any, cooperative_reduction: bool) -> bool:
    """InductorChoices.should_use_persistent_reduction."""
    from torch._inductor import config
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    if stock(features, cooperative_reduction):
        return True
    rows = config.triton.persistent_reductions and not cooperative_reduction and features.get_reduction_hint() == ReductionHint.INNER
    return bool(rows and V.graph.sizevars.statically_known_leq(features.reduction_numel, MAX_ROW) and _stores_int8(features))


def _splits(stock: Callable[..., int], device: torch.device, reduction_numel_hint: int, numel_hint: int, inner_reduction: bool) -> int:
    """InductorChoices.reduction_split_factor."""
    if inner_reduction and reduction_numel_hint <= MAX_ROW:
        return 1
    return stock(device, reduction_numel_hint, numel_hint, inner_reduction)


_OVERRIDES: dict[str, Callable[..., Any]] = {"should_use_persistent_reduction": _keeps_row, "reduction_split_factor": _splits}
"""Methods of InductorChoices -> what stands for them, given them first."""


def _method(base: type, name: str, own: Callable[..., Any]) -> Any:
    """`own` in place of a method of `base`, which some versions of torch have as a static one."""
    if isinstance(inspect.getattr_static(base, name), staticmethod):
        return staticmethod(functools.partial(own, getattr(base, name)))
    return lambda self, *args, **kwargs: own(functools.partial(getattr(base, name), self), *args, **kwargs)


@functools.cache
def _with_long_rows(base: Any) -> type:
    return type(f"Int8{base.__name__}", (base,), {name: _method(base, name, own) for name, own in _OVERRIDES.items()})


@contextmanager
def with_own_choices(triton: bool) -> Iterator[None]:
    """Inductor compiles with these choices inside the block, on top of whatever choices are in force. triton: whether its float code is Triton."""
    from torch._inductor import config
    from torch._inductor.virtualized import V

    base: Any = type(V.choices)
    choices = V.choices if base.__name__.startswith("Int8") else _with_long_rows(base)()
    reads = {"realize_reads_threshold": min(MAX_READS, config.realize_reads_threshold)} if triton else {}
    with V.set_choices_handler(choices), config.patch(reads):
        yield
