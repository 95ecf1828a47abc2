"""Kernel preference: which implementation runs a product on which device."""

from __future__ import annotations

import enum

import torch

from ._compat import CompileError, has_triton_package

__all__ = ["KernelPreference", "KernelPreferenceError", "resolve"]

MIN_CAPABILITY = (8, 0)
"""First compute capability whose int8 tensor cores Triton drives."""


class KernelPreference(str, enum.Enum):
    """AUTO: what is faster for the device. TRITON: the templates of this package. TORCH: aten._int_mm, or what int_mm.py or
    onednn has in its place, with Inductor's epilogue around it.
    """

    AUTO = "auto"
    TRITON = "triton"
    TORCH = "torch"


class KernelPreferenceError(CompileError):
    """A kernel preference that this machine cannot meet."""


def parse(value: str | KernelPreference) -> KernelPreference:
    """A KernelPreference from itself or from its value; ValueError otherwise."""
    try:
        return KernelPreference(value.lower() if isinstance(value, str) else value)
    except ValueError:
        allowed = ", ".join(repr(each.value) for each in KernelPreference)
        raise ValueError(f"kernel_preference must be one of {allowed}, got {value!r}") from None


def _why_not_triton(device: torch.device) -> str | None:
    """Why the templates cannot run on `device`, or None when they can."""
    from torch._inductor import config as inductor_config

    if device.type == "cpu":
        return None if inductor_config.cpu_backend == "triton" else "Inductor's CPU backend is not Triton"
    if device.type != "cuda":
        return f"there is no template for {device.type}"
    if torch.version.hip is not None:
        return "the templates are for NVIDIA GPUs"
    if not has_triton_package():
        return "the triton package is not installed (pip install triton)"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return None


def runs_triton(device: torch.device) -> bool:
    """Whether Inductor's pointwise code for `device` is Triton, and the templates can run there."""
    return _why_not_triton(device) is None


def resolve(preference: KernelPreference, device: torch.device) -> KernelPreference:
    """TRITON or TORCH for a preference and a device. KernelPreferenceError where the preference cannot be met, or a GPU has no triton."""
    if preference is KernelPreference.TORCH:
        return preference
    why_not = _why_not_triton(device)
    if why_not is None:
        return KernelPreference.TRITON
    if preference is KernelPreference.TRITON:
        raise KernelPreferenceError(f"kernel_preference 'triton' cannot be met on {device}: {why_not}; use 'torch' or 'auto'")
    if device.type == "cuda" and not has_triton_package():
        raise KernelPreferenceError(f"{device} needs triton: {why_not}; or ask for kernel_preference 'torch'")
    return KernelPreference.TORCH
