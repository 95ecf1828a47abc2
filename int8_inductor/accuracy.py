"""Signal to quantization noise, layer by layer: what `explain(..., sqnr=...)` measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .quantized_linear import QuantizedLinear

__all__ = ["layer_sqnr"]


@dataclass
class _Power:
    """Sums of squares, over all calls of a layer, of what it should give and of how far it is from it."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, exact: Tensor, got: Tensor) -> None:
        exact = exact.double()
        self.signal += exact.square().sum().item()
        self.noise += (got.double() - exact).square().sum().item()

    @property
    def ratio_db(self) -> float:
        """10 log10(signal / noise); infinity where the two are equal."""
        if self.noise == 0.0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def layer_sqnr(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], reference: nn.Module | None = None) -> dict[str, float]:
    """SQNR in dB of the output of each quantized linear that runs, by name, from one eager run without gradients.

    Each layer is judged by itself, on an exact input, so the errors of the layers before it are not in its figure.

    reference: None: `model` runs, and a layer is compared with the product of its input, unquantized, and its dequantized weight: the
    figure says what quantizing the activation costs. Otherwise the float model that `model` was made of: it runs, and a layer is
    compared, on the input of the nn.Linear of the same name there, with that: the figure says what both quantizations cost.
    ValueError where `reference` lacks such an nn.Linear.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    watched: dict[str, nn.Module] = {**layers} if reference is None else {name: _counterpart(reference, name, layers[name]) for name in layers}
    powers = {name: _Power() for name in layers}
    with ExitStack() as stack:
        for name, module in watched.items():
            hook = _against_itself(powers[name]) if reference is None else _against_reference(powers[name], layers[name])
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        (model if reference is None else reference)(*inputs, **kwargs)
    return {name: power.ratio_db for name, power in powers.items() if power.signal or power.noise}


def _counterpart(reference: nn.Module, name: str, layer: QuantizedLinear) -> nn.Linear:
    found = dict(reference.named_modules()).get(name)
    if not isinstance(found, nn.Linear) or (found.in_features, found.out_features) != (layer.in_features, layer.out_features):
        got = "none" if found is None else f"{type(found).__name__}({', '.join(map(str, getattr(found, 'weight', torch.empty(0)).shape[::-1]))})"
        raise ValueError(f"sqnr must be a float model with an nn.Linear({layer.in_features}, {layer.out_features}) {name!r}, got {got}")
    return found


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]


def _against_itself(power: _Power) -> Hook:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        assert isinstance(layer, QuantizedLinear)
        x = args[0] if args else kwargs["x"]
        power.add(layer.to_linear()(x.float()), output)

    return hook


def _against_reference(power: _Power, layer: QuantizedLinear) -> Hook:
    def hook(linear: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        power.add(output, layer(args[0] if args else kwargs["input"]))

    return hook
