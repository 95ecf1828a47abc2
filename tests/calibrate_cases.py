"""The model that calibrate's tests calibrate, its batches, and what to look at before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from int8_inductor import Int8Linear, Int8StaticActivationInt8WeightConfig, MappingType, calibrate, quantize_


class Net(nn.Module):
    """Two linears with an activation between; `skip` leaves the second one out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: Tensor, shift: Tensor | float = 0.0, *, skip: bool = False) -> Tensor:
        hidden = nn.functional.gelu(self.first(x)) + shift
        return hidden if skip else self.second(hidden)


def static(mapping: MappingType = MappingType.SYMMETRIC) -> Net:
    model = Net()
    quantize_(model, Int8StaticActivationInt8WeightConfig(act_mapping_type=mapping))
    return model


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BATCHES = [randn(5, 8, seed=seed) * (seed + 1) for seed in range(3)]


def scales(model: nn.Module) -> dict[str, list[float]]:
    return {name: t.tolist() for name, t in model.state_dict().items() if "input_" in name}


def quietly(model: nn.Module, batches: Any = BATCHES, **arguments: Any) -> None:
    calibrate(model, batches, progress=False, **arguments)


def watched(model: nn.Module) -> dict[str, Any]:
    """All that calibrate must leave as it was, but for the scales."""
    return {
        name: (m.training, m._calibrating if isinstance(m, Int8Linear) else None, list(m._forward_pre_hooks), list(m._forward_hooks))
        for name, m in model.named_modules()
    }
