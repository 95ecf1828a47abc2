"""A template's text as the object that Inductor renders."""

from __future__ import annotations

import functools

from .tail import Tail

__all__ = ["triton_template"]


@functools.cache
def triton_template(kind: str, grid: str, source: str, tail: Tail):  # type: ignore[no-untyped-def]  # imported late, as Inductor is slow to import
    """The TritonTemplate of `source`; one object for each kind and tail, as Inductor wants their names unique. `grid`: of torch's mm_common."""
    from torch._inductor.kernel import mm_common
    from torch._inductor.select_algorithm import TritonTemplate

    name = "_".join(part for part in ("int8_scaled_mm", kind, tail.name()) if part)
    return TritonTemplate(name=name, grid=getattr(mm_common, grid), source=source)
