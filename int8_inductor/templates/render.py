"""A template's text as the object that Inductor renders.

Where kernels are launched as dependents (launching.py) each waits for those before it as its first step. It does not let the next one start early, as
Inductor's and those in Gluon do: what waits takes room from what runs. On an H200 (M = 1 and 16, K = 14336) int8 weights beside bfloat16 took 20.5
and 24.6 us that way, 17.3 and 19.4 as it is, 19.1 and 19.6 launched one after the other.
"""

from __future__ import annotations

import functools

from .tail import Tail

__all__ = ["triton_template"]

_WAIT = """{% if DEPENDENT is defined %}
    tl.extra.cuda.gdc_wait()
{% endif %}
"""


@functools.cache
def triton_template(stem: str, grid: str, source: str, tail: Tail):  # type: ignore[no-untyped-def]  # imported late, as Inductor is slow to import
    """The TritonTemplate of `source`; one object for each stem and tail, as Inductor wants their names unique. `grid`: of torch's mm_common."""
    from torch._inductor.kernel import mm_common
    from torch._inductor.select_algorithm import TritonTemplate

    body = source.index("\n", source.index("{{def_kernel(")) + 1
    return TritonTemplate(name=f"{stem}_{tail.name()}", grid=getattr(mm_common, grid), source=source[:body] + _WAIT + source[body:])
