"""Inductor's compile workers: kernels handed to them before they are needed, and found by this process when they are done."""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

__all__ = ["share_triton_cache", "start_compiling", "submit_to_compile_workers", "wait_for_compile_workers"]


def wait_for_compile_workers() -> None:
    """Return once Inductor's compile workers take work; at once where there are none (one compile thread)."""
    from torch._inductor.async_compile import AsyncCompile

    _assemble_as_the_workers_do()
    AsyncCompile.wait_pool_ready()


def _assemble_as_the_workers_do() -> None:
    """From here on this process assembles with the ptxas that torch brings, as Inductor's compile workers do.

    Triton's cache has results under the version of ptxas. With Triton's own this process would not find what the workers compiled, and compile every
    choice again before it times it, one after the other (torch 2.11 to 2.15: AsyncCompile.triton sets the path only where there are no workers).
    """
    from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path

    before = os.environ.get("TRITON_PTXAS_PATH")
    _set_triton_ptxas_path()
    if os.environ.get("TRITON_PTXAS_PATH") != before:
        from triton.backends.nvidia import compiler

        # Both remember the version of the ptxas that they saw first.
        compiler.get_ptxas_version.cache_clear()
        compiler.CUDABackend.hash.cache_clear()


def start_compiling(choice: Any) -> None:
    """Have a worker compile a TritonTemplateCaller's kernel. Inductor finds it under way, or done, when it compiles the choice itself."""
    from torch._inductor.async_compile import AsyncCompile

    compiler = AsyncCompile()
    if compiler.use_process_pool():
        source = Path(choice.bmreq.module_path).read_text()
        compiler.triton(kernel_name=choice.bmreq.kernel_name, source_code=source)


def share_triton_cache(device: torch.device) -> dict[str, str]:
    """Have Triton in this process use the cache that Inductor gives it for a device; and the environment in which a compile worker does too."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    directory = os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index or 0))
    return {"TORCHINDUCTOR_CACHE_DIR": cache_dir(), "TRITON_CACHE_DIR": directory}


_IN_WORKER = """
import os
from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path
_set_triton_ptxas_path()
os.environ.update({environment!r})
"""


def submit_to_compile_workers(definitions: str, call: str, device: torch.device) -> Future[None] | None:
    """Run Python text in one of Inductor's compile workers, as it compiles there for `device`; None where there are no workers."""
    from torch._inductor.async_compile import AsyncCompile

    if not AsyncCompile.use_process_pool():
        return None
    text = f"{definitions}{_IN_WORKER.format(environment=share_triton_cache(device))}{call}\n"
    future: Future[None] = AsyncCompile.process_pool().submit(exec, text, {})
    return future
