"""SmoothQuant: even out the channels of each linear's input, so that one static scale serves them all.

After Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2022 (arXiv:2211.10438), equation 4.
A few channels of MiniLM's activations are ten times larger than the rest. A dynamic scale of its own for each token copes with that, one scale for
all tokens does not. Here the input's channel k is divided by a factor f[k] and the weight's column k multiplied by it, which leaves the product as
it was. The paper folds the division into the layer norm before; MiniLM's layer norms also feed the residual, so here it stays a multiplication,
which Inductor fuses with the quantization behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .encoder import Batch

__all__ = ["STRENGTH", "SmoothedLinear", "smooth_"]

STRENGTH = 0.85
"""The paper's alpha: how much of the unevenness goes to the weight, whose scales are per row. Around 0.85 serves MiniLM best."""
SMALLEST = 1e-5


class SmoothedLinear(nn.Module):
    """linear(x * inverse), with a `linear` whose weight [N, K] was multiplied by 1 / inverse [K]."""

    inverse: Tensor

    def __init__(self, linear: nn.Linear, inverse: Tensor) -> None:
        super().__init__()
        self.register_buffer("inverse", inverse)
        self.linear = linear
        with torch.no_grad():
            linear.weight.div_(inverse)

    def forward(self, x: Tensor) -> Tensor:
        """float [..., K] -> [..., N]."""
        return self.linear(x * self.inverse)


class _Inputs:
    """The largest magnitude of each channel of a linear's input over all batches, and the input of the last one."""

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.magnitude: Tensor | None = None

    def __call__(self, linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.last = args[0]
        magnitude = self.last.abs().flatten(0, -2).amax(0)
        self.magnitude = magnitude if self.magnitude is None else torch.maximum(self.magnitude, magnitude)


def smooth_(model: nn.Module, batches: list[Batch], strength: float = STRENGTH) -> None:
    """Put a SmoothedLinear in the place of every nn.Linear of `model`; factors come from the `batches`, one for all linears of one input."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    seen = {name: _Inputs() for name in linears}
    handles = [linears[name].register_forward_pre_hook(seen[name]) for name in linears]
    with torch.no_grad():
        for batch in batches:
            model(*batch)
    for handle in handles:
        handle.remove()
    # While the inputs of the last batch are held, no two share an address by chance.
    sharing: dict[int, list[str]] = {}
    for name, inputs in seen.items():
        sharing.setdefault(id(inputs.last), []).append(name)
    for names in sharing.values():
        inverse = _inverse_factors([linears[name].weight.detach() for name in names], seen[names[0]].magnitude, strength)
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SmoothedLinear(linears[name], inverse))


def _inverse_factors(weights: list[Tensor], magnitude: Tensor | None, strength: float) -> Tensor:
    """1 / f, where f = max|x|^strength / max|w|^(1 - strength) for each channel; bfloat16 holds it exactly, as the model may be cast to that."""
    if magnitude is None:
        raise ValueError("batches must reach every nn.Linear of the model")
    weight_magnitude = torch.cat(weights).abs().amax(0)
    factors = magnitude.clamp(min=SMALLEST) ** strength / weight_magnitude.clamp(min=SMALLEST) ** (1 - strength)
    return (1 / factors).bfloat16().float()
