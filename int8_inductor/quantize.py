"""Configs and `quantize_`, with the names and habits of torchao: swap every chosen nn.Linear of a model for a `QuantizedLinear`, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .block_linear import Int8BlockLinear
from .granularity import (
    Granularity,
    GranularityArgument,
    MappingType,
    PerBlock,
    PerRow,
    PerTensor,
    check_mapping_type,
    has_blocks,
    normalize_granularity,
    square_block,
)
from .linear import Int8Linear
from .quantized_linear import QuantizedLinear
from .weight_linear import Int4Linear, Int8WeightOnlyLinear, check_group_size, check_int4_activation, check_weight_granularity

__all__ = [
    "Int4WeightOnlyConfig",
    "Int8Config",
    "Int8DynamicActivationInt4WeightConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8StaticActivationInt8WeightConfig",
    "Int8WeightOnlyConfig",
    "quantize_",
]


class Int8Config:
    """Base of the configs: what `quantize_` makes of one linear layer. One for modules of another kind overrides `choose` and `replace`."""

    def convert(self, linear: nn.Linear) -> nn.Module:
        """The quantized module that takes `linear`'s place."""
        raise TypeError(f"config must be one of int8_inductor's configs, got {type(self).__name__}")

    def choose(self, model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None) -> Mapping[str, nn.Module]:
        """The modules of `model` to quantize, checked, by name; TypeError or ValueError where `filter_fn` chose something else, or nothing."""
        return choose_linears(model, filter_fn or is_linear)

    def replace(self, name: str, module: nn.Module, device: torch.device | str | int | None) -> nn.Module:
        """What takes the place of `module`, on `device` (None: its own); TypeError or ValueError that names it."""
        assert isinstance(module, nn.Linear)
        return _convert(name, module, self, device)


@dataclass(frozen=True)
class Int8DynamicActivationInt8WeightConfig(Int8Config):
    """W8A8 with activation scales chosen from each input at run time.

    granularity: PerRow(), PerTensor(), or a pair (activation, weight). Or (PerBlock(1, B), PerBlock(B, B)), B of 32, 64 or 128: both in blocks.
    act_mapping_type: SYMMETRIC, or ASYMMETRIC with a zero point for the activation; weights are symmetric, and so is everything in blocks.
    """

    granularity: GranularityArgument = field(default_factory=PerRow)
    act_mapping_type: MappingType = MappingType.SYMMETRIC

    def __post_init__(self) -> None:
        check_mapping_type(self.act_mapping_type)
        if not has_blocks(self.granularity):
            normalize_granularity(self.granularity)
            return
        square_block(self.granularity)
        if self.act_mapping_type is not MappingType.SYMMETRIC:
            raise ValueError(f"act_mapping_type must be MappingType.SYMMETRIC with a granularity in blocks, got {self.act_mapping_type}")

    def convert(self, linear: nn.Linear) -> nn.Module:
        if has_blocks(self.granularity):
            size = square_block(self.granularity)
            return Int8BlockLinear.from_linear(linear, granularity=(PerBlock(1, size), PerBlock(size, size)))
        pair = normalize_granularity(self.granularity)
        return Int8Linear.from_linear(linear, granularity=pair, act_mapping_type=self.act_mapping_type)


@dataclass(frozen=True)
class Int8StaticActivationInt8WeightConfig(Int8Config):
    """W8A8 with activation scales calibrated ahead; run `calibrate(model, batches)` before the model is used.

    granularity: of the weight (the activation's is then PerTensor()), or a pair (PerTensor(), weight).
    act_mapping_type: SYMMETRIC, or ASYMMETRIC with a zero point for the activation; weights are symmetric.
    """

    granularity: GranularityArgument = field(default_factory=PerRow)
    act_mapping_type: MappingType = MappingType.SYMMETRIC

    def __post_init__(self) -> None:
        activation, _ = self._pair()
        if activation != PerTensor():
            raise ValueError(f"granularity of a static activation must be PerTensor(), got {activation!r}")
        check_mapping_type(self.act_mapping_type)

    def _pair(self) -> tuple[object, object]:
        activation, weight = normalize_granularity(self.granularity)
        return (activation if isinstance(self.granularity, (tuple, list)) else PerTensor()), weight

    def convert(self, linear: nn.Linear) -> nn.Module:
        pair = (PerTensor(), normalize_granularity(self.granularity)[1])
        return Int8Linear.from_linear(linear, granularity=pair, act_mapping_type=self.act_mapping_type, static=True)


@dataclass(frozen=True)
class Int8WeightOnlyConfig(Int8Config):
    """W8A16: int8 weights, activations as they are.

    granularity: PerRow(), PerTensor(), or PerGroup(g): a scale for each g values along K, g from 32, 64 and 128.
    """

    granularity: Granularity = field(default_factory=PerRow)

    def __post_init__(self) -> None:
        check_weight_granularity(self.granularity)

    def convert(self, linear: nn.Linear) -> nn.Module:
        return Int8WeightOnlyLinear.from_linear(linear, granularity=self.granularity)


@dataclass(frozen=True)
class Int4WeightOnlyConfig(Int8Config):
    """W4A16: symmetric int4 weights with a scale for each `group_size` values (32, 64 or 128) along K, activations as they are."""

    group_size: int = 128

    def __post_init__(self) -> None:
        check_group_size(self.group_size)

    def convert(self, linear: nn.Linear) -> nn.Module:
        return Int4Linear.from_linear(linear, group_size=self.group_size)


