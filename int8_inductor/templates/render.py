"""A template's text as the object that Inductor renders."""

from __future__ import annotations

import functools

from .dependent import prelude
from .tail import Tail

__all__ = ["triton_template"]


@functools.cache
def triton_template(stem: str, grid: str, source: str, tail: Tail):  # type: ignore[no-untyped-def]  # imported late, as Inductor is slow to import
    """The TritonTemplate of `source`; one object for each stem and tail, as Inductor wants their names unique. `grid`: of torch's mm_common."""
    from torch._inductor.kernel import mm_common
    from torch._inductor.select_algorithm import TritonTemplate

    start = source.index("\n", source.index("{{def_kernel(")) + 1
    text = source[:start] + prelude(tail.weights) + source[start:]
    return TritonTemplate(name=f"{stem}_{tail.name()}", grid=getattr(mm_common, grid), source=text)
