"""Inductor's real Triton code on a machine without a GPU: generated for the CPU device and run in Triton's interpreter, with NumPy.

Import before anything compiles. Slow and exact; meant for small shapes.
"""

from __future__ import annotations

import math
import os
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import torch._inductor.config as inductor_config
import triton.language as tl
from torch._inductor.codegen.triton import TritonOverrides
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._inductor.virtualized import ops
from triton.backends.compiler import GPUTarget
from triton.language.extra import libdevice
from triton.runtime import driver, interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps, TensorHandle


class InterpreterDriver:
    """The few answers that Inductor asks of an active Triton driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Any:
        def benchmark(fn: Any, quantiles: Any = None, **_: Any) -> list[float]:
            fn()
            return [1.0] * len(quantiles or [0])

        return benchmark


def _on_numpy(fn: Any) -> Any:
    """libdevice functions are empty under the interpreter; compute them with NumPy."""

    def call(x: Any, *others: Any, **_: Any) -> Any:
        if not isinstance(x, tl.tensor):
            return fn(x)
        data = [each.handle.data for each in (x, *others) if isinstance(each, tl.tensor)]
        with np.errstate(all="ignore"):
            return tl.core.tensor(TensorHandle(fn(*data).astype(data[0].dtype), x.handle.dtype), x.type)

    return call


_LIBDEVICE = {
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "tanh": np.tanh,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "rsqrt": lambda v: 1 / np.sqrt(v),
    "nearbyint": np.rint,
    "rint": np.rint,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "sin": np.sin,
    "cos": np.cos,
    "isnan": np.isnan,
    "isinf": np.isinf,
    "fast_dividef": np.divide,
}


def _patch_language_once_a_kernel() -> None:
    """The interpreter replaces the language's functions anew at each call of a device function: most of its time. Once a kernel will do."""
    patch_language = interpreter._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda fn: patch_language(everything)
    InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


def _reduce_with_numpy() -> None:
    """Inductor's max and min propagate NaN, so the interpreter does not know them and calls them element by element. NumPy's propagate it too."""
    reduce = ReduceOps.apply_impl
    known = {triton_helpers.maximum: np.max, triton_helpers.minimum: np.min}

    def apply_impl(self: ReduceOps, values: tuple[Any, ...]) -> Any:
        if self.combine_fn in known:
            return self.min_max(values[0], val_reduce_op=known[self.combine_fn])
        return reduce(self, values)

    ReduceOps.apply_impl = apply_impl


def _widened(tensor: TensorHandle) -> TensorHandle:
    """bfloat16, which the interpreter holds as its bits, as float32."""
    if tensor.dtype.scalar != tl.bfloat16:
        return tensor
    return TensorHandle((np.array(tensor.data).astype(np.uint32) << 16).view(np.float32), tl.float32)


def _know_bfloat16() -> None:
    """The interpreter cuts off the bits that bfloat16 lacks, where GPUs round to nearest, and takes its bits for its value in all other casts and in
    matrix products.
    """
    cast, create_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, wanted: Any) -> TensorHandle:
        if source.dtype.scalar == wanted.scalar or tl.bfloat16 not in (source.dtype.scalar, wanted.scalar):
            return cast(self, source, wanted)
        if wanted.scalar != tl.bfloat16:
            return cast(self, _widened(source), wanted)
        rounded = torch.from_numpy(np.array(source.data).astype(np.float32)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(self, _widened(a), _widened(b), *rest)


def _saturating_round_to_int(x: Any, dtype: torch.dtype) -> Any:
    """Inductor quantizes with round_to_int on the CPU device alone, where its C++ saturates; its Triton code, which no CPU runs, does not."""
    low, high = (ops.constant(float(limit), torch.float32) for limit in (torch.iinfo(dtype).min, torch.iinfo(dtype).max))
    return ops.to_dtype(ops.minimum(ops.maximum(ops.round(x), low), high), dtype)


def _largest_config_alone() -> None:
    """Of the configs of a kernel that Inductor would time, the one of the fewest programs, each of which takes the interpreter milliseconds."""
    init = CachingAutotuner.__init__

    def with_one(self: CachingAutotuner, *args: Any, configs: list[Any], **kwargs: Any) -> None:
        one = configs if len(configs) == 1 else [max(configs, key=lambda config: math.prod(config.kwargs.values()))]
        init(self, *args, configs=one, **kwargs)

    CachingAutotuner.__init__ = with_one


def install() -> None:
    """Route Inductor's CPU device to Triton's interpreter for the rest of the process."""
    driver.set_active(InterpreterDriver())
    inductor_config.cpu_backend = "triton"
    inductor_config.compile_threads = 1
    for name, fn in _LIBDEVICE.items():
        setattr(libdevice, name, _on_numpy(fn))
    _patch_language_once_a_kernel()
    _reduce_with_numpy()
    _know_bfloat16()
    _largest_config_alone()
    TritonOverrides.round_to_int = staticmethod(_saturating_round_to_int)
