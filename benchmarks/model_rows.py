"""One row of the model benchmark: a workload made ready, and a variant of it prepared, compiled, checked and timed."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from int8_inductor import autotune
from int8_inductor.explain import REWRITTEN, Report, recording

from . import common
from .common import OK, WRONG
from .timing import time_call
from .variants import CALIBRATION_BATCHES, Batches, Variant
from .workloads import Workload

LEAST_SQNR = 10.0
"""dB to the float32 eager model under which a result counts as wrong, not as coarse: INT8 of random weights stands above 20."""
MEGA = 1e6


@dataclass
class Setting:
    """A workload made ready: the float model, one input, what the model gives for it in its own dtype and in float32."""

    workload: Workload
    device: torch.device
    dtype: torch.dtype
    base: nn.Module
    example: Tensor
    eager: Tensor
    exact: Tensor

    def batches(self) -> Batches:
        """Random batches to calibrate on, other ones than the example."""
        return [(self.workload.draw(self.device, self.dtype),) for _ in range(CALIBRATION_BATCHES)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> int:
    """Give back what nobody holds; bytes that the allocator still has reserved on a GPU, else 0."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def setting_of(workload: Workload, base: nn.Module, device: torch.device) -> Setting:
    """Draw the input and run the float model on it, eagerly, in the device's dtype and in float32."""
    dtype = common.float_dtype(device)
    example = workload.draw(device, dtype)
    eager = base(example).clone()
    exact = copy.deepcopy(base).float()(example.float() if example.is_floating_point() else example)
    return Setting(workload, device, dtype, base, example, eager, exact)


def sqnr_db(out: Tensor, reference: Tensor) -> float | None:
    """Signal to quantization noise ratio in dB, None where the two are equal; ValueError for shapes that differ."""
    if out.shape != reference.shape:
        raise ValueError(f"output must have shape {list(reference.shape)}, got {list(out.shape)}")
    reference = reference.double()
    noise = (out.double() - reference).square().sum().item()
    return None if noise == 0 else 10 * math.log10(reference.square().sum().item() / noise)


def kernels_of(call: Callable[[], Any], device: torch.device) -> int | None:
    """Kernels that one call launches on a GPU, copies and fills by the driver left out; None on the CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize(device)
    on_device = [each for each in profiler.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not each.name.startswith(("Memcpy", "Memset")) for each in on_device)


@contextlib.contextmanager
def compile_cache(directory: str) -> Iterator[None]:
    """Dynamo and Inductor start afresh, with their caches on disk in `directory`."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees
    from torch._inductor.utils import clear_caches

    torch._dynamo.reset()
    clear_caches()
    if torch.cuda.is_available():
        # Dynamo's reset does this for its own backends alone in torch 2.11, and the graphs' memory would count for the next variant.
        reset_cudagraph_trees()
    with mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": directory, "TRITON_CACHE_DIR": os.path.join(directory, "triton")}):
        yield


@contextlib.contextmanager
def counting_tunings() -> Iterator[dict[str, int]]:
    """What is tuned inside the block: `products` whose kernel is chosen by timing, `candidates` of ours timed for that, and `others`: Inductor's
    kernels of several configs. The dictionary is filled when the block ends.
    """
    from torch._dynamo.utils import counters
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    counts = {"products": 0, "candidates": 0, "others": 0}
    products = counters["inductor"]["select_algorithm_autotune"]

    def counted(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        # Not a mock: it would keep the tensors of every call, and CUDA graphs refuse to be recorded while their pool holds any.
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return fn(*args, **kwargs)

        return call

    with (
        mock.patch.object(autotune, "_median_ms", counted("candidates", autotune._median_ms)),
        mock.patch.object(CachingAutotuner, "autotune_to_one_config", counted("others", CachingAutotuner.autotune_to_one_config)),
    ):
        yield counts
    counts["products"] = counters["inductor"]["select_algorithm_autotune"] - products


@dataclass
class First:
    """A compiled model and what its first call took: seconds, graphs that the passes ran over (those from a cache are not among them), tunings."""

    model: nn.Module
    call: Callable[[], Any]
    seconds: float
    report: Report
    tuned: dict[str, int]


def prepared(setting: Setting, variant: Variant) -> nn.Module:
    """A copy of the model, as the variant has it compiled."""
    return variant.prepare(copy.deepcopy(setting.base), setting.batches)


def first_call(setting: Setting, variant: Variant, model: nn.Module) -> First:
    """Compile a prepared model, and call it once."""
    release(setting.device)
    compiled = variant.compiled(model)
    call = lambda: compiled(setting.example)  # noqa: E731 - one name for what every helper below runs
    synchronize(setting.device)
    start = time.monotonic()
    # What `explain` reports, taken from the compilation that is measured instead of from another one. Dynamo reads the flag `freezing` itself.
    with recording() as report, counting_tunings() as tuned, inductor_config.patch(freezing=variant.freezing):
        call()
        synchronize(setting.device)
    return First(model, call, time.monotonic() - start, report, tuned)


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor's data takes; a tensor subclass, like torchao's, says the dtype that it stands for, so its parts are asked."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, part)) for part in parts)
    return tensor.nbytes


def linears_of(report: Report) -> dict[str, int]:
    """How many linears of the compiled graphs became a scaled_mm, of how many there are."""
    return {"rewritten": sum(each.status == REWRITTEN for each in report.linears), "present": len(report.linears)}


def measure(setting: Setting, variant: Variant) -> dict[str, Any]:
    """Prepare, compile, check, time: the measured part of a row."""
    device = setting.device
    reserved = release(device)
    first = first_call(setting, variant, prepared(setting, variant))
    call, tensors = first.call, [*first.model.parameters(), *first.model.buffers()]
    row: dict[str, Any] = {"weights_mb": sum(map(stored_bytes, tensors)) / MEGA}
    row["compile_s"] = None if variant.mode is None else first.seconds
    row["tuned"] = None if variant.mode is None else first.tuned
    row["linears"] = linears_of(first.report) if variant.group == "ours" else None
    # The second call records the CUDA graphs of the modes that have them, the third replays.
    call()
    call()
    row["peak_mb"] = peak_mb(call, device, reserved)
    out = call().clone()
    row |= {"sqnr_db": sqnr_db(out, setting.eager), "sqnr_float32_db": sqnr_db(out, setting.exact)}
    row |= time_call(call, device, warmup_ms=50, rep_ms=250).record()
    row["ms_again"] = time_call(call, device, warmup_ms=10, rep_ms=150).ms
    row["kernels"] = kernels_of(call, device)
    return row | verdict(row["sqnr_float32_db"])


def verdict(sqnr_float32_db: float | None) -> dict[str, Any]:
    """The status of a row, by its result's ratio to the float32 model's, and why."""
    wrong = sqnr_float32_db is not None and sqnr_float32_db < LEAST_SQNR
    reason = f"SQNR to float32 is {sqnr_float32_db:.1f} dB, under {LEAST_SQNR}" if wrong else None
    return {"status": WRONG if wrong else OK, "reason": reason}


def peak_mb(call: Callable[[], Any], device: torch.device, reserved: int) -> float | None:
    """Megabytes that the allocator holds at most while `call` runs, beyond `reserved` bytes: weights, activations and CUDA-graph pools."""
    if device.type != "cuda":
        return None
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_reserved(device) - reserved) / MEGA
