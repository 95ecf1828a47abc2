"""`calibrate`: run real batches through a model and give every static `Int8Linear` the scale of the activations that reached it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .granularity import PerTensor
from .linear import Int8Linear
from .observers import Extremes, MinMaxObserver, Observer

__all__ = ["calibrate"]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    observer: Observer[Any] = MinMaxObserver(),  # noqa: B008 - frozen
    progress: bool = True,
) -> None:
    """Set `input_scale` (and `input_zero_point` when asymmetric) of every static Int8Linear in `model` from batches: of all or, on an error, none.

    While it runs, the static layers multiply the input as it is with the dequantized weight, so that each layer sees what it would if the others'
    activations were exact. The model runs without gradients, eagerly even where it is compiled, and in the mode that it is in: call
    `model.eval()` first, or dropout and batch norm do what they do in training.

    Args:
        model: any module with Int8Linear layers made with static=True; those that are calibrated already are calibrated anew.
        batches: an iterable of batches: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments of model.forward.
        observer: `MinMaxObserver()`, `PercentileObserver(...)`, `MSEObserver()`, or an object of another subclass of `Observer`.
        progress: show a progress bar on stderr.

    Raises:
        TypeError: an argument, or a batch, is of the wrong type.
        ValueError: no static Int8Linear in the model, one of them on the meta device, no batches, a layer that no batch reaches, or NaN or
            infinity in the input of a layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_batches(batches)
    if not isinstance(observer, Observer):
        raise TypeError(f"observer must be an Observer such as MinMaxObserver(), got {observer!r}")
    layers = _static_layers(model)
    seen = {name: observer.start() for name in layers}
    with _observing(layers, seen), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for _ in run_batches(model, batches, "calibrate", progress):
            pass
    for name in layers:
        if seen[name].count == 0:
            raise ValueError(f"batches must reach every static Int8Linear, got none that reaches {name!r}")
    # In inference mode the scales would be inference tensors, and stay so.
    with torch.inference_mode(False):
        ranges = {name: observer.clip_range(seen[name], layer.act_mapping_type) for name, layer in layers.items()}
        for name, layer in layers.items():
            clip_range = torch.tensor(ranges[name], dtype=torch.float32, device="cpu")
            scale, zero_point, _ = layer.act_mapping_type.choose(clip_range, PerTensor())
            layer.set_input_scale(scale, zero_point)


def _static_layers(model: nn.Module) -> dict[str, Int8Linear]:
    """The static layers by name; one that several attributes share comes once, by its first name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Int8Linear) and m.static}
    if not layers:
        raise ValueError(
            f"model must have an Int8Linear with static=True (quantize_ with Int8StaticActivationInt8WeightConfig makes them), "
            f"got {type(model).__name__} without one"
        )
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(f"model must have its weights loaded, got {name!r} on the meta device")
    return layers


@contextmanager
def _observing(layers: dict[str, Int8Linear], seen: dict[str, Any]) -> Iterator[None]:
    """Let `seen` take in what reaches each layer, and the layers compute with unquantized inputs, until the end of the block."""
    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(_Hook(name, seen[name]), with_kwargs=True))
            layer._calibrating = True
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer._calibrating = False


class _Hook:
    """A forward pre-hook that shows a layer's input to its statistics."""

    def __init__(self, name: str, seen: Extremes) -> None:
        self.name, self.seen = name, seen

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("x")
        assert isinstance(layer, Int8Linear)
        if not isinstance(x, Tensor) or x.numel() == 0 or x.shape[-1] != layer.in_features:
            return  # forward, next, says what is wrong with no tensor or its shape; an empty one (an expert without tokens) is in order
        x = layer.pre_scaled(x.detach())
        low, high = torch.stack(torch.aminmax(x)).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"batches must give finite activations, got NaN or infinity in the input of {self.name!r}")
        self.seen.update(x, low, high)


def check_batches(batches: Any) -> None:
    """TypeError for what cannot be an iterable of batches."""
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, got {type(batches).__name__}")


def run_batches(model: nn.Module, batches: Iterable[Any], what: str, progress: bool) -> Iterator[Any]:
    """Call `model` on each batch (a tensor, positional arguments or keyword arguments) and yield what it gives; ValueError when there is none."""
    count = 0
    with tqdm(batches, desc=what, unit="batch", disable=not progress) as bar:
        for count, batch in enumerate(bar, 1):
            if isinstance(batch, Tensor):
                yield model(batch)
            elif isinstance(batch, (tuple, list)):
                yield model(*batch)
            elif isinstance(batch, Mapping):
                yield model(**batch)
            else:
                raise TypeError(f"batch {count - 1} must be a tensor, a tuple or list, or a mapping, got {type(batch).__name__}")
    if count == 0:
        raise ValueError("batches must have at least one batch, got none")