@dataclass(frozen=True)
class Int8DynamicActivationInt4WeightConfig(Int8Config):
    """W4A8: the same int4 weights, and activations quantized to int8 with symmetric scales chosen from each input at run time.

    group_size: of the weight: 32, 64 or 128.
    act_granularity: PerRow(), or PerGroup(group_size): a scale for each row and `group_size` values along K.
    """

    group_size: int = 128
    act_granularity: Granularity = field(default_factory=PerRow)

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        if self.act_granularity is None:
            raise ValueError(f"act_granularity must be PerRow() or PerGroup({self.group_size}), got None")
        check_int4_activation(self.act_granularity, self.group_size)

    def convert(self, linear: nn.Linear) -> nn.Module:
        return Int4Linear.from_linear(linear, group_size=self.group_size, act_granularity=self.act_granularity)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def is_linear(module: nn.Module, name: str) -> bool:
    """What is quantized where nobody says otherwise."""
    # nn.MultiheadAttention hands its out_proj's weight to a functional of its own, past the module's forward.
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def quantize_(
    model: nn.Module,
    config: Int8Config,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.device | str | int | None = None,
) -> None:
    """Swap the nn.Linear layers of `model` for quantized ones, in place: all that were asked for, or, on an error, none.

    Args:
        model: any module that contains nn.Linear layers, or, for a config for experts, stacked experts.
        config: what to make of each, e.g. `Int8DynamicActivationInt8WeightConfig()`.
        filter_fn: (module, fully qualified name) -> whether to quantize it; by default every nn.Linear, or all stacked experts.
        device: where to quantize; the whole model is on it afterwards. None: each layer where it is.

    Raises:
        TypeError: `model`, `config` or what `filter_fn` chose is of the wrong type, or a linear with a forward of its own.
        ValueError: nothing to quantize, a layer quantized twice, a weight that is not finite, a K that could overflow int32, or
            a layer whose weight its parent reads by itself (nn.MultiheadAttention's out_proj, left out by default).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, Int8Config):
        raise TypeError(f"config must be one of int8_inductor's configs, got {type(config).__name__}")
    chosen = config.choose(model, filter_fn)
    converted = {id(module): config.replace(name, module, device) for name, module in chosen.items()}
    for parent in list(model.modules()):
        # _modules, not named_children(): that one names a module shared by two attributes once.
        for child_name, child in list(parent._modules.items()):
            if id(child) in converted:
                setattr(parent, child_name, converted[id(child)])
    _leave_fast_paths(model)
    if device is not None:
        model.to(device)


def choose_linears(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool]) -> dict[str, nn.Linear]:
    """The layers to quantize, checked, by name; one that several attributes share comes once, by its first name."""
    chosen: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if not filter_fn(module, name):
            continue
        if isinstance(module, QuantizedLinear):
            raise ValueError(f"{name or 'model'} is an {type(module).__name__} already: a layer can be quantized once")
        if not isinstance(module, nn.Linear):
            raise TypeError(f"filter_fn must choose torch.nn.Linear modules, got {type(module).__name__} for {name or 'model'!r}")
        if isinstance(module, NonDynamicallyQuantizableLinear):
            raise ValueError(f"filter_fn chose {name!r}, whose weight nn.MultiheadAttention reads past its forward: it cannot be quantized")
        if getattr(module.forward, "__func__", None) is not nn.Linear.forward:
            raise TypeError(f"cannot quantize {name!r}: {type(module).__name__} has a forward of its own, which would be lost; leave it out")
        if module is model:
            raise ValueError("model is itself an nn.Linear, which has no parent to swap it in: use Int8Linear.from_linear(model)")
        chosen[name] = module
    if not chosen:
        already = sum(isinstance(m, QuantizedLinear) for m in model.modules())
        detail = f"; {already} layers are quantized already" if already else ""
        raise ValueError(f"model has no nn.Linear that filter_fn chooses, got {type(model).__name__}{detail}")
    return chosen


def _convert(name: str, linear: nn.Linear, config: Int8Config, device: torch.device | str | int | None) -> nn.Module:
    source = linear
    if device is not None:
        source = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta").train(linear.training)
        source.weight = nn.Parameter(linear.weight.detach().to(device), requires_grad=False)
        if linear.bias is not None:
            source.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
        for name, buffer in linear._buffers.items():
            source.register_buffer(name, None if buffer is None else buffer.to(device))
    try:
        converted = config.convert(source)
    except (TypeError, ValueError) as error:
        raise type(error)(f"cannot quantize {name!r}: {error}") from error
    return keep_hooks(linear, converted)


def keep_hooks(source: nn.Module, converted: nn.Module) -> nn.Module:
    """`converted`, with the hooks of `source`."""
    for hooks in _HOOKS:
        # The dict itself, so that a handle which registered a hook on the source still removes it.
        setattr(converted, hooks, getattr(source, hooks))
    return converted


def _leave_fast_paths(model: nn.Module) -> None:
    """The eager fast path of nn.TransformerEncoderLayer reads its linears' weights past their forward, and nn.TransformerEncoder hands it nested
    tensors; without a known activation, and with nested tensors off, they are not taken."""
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)) and any(isinstance(m, QuantizedLinear) for m in module.modules()):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0
