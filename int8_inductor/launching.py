"""How kernels are launched: one by one by the host, or by a CUDA graph, from which on Hopper and on each may start while the one before it ends.

Such a launch is called a programmatic dependent one (CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization"). Every kernel
waits for the one before it before it touches memory, so what is left of the gap between two is what they do before that. A kernel that has waited
may let the next one be launched at once; whatever that one sees has still been written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch

from ._compat import can_launch_dependents, launched_as_dependents

__all__ = ["by_cuda_graphs", "launches"]


def by_cuda_graphs() -> bool:
    """Whether Inductor records CUDA graphs of what it compiles now."""
    from torch._inductor import config

    return bool(config.triton.cudagraphs)


def launches(devices: Iterable[torch.device]) -> contextlib.AbstractContextManager[None]:
    """Inside it Inductor writes kernels for these devices to be launched as they are to be: as dependents where CUDA graphs launch them, or the user
    asks for it with Inductor's triton.enable_pdl. The host's launches of such kernels take longer than others.
    """
    from torch._inductor import config

    wanted = (by_cuda_graphs() or config.triton.enable_pdl) and not config.cpp_wrapper
    return launched_as_dependents() if wanted and any(map(can_launch_dependents, devices)) else contextlib.nullcontext()
