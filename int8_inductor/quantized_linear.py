"""`QuantizedModule`: plain buffers that casts and checkpoints keep; `QuantizedLinear`: what linear layers with quantized weights have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import reference
from .granularity import check_scale

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["QuantizedLinear", "QuantizedModule", "check_features", "check_weight_scale", "checked_weight", "divided_weight"]


class QuantizedModule(nn.Module):
    """A module with integer weights and float32 scales in ordinary buffers. Scales stay float32 under `.to(dtype)`, `.half()` and `.bfloat16()`."""

    INTEGERS: ClassVar[dict[str, torch.dtype]]
    """Integer buffers, weights first, and the dtype that each has in a state dict."""
    SCALES: ClassVar[tuple[str, ...]]
    """float32 buffers; one that a module lacks is None."""
    ZERO_SCALES: ClassVar[bool] = False
    """Whether one of them may be 0."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # Module.to(dtype) casts every floating-point buffer. Scales pass through it as int32 bits: they move, and keep their precision.
        scales = {name: scale for name in self._scale_names() if (scale := getattr(self, name)) is not None}
        moved = {name: fn(scale.view(torch.int32)) for name, scale in scales.items()}
        for name, bits in moved.items():
            if bits.dtype != torch.int32:
                weight = str(next(iter(self.INTEGERS.values()))).removeprefix("torch.")
                raise TypeError(
                    f"{type(self).__name__} keeps its weight {weight} and its scales float32, "
                    f"got a cast of all buffers to {bits.dtype}: use .to(dtype)"
                )
            scales[name] = bits.view(torch.float32)
        self._buffers.update(dict.fromkeys(scales))
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(scales)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, dtype in self.INTEGERS.items():
            if (ints := state_dict.get(prefix + name)) is not None and ints.dtype != dtype:
                raise TypeError(f"{prefix}{name} must be {dtype}, got {ints.dtype}")
        for name in self._scale_names():
            if (scale := state_dict.get(prefix + name)) is not None and not self._is_unset(name, scale):
                check_scale(prefix + name, scale, zeros=self.ZERO_SCALES and name in self.SCALES)
        self._before_load(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _before_load(self, state_dict: dict[str, Any], prefix: str) -> None:
        """What a module changes about its buffers for a state dict that has been checked."""

    def _scale_names(self) -> tuple[str, ...]:
        """The buffers that stay float32."""
        return self.SCALES

    def _is_unset(self, name: str, scale: Tensor) -> bool:
        """Whether what a state dict has as scale `name` says that there is none yet."""
        return False


class QuantizedLinear(QuantizedModule):
    """A drop-in for nn.Linear with an integer `weight` of N rows, float32 scales, and `bias` [N] or None: all ordinary buffers.

    So is `act_pre_scale`, float32 [K] or None: x is multiplied by it, channel by channel, before anything else is done with it, and the weight was
    divided by it before it was quantized (torchao's name; `smooth_quant` chooses it). A state dict that has the weight says whether there is one.
    A subclass registers the buffers, names them here, and defines `dequantized_weight` and `_linear`, in plain aten arithmetic: that is what the
    layer computes.
    """

    INTEGERS: ClassVar[dict[str, torch.dtype]] = {"weight": torch.int8}
    SCALES: ClassVar[tuple[str, ...]] = ("weight_scale",)

    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None
    act_pre_scale: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("act_pre_scale", None)

    def dequantized_weight(self) -> Tensor:
        """float32 [N, K]: what the product is taken with, pre-scaled activations on the other side."""
        raise NotImplementedError(f"{type(self).__name__} must define dequantized_weight")

    def _linear(self, x: Tensor) -> Tensor:
        """y [..., N] of an x [..., K] that has been checked and pre-scaled; autocast is off."""
        raise NotImplementedError(f"{type(self).__name__} must define _linear")

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float32, bfloat16 or float16 -> [..., N] of the same dtype (autocast's, where autocast is on)."""
        _check_input(x, self)
        device_type = x.device.type
        out_dtype = x.dtype
        # meta has no autocast. (torch.amp.is_autocast_available would say so, but breaks Dynamo's graph in torch 2.11.)
        if not x.is_meta and torch.is_autocast_enabled(device_type):
            out_dtype = torch.get_autocast_dtype(device_type)
            with torch.autocast(device_type, enabled=False):
                return self._linear(self.pre_scaled(x)).to(out_dtype)
        return self._linear(self.pre_scaled(x)).to(out_dtype)

    def pre_scaled(self, x: Tensor) -> Tensor:
        """x [..., K] itself, or x * act_pre_scale in float32."""
        return x if self.act_pre_scale is None else x.float() * self.act_pre_scale

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """An nn.Linear with the dequantized weight, times the pre-scale where there is one, in `dtype`."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
        weight = self.dequantized_weight()
        linear.weight = nn.Parameter((weight if self.act_pre_scale is None else weight * self.act_pre_scale).to(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return linear.train(self.training)

    def _before_load(self, state_dict: dict[str, Any], prefix: str) -> None:
        if prefix + "weight" in state_dict:
            # The weight in the dict was divided by the pre-scale in it, or by none: whatever this layer had would be wrong.
            has_one = prefix + "act_pre_scale" in state_dict
            self.act_pre_scale = torch.ones(self.in_features, dtype=torch.float32, device=self.weight.device) if has_one else None

    def _scale_names(self) -> tuple[str, ...]:
        return (*self.SCALES, "act_pre_scale")


def checked_weight(linear: nn.Linear) -> Tensor:
    """The weight of `linear`, detached. TypeError unless it is an nn.Linear in a dtype that can be quantized."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
    weight = linear.weight.detach()
    if weight.dtype not in reference.OUT_DTYPES:
        raise TypeError(f"linear.weight must be one of {', '.join(map(str, reference.OUT_DTYPES))}, got {weight.dtype}")
    return weight


def divided_weight(linear: nn.Linear, act_pre_scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The weight of `linear`, divided by its pre-scale where there is one, and that: `act_pre_scale`, or what `smooth_quant` has left on it.

    TypeError or ValueError for a weight that cannot be quantized, and for a pre-scale that is not float [K], finite and positive.
    """
    weight = checked_weight(linear)
    given = linear._buffers.get("act_pre_scale") if act_pre_scale is None else act_pre_scale
    if given is None:
        return weight, None
    if not isinstance(given, Tensor) or given.dtype not in reference.OUT_DTYPES:
        got = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"act_pre_scale must be a tensor of one of {', '.join(map(str, reference.OUT_DTYPES))}, got {got}")
    if list(given.shape) != [linear.in_features]:
        raise ValueError(f"act_pre_scale must have shape [{linear.in_features}], got {list(given.shape)}")
    pre_scale = given.detach().to(weight.device, torch.float32, copy=True)
    check_scale("act_pre_scale", pre_scale)
    return weight.float() / pre_scale, pre_scale


def check_weight_scale(scale: Tensor) -> None:
    """ValueError for a scale of a weight with NaN or infinity. Reads the values; a meta tensor has none and passes."""
    if not scale.is_meta and not bool(torch.isfinite(scale).all()):
        raise ValueError("linear.weight must be finite, got NaN or infinity")


def check_features(in_features: int, out_features: int) -> None:
    """ValueError unless both are positive."""
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _check_input(x: Tensor, layer: QuantizedLinear) -> None:
    if x.dtype not in reference.OUT_DTYPES:
        raise TypeError(f"x must be one of {', '.join(map(str, reference.OUT_DTYPES))}, got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] != layer.in_features:
        raise ValueError(f"x must have shape [..., {layer.in_features}], got {list(x.shape)}")
    if x.device != layer.weight.device:
        raise ValueError(f"x must be on {layer.weight.device}, the device of the weight, got {x.device}")
