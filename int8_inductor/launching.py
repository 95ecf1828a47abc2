"""How kernels are launched: one by one by the host, or by a CUDA graph, from which on Hopper and on each may start while the one before it ends.

Such a launch is called a programmatic dependent one (CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization"). Every kernel
waits for the one before it before it touches memory, so what is left of the gap between two is what they do before that. A kernel that has waited
may let the next one be launched at once; whatever that one sees has still been written.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterable

import torch

from ._compat import launched_as_dependents

__all__ = ["by_cuda_graphs", "can_launch_dependents", "cuda_of_the_driver", "launches", "launches_dependents"]


def by_cuda_graphs() -> bool:
    """Whether Inductor records CUDA graphs of what it compiles now."""
    from torch._inductor import config

    return bool(config.triton.cudagraphs)


def launches_dependents(device: torch.device) -> bool:
    """Whether Triton kernels for `device` are launched before the ones that they follow have ended: Inductor's triton.enable_pdl, off by default."""
    from torch._inductor import config
    from torch._inductor.virtualized import V

    return bool(config.triton.enable_pdl) and can_launch_dependents(device) and not V.graph.cpp_wrapper


DEPENDENTS_IN_GRAPHS = 12030
"""CUDA 12.3, as drivers number it: the first whose graphs have edges for launches before the end."""


def can_launch_dependents(device: torch.device) -> bool:
    """Whether such launches exist there, also in CUDA graphs: Hopper and on, with a driver for CUDA 12.3 and on."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] < 9:
        return False
    return cuda_of_the_driver() >= DEPENDENTS_IN_GRAPHS


@functools.cache
def cuda_of_the_driver() -> int:
    """The latest CUDA that the driver knows, as it numbers it (12030 for 12.3); 0 where its library is not found by name. torch does not say."""
    version = ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def launches(devices: Iterable[torch.device]) -> contextlib.AbstractContextManager[None]:
    """Inside it Inductor writes kernels for these devices to be launched as they are to be: as dependents where CUDA graphs launch them, or the user
    asks for it with Inductor's triton.enable_pdl. The host's launches of such kernels take longer than others.
    """
    from torch._inductor import config

    wanted = (by_cuda_graphs() or config.triton.enable_pdl) and not config.cpp_wrapper
    return launched_as_dependents() if wanted and any(map(can_launch_dependents, devices)) else contextlib.nullcontext()
