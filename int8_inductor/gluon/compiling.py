"""Compiling a Gluon kernel. This module imports nothing of the package: its text runs in Inductor's compile workers, which would take seconds to."""

from __future__ import annotations

from typing import Any

__all__ = ["compile_kernel"]


def compile_kernel(source: str, name: str, signature: dict[str, str], aligned: dict[int, int], capability: int, options: dict[str, Any]) -> Any:
    """The function `name` of the module `source`, compiled for that compute capability (90 for 9.0), on any machine; found in Triton's cache.

    signature: Triton's types of the arguments. aligned: argument -> a divisor of its value. options: Triton's.
    """
    import triton
    from torch._inductor.codecache import PyCodeCache
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = getattr(PyCodeCache.load(source), name)
    types = dict(zip(kernel.arg_names, signature.values(), strict=True))
    attrs = {(index,): [["tt.divisibility", divisor]] for index, divisor in aligned.items()}
    return triton.compile(GluonASTSource(kernel, types, {}, attrs), target=GPUTarget("cuda", capability, 32), options=options)
