"""Configs by which `quantize_` converts stacked experts, and nothing else: routers, shared experts and every other linear stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..quantize import Int8Config, keep_hooks
from .layouts import GROUP_SIZES
from .module import QuantizedExperts, is_experts

__all__ = ["Int4WeightOnlyExpertsConfig", "Int8DynamicActivationInt4ExpertsConfig", "Int8DynamicActivationInt8ExpertsConfig"]


class ExpertsConfig(Int8Config):
    """Base of the configs for stacked experts."""

    def choose(self, model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None) -> Mapping[str, nn.Module]:
        """The stacked experts to quantize, by name: all, or those that `filter_fn` chooses."""
        chosen = {name: module for name, module in model.named_modules() if (is_experts(module) if filter_fn is None else filter_fn(module, name))}
        for name, module in chosen.items():
            if isinstance(module, QuantizedExperts):
                raise ValueError(f"{name or 'model'} is a QuantizedExperts already: experts can be quantized once")
            if not is_experts(module):
                raise TypeError(f"filter_fn must choose stacked experts, got {type(module).__name__} for {name or 'model'!r}")
            if module is model:
                raise ValueError("model is itself a module of experts, which has no parent to swap it in: use QuantizedExperts.from_experts(model)")
        if not chosen:
            already = sum(isinstance(module, QuantizedExperts) for module in model.modules())
            detail = f"; {already} are quantized already" if already else ""
            raise ValueError(f"model has no stacked experts that filter_fn chooses, got {type(model).__name__}{detail}")
        return chosen

    def replace(self, name: str, module: nn.Module, device: torch.device | str | int | None) -> nn.Module:
        """The quantized experts that take the place of `module`."""
        try:
            converted = self.from_experts(module, device)
        except (TypeError, ValueError) as error:
            raise type(error)(f"cannot quantize {name!r}: {error}") from error
        return keep_hooks(module, converted)

    def from_experts(self, module: nn.Module, device: torch.device | str | int | None) -> QuantizedExperts:
        """`module` in this config's layout."""
        raise NotImplementedError(f"{type(self).__name__} must define from_experts")


@dataclass(frozen=True)
class Int8DynamicActivationInt8ExpertsConfig(ExpertsConfig):
    """W8A8: int8 experts with a scale per row; activations with a scale per token, hidden ones per token and 128 columns."""

    def from_experts(self, module: nn.Module, device: torch.device | str | int | None) -> QuantizedExperts:
        return QuantizedExperts.from_experts(module, device=device)


@dataclass(frozen=True)
class Int8DynamicActivationInt4ExpertsConfig(ExpertsConfig):
    """W4A8: int4 experts with a scale per row and group of `group_size` (32, 64 or 128) along K; activations as W8A8's."""

    group_size: int = 128

    def __post_init__(self) -> None:
        _check_group_size(self.group_size)

    def from_experts(self, module: nn.Module, device: torch.device | str | int | None) -> QuantizedExperts:
        return QuantizedExperts.from_experts(module, group_size=self.group_size, device=device)


@dataclass(frozen=True)
class Int4WeightOnlyExpertsConfig(ExpertsConfig):
    """W4A16: the same int4 experts, and activations as they are."""

    group_size: int = 128

    def __post_init__(self) -> None:
        _check_group_size(self.group_size)

    def from_experts(self, module: nn.Module, device: torch.device | str | int | None) -> QuantizedExperts:
        return QuantizedExperts.from_experts(module, group_size=self.group_size, weight_only=True, device=device)


def _check_group_size(group_size: object) -> None:
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {group_size!r}")
