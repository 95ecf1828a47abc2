"""`smooth_quant`: even out the channels of each linear's input before the model is quantized, so that one scale serves them all.

After Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2022 (arXiv 2211.10438),
equation 4. A few channels of a transformer's activations are many times larger than the rest, and int8 steps that span them leave the rest few
values. The input's channel k is divided by a factor s[k] and the weight's column k multiplied by it, which leaves the product as it was:

    s[k] = max|x[:, k]| ** alpha / max|weight[:, k]| ** (1 - alpha)

The division goes into the weight and bias of the norm that makes the input, where observing.py finds that this changes nothing else. Elsewhere
the linear keeps its float weight and gets a buffer `act_pre_scale` = 1 / s, which its forward does not read: it tells `quantize_` to divide the
weight by it, and the quantized layer to multiply its input by it, in the kernel that quantizes it. So the float model computes what it did.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import check_batches, run_batches
from .observing import Group, Watch
from .quantize import choose_linears, is_linear

__all__ = ["smooth_quant"]

log = logging.getLogger("int8_inductor")

SMALLEST_SHARE = 2.0**-10
"""A channel whose largest value is below this share of the largest channel's counts as that large: what was silent in the batches may speak later."""


def smooth_quant(
    model: nn.Module,
    batches: Iterable[Any],
    alpha: float = 0.5,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    progress: bool = True,
) -> None:
    """Smooth the inputs of the nn.Linear layers of `model`, in place: of all that were asked for or, on an error, of none. Then call `quantize_`.

    The float model computes the same as before, up to the rounding of the weights that a factor went into. The model runs without gradients, eagerly
    even where it is compiled, in the mode that it is in: call `model.eval()` first. What a norm's output is used for is seen in these runs:
    let the batches take every path that the model is used with.

    Args:
        model: any module that contains nn.Linear layers, not yet quantized.
        batches: an iterable of batches: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments of model.forward.
        alpha: how much of the unevenness goes to the weight, from 0 (none) to 1 (all). More where activations have one static scale.
        filter_fn: (module, fully qualified name) -> whether to smooth it; by default every nn.Linear, as for `quantize_`.
        progress: show a progress bar on stderr.

    Raises:
        TypeError: an argument, or a batch, is of the wrong type.
        ValueError: alpha outside [0, 1], nothing to smooth, no batches, a layer that no batch reaches, or NaN or infinity in the input or the weight
            of a layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be a number from 0 to 1, got {alpha!r}")
    check_batches(batches)
    linears = choose_linears(model, filter_fn or is_linear)
    with torch.no_grad():
        watch = Watch(model, linears)
        with watch, torch.compiler.set_stance("force_eager"):
            for output in run_batches(model, batches, "smooth_quant", progress):
                watch.end_of_batch(output)
                del output
        groups = watch.groups()
        # In inference mode the new parameters would be inference tensors, and stay so.
        with torch.inference_mode(False):
            changes = [_change(group, alpha) for group in groups]
            for apply in changes:
                apply()
    folded = sum(group.norm is not None for group in groups)
    log.info("smooth_quant: %d linears in %d groups of one input, %d of which a norm makes that took the factors", len(linears), len(groups), folded)


def _change(group: Group, alpha: float) -> Callable[[], None]:
    """What to do to the modules of a group, checked and computed, not yet done."""
    for name, linear in group.linears.items():
        if not bool(torch.isfinite(linear.weight).all()):
            raise ValueError(f"the weight of {name!r} must be finite, got NaN or infinity")
    factors = _factors(group, alpha)
    norm = group.norm
    if norm is not None:
        weights = [(linear, "weight", (linear.weight.float() * factors).to(linear.weight.dtype)) for linear in group.linears.values()]
        vectors = [(norm, name, (p.float() / factors).to(p.dtype)) for name, p in norm.named_parameters()]
        if all(bool(torch.isfinite(value).all()) for _, _, value in [*weights, *vectors]):
            return lambda: _fold([*weights, *vectors])
    return lambda: _attach(list(group.linears.values()), 1 / factors)


def _factors(group: Group, alpha: float) -> Tensor:
    """s [K] in float32: one for all linears of one input, so that they share its quantization."""
    x = group.magnitude
    weight = torch.stack([linear.weight.float().abs().amax(0) for linear in group.linears.values()]).amax(0)
    if not bool(x.any()) or not bool(weight.any()):
        return torch.ones_like(x)
    x, weight = (each.clamp(min=each.max() * SMALLEST_SHARE) for each in (x, weight))
    return x**alpha / weight ** (1 - alpha)


def _fold(values: list[tuple[nn.Module, str, Tensor]]) -> None:
    # New parameters, not new values of the old ones: another module may hold those too, as an embedding does that is tied to a linear.
    for module, name, value in values:
        setattr(module, name, nn.Parameter(value, requires_grad=getattr(module, name).requires_grad))
        module._buffers.pop("act_pre_scale", None)


def _attach(linears: list[nn.Linear], pre_scale: Tensor) -> None:
    # Each its own copy: state dicts with shared tensors are refused by safetensors.
    for linear in linears:
        linear.register_buffer("act_pre_scale", pre_scale.clone())
