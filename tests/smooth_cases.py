"""Models for the tests of smooth_quant, and what all of them ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from int8_inductor import smooth_quant

OUTLIERS = torch.tensor([1.0, 1, 1, 30, 1, 1, 0.1, 1])
PRE_SCALE = "act_pre_scale"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(model: nn.Module, *batches: Any, **arguments: Any) -> None:
    smooth_quant(model, list(batches), progress=False, **arguments)


def pre_scaled(model: nn.Module) -> set[str]:
    """The modules that have a pre-scale."""
    return {name.removesuffix("." + PRE_SCALE) for name, _ in model.named_buffers() if name.endswith(PRE_SCALE)}


class TwoOfOneInput(nn.Module):
    """Two linears that share an input, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.after = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x * OUTLIERS
        return self.after(self.left(x) + self.right(x))


class Scaled(nn.Module):
    """A norm as transformers write it, at home in no library; `offset` is 1 where the weight is one from 1, as Gemma's is."""

    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(size)), offset

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.offset + self.weight) * wide.to(hidden.dtype)


class Block(nn.Module):
    """A norm, two linears that read it, and one after them; `use` may do more with what the norm gives."""

    def __init__(self, norm: nn.Module, use: Callable[[Any, Tensor, Tensor], Any] = lambda self, normed, y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.use = norm, use
        self.left, self.right, self.after = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.kept: Any = None
        with torch.no_grad():
            for name, parameter in norm.named_parameters():
                parameter.copy_(randn(8, seed=len(name)).exp() * OUTLIERS)

    def forward(self, x: Tensor) -> Any:
        normed = self.norm(x)
        assert normed.shape[-1] == 8
        return self.use(self, normed, self.after(self.left(normed) * self.right(normed)))
