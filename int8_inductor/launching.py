"""How kernels are launched: one by one by the host, or by a CUDA graph, from which each can start while the one before it ends."""

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
    """Inside it Inductor writes kernels for these devices to be launched as they are to be: as dependents (templates/dependent.py) where CUDA graphs
    launch them, or the user asks for it. Launches of such kernels by the host take longer than others.
    """
    from torch._inductor import config

    wanted = (by_cuda_graphs() or config.triton.enable_pdl) and not config.cpp_wrapper
    return launched_as_dependents() if wanted and any(map(can_launch_dependents, devices)) else contextlib.nullcontext()
