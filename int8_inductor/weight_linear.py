"""`Int8WeightOnlyLinear` and `Int4Linear`: linear layers whose activations stay floats, or, beside int4 weights, may be quantized to int8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .granularity import Granularity, PerGroup, PerRow, PerTensor
from .int4 import GROUP_SIZES, dequantize_groups, quantize_int4, unpack_int4
from .quantized_linear import QuantizedLinear, check_features, check_weight_scale, divided_weight

__all__ = ["Int4Linear", "Int8WeightOnlyLinear", "check_group_size", "check_int4_activation", "check_weight_granularity"]


def check_group_size(group_size: object) -> None:
    """ValueError unless `group_size` is one that there are kernels for."""
    if isinstance(group_size, bool) or group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {group_size!r}")


def check_weight_granularity(granularity: object) -> None:
    """Raise unless `granularity` is one that a weight-only int8 weight can have."""
    if isinstance(granularity, PerGroup):
        check_group_size(granularity.group_size)
    elif not isinstance(granularity, (PerRow, PerTensor)):
        raise TypeError(f"granularity must be PerRow(), PerTensor() or PerGroup(group_size), got {granularity!r}")


def check_int4_activation(granularity: object, group_size: int) -> None:
    """Raise unless int8 activations of that granularity can go with int4 weights in groups of `group_size`; None: activations stay floats."""
    if granularity not in (None, PerRow(), PerGroup(group_size)):
        raise ValueError(f"act_granularity must be None, PerRow() or PerGroup({group_size}), as the weight's groups are, got {granularity!r}")


def _check_whole_groups(in_features: int, group_size: int) -> None:
    if in_features % group_size:
        raise ValueError(f"in_features must be a multiple of group_size {group_size}, got {in_features}")


class Int8WeightOnlyLinear(QuantizedLinear):
    """y = x @ dequantize(weight).T + bias in float32, cast to x's dtype. A drop-in for nn.Linear.

    Buffers: `weight` int8 [N, K]; `weight_scale` float32, [N, 1] (PerRow), [1] (PerTensor) or [N, K / g] (PerGroup(g)); `bias` [N] or
    None; `act_pre_scale` as every QuantizedLinear has it.

    Args:
        in_features, out_features: K and N; K a multiple of g.
        bias: whether there is one.
        granularity: of the weight's scale; groups of 32, 64 or 128.
        device, dtype: of the buffers; `dtype` is the bias's.
    """

    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        granularity: Granularity = PerRow(),  # noqa: B008 - frozen
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_weight_granularity(granularity)
        check_features(in_features, out_features)
        self.in_features, self.out_features, self.granularity = in_features, out_features, granularity
        shape: tuple[int, ...] = (1,) if isinstance(granularity, PerTensor) else (out_features, 1)
        if isinstance(granularity, PerGroup):
            _check_whole_groups(in_features, granularity.group_size)
            shape = (out_features, in_features // granularity.group_size)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(shape, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        granularity: Granularity = PerRow(),  # noqa: B008
        act_pre_scale: Tensor | None = None,
    ) -> Int8WeightOnlyLinear:
        """Quantize `linear`'s weight to int8, symmetric; the bias is copied as it is. ValueError for a weight that is not finite.

        act_pre_scale: as in Int8Linear.from_linear.
        """
        weight, pre_scale = divided_weight(linear, act_pre_scale)
        has_bias = linear.bias is not None
        dtype = linear.bias.dtype if has_bias else None
        self = cls(linear.in_features, linear.out_features, has_bias, granularity=granularity, device="meta", dtype=dtype)
        rows = weight.unflatten(1, (-1, granularity.group_size)) if isinstance(granularity, PerGroup) else weight
        self.act_pre_scale = pre_scale
        scale = reference.choose_scale_symmetric(rows, [0, 1] if isinstance(granularity, PerTensor) else [-1])
        check_weight_scale(scale)
        self.weight = reference.quantize(rows, scale, None, reference.SYMMETRIC_MIN).reshape(weight.shape)
        self.weight_scale = scale.reshape(self.weight_scale.shape)
        self.bias = linear.bias.detach().clone() if has_bias else None
        return self.train(linear.training)

    def dequantized_weight(self) -> Tensor:
        """float32 [N, K]."""
        if isinstance(self.granularity, PerGroup):
            return dequantize_groups(self.weight, self.weight_scale)
        return reference.dequantize(self.weight, self.weight_scale)

    def _linear(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.dequantized_weight(), None if self.bias is None else self.bias.float())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, weight={self.granularity!r}"


class Int4Linear(QuantizedLinear):
    """y = x @ dequantize(weight).T + bias in float32, cast to x's dtype, where x may be quantized to int8 first. A drop-in for nn.Linear.

    Buffers: `weight` uint8 [N, K / 2], two int4 values a byte, low nibble first, each as value + 8; `weight_scale` float32 [N, K / group_size];
    `bias` [N] or None. They are the same for float and for int8 activations.

    Args:
        in_features, out_features: K, a multiple of group_size, and N.
        bias: whether there is one.
        group_size: how many values along K share a scale: 32, 64 or 128.
        act_granularity: None for float activations (W4A16); PerRow(), or PerGroup(group_size), for int8 ones with dynamic symmetric scales (W4A8).
        device, dtype: of the buffers; `dtype` is the bias's.
    """

    INTEGERS = {"weight": torch.uint8}  # noqa: RUF012 - the base class declares it

    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        act_granularity: Granularity | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_group_size(group_size)
        check_int4_activation(act_granularity, group_size)
        check_features(in_features, out_features)
        _check_whole_groups(in_features, group_size)
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.act_granularity = group_size, act_granularity
        self.register_buffer("weight", torch.full((out_features, in_features // 2), 0x88, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.ones((out_features, in_features // group_size), dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, group_size: int = 128, act_granularity: Granularity | None = None, act_pre_scale: Tensor | None = None
    ) -> Int4Linear:
        """Quantize `linear`'s weight to int4, symmetric; the bias is copied as it is. ValueError for a weight that is not finite.

        act_pre_scale: as in Int8Linear.from_linear.
        """
        weight, pre_scale = divided_weight(linear, act_pre_scale)
        has_bias = linear.bias is not None
        self = cls(
            linear.in_features, linear.out_features, has_bias, group_size=group_size, act_granularity=act_granularity,
            device="meta", dtype=linear.bias.dtype if has_bias else None,
        )  # fmt: skip
        self.act_pre_scale = pre_scale
        packed, scale = quantize_int4(weight, group_size)
        check_weight_scale(scale)
        self.weight, self.weight_scale = packed, scale
        self.bias = linear.bias.detach().clone() if has_bias else None
        return self.train(linear.training)

    def dequantized_weight(self) -> Tensor:
        """float32 [N, K]."""
        return dequantize_groups(unpack_int4(self.weight), self.weight_scale)

    def _linear(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(self._activation(x), self.dequantized_weight(), bias)

    def _activation(self, x: Tensor) -> Tensor:
        """float32 [..., K]: x, or what is left of it in int8."""
        if self.act_granularity is None:
            return x.float()
        rows = x.unflatten(-1, (-1, self.group_size)) if isinstance(self.act_granularity, PerGroup) else x
        scale = reference.choose_scale_symmetric(rows, [-1])
        return reference.dequantize(reference.quantize(rows, scale, None, reference.SYMMETRIC_MIN), scale).reshape(x.shape)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation={self.act_granularity!r}, weight=int4 in groups of {self.group_size}"
        )
