"""Time the variants in turn, so that the machine's noise hits all alike, keep their embeddings, and count the kernels they launch."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from .encoder import Batch
from .variants import Variant

__all__ = ["KERNELS_ARE", "prepare", "run_rounds"]

WARMUPS = 3

KERNELS_ARE = {
    "cpu": "calls of Inductor's compiled kernels and of outermost aten operators that compute or copy (views and allocations left out)",
    "cuda": "kernels that ran on the GPU, those inside CUDA graphs included (copies and fills by the driver left out)",
}
"""What the column "kernels" counts, by device."""

FREEZES = {"cpu": True, "cuda": False}
"""Whether Inductor makes constants of the weights, float and int8, by device: oneDNN packs them then, when the graph is compiled."""

NO_WORK = frozenset(
    "aten::" + name
    for name in (
        "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "contiguous", "detach", "dropout", "empty",
        "empty_like", "empty_strided", "expand", "expand_as", "flatten", "item", "lift_fresh", "narrow", "new_empty", "numpy_T", "permute",
        "reshape", "resolve_conj", "resolve_neg", "select", "set_", "slice", "split", "squeeze", "t", "to", "transpose", "type_as",
        "unflatten", "unsqueeze", "view", "view_as",
    )
)
"""Operators that only describe or allocate memory, or hand on to another operator that does the work."""


def _call(variant: Variant, batch: Batch) -> tuple[Tensor, float]:
    """The embeddings of a batch that lies on the variant's device, and the seconds until they were there."""
    on_gpu = variant.device == "cuda"
    if on_gpu:
        # Variants take turns: without this, CUDA graphs would record a new graph for each order in which they are called.
        torch.compiler.cudagraph_mark_step_begin()
        torch.cuda.synchronize()
    start = time.perf_counter()
    embeddings = variant.run(*batch)
    if on_gpu:
        torch.cuda.synchronize()
    return embeddings, time.perf_counter() - start


def prepare(variants: list[Variant], batch: Batch) -> None:
    """Compile and warm up each variant, and count its kernels and, for int8, its rewritten linears."""
    for number, variant in enumerate(variants, 1):
        print(f"[{number}/{len(variants)}] {variant.name} on {variant.device}: compile and count kernels", file=sys.stderr, flush=True)
        on_device = (batch[0].to(variant.device), batch[1].to(variant.device))
        with torch.inference_mode(), inductor_config.patch(freezing=FREEZES[variant.device]):
            _, variant.compile_seconds = _call(variant, on_device)
            for _ in range(WARMUPS):
                _call(variant, on_device)
            variant.kernels = _count_kernels(variant, on_device)
        if variant.is_int8:
            variant.count_rewritten(batch)


def run_rounds(variants: list[Variant], batches: list[Batch], rounds: int) -> None:
    """Each round takes one batch through every variant, beginning with another one each time; the first len(batches) rounds keep the embeddings."""
    if rounds < len(batches):
        raise ValueError(f"rounds must be at least the {len(batches)} batches, got {rounds}")
    device = variants[0].device
    moved = [(ids.to(device), mask.to(device)) for ids, mask in batches]
    with torch.inference_mode(), tqdm(total=rounds * len(variants), desc=f"measure on {device}", unit="call", file=sys.stderr) as bar:
        for number in range(rounds):
            first = number % len(variants)
            for variant in variants[first:] + variants[:first]:
                embeddings, seconds = _call(variant, moved[number % len(batches)])
                variant.milliseconds.append(seconds * 1e3)
                if number < len(batches):
                    variant.embeddings.append(embeddings.float().cpu())
                bar.update()


def _count_kernels(variant: Variant, batch: Batch) -> int:
    activities = [ProfilerActivity.CPU]
    if variant.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as run:
        _call(variant, batch)
    events = run.events()
    if variant.device == "cuda":
        return sum(_is_gpu_kernel(event) for event in events)
    return sum(_cpu_kernels(event) for event in events if event.cpu_parent is None)


def _is_gpu_kernel(event: Any) -> bool:
    on_gpu = event.device_type.name == "CUDA" and not event.is_user_annotation
    return on_gpu and not event.name.startswith(("Memcpy", "Memset"))


def _cpu_kernels(event: Any) -> int:
    is_compiled = "cpp_fused" in event.name
    is_operator = event.name.startswith("aten::") and event.name not in NO_WORK
    if is_compiled or is_operator:
        return 1
    return sum(_cpu_kernels(child) for child in event.cpu_children)
