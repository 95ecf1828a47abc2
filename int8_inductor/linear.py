"""`Int8Linear`: a linear layer whose int8 weight and float32 scales are ordinary buffers, and whose eager forward defines its result."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .granularity import Granularity, MappingType, PerRow, PerTensor, check_mapping_type, check_scale, normalize_granularity
from .quantized_linear import QuantizedLinear, check_features, check_weight_scale, divided_weight

__all__ = ["Int8Linear"]


class Int8Linear(QuantizedLinear):
    """y = dequantize(quantize(x)) @ dequantize(weight).T + bias, in float32, cast to x's dtype. A drop-in for nn.Linear.

    Buffers (the names of compressed-tensors checkpoints): `weight` int8 [N, K]; `weight_scale` float32 [N, 1] (PerRow) or [1] (PerTensor);
    `bias` [N] or None; with `static=True` also `input_scale` float32 [1] and, when asymmetric, `input_zero_point` int8 [1]; `act_pre_scale`
    float32 [K] or None: x is multiplied by it, channel by channel, before it is quantized, and the weight was divided by it (torchao's name;
    `smooth_quant` chooses it). Scales stay float32 under `.to(dtype)`, `.half()` and `.bfloat16()`.

    Args:
        in_features, out_features: K and N; K at most `reference.MAX_K` (MAX_K_ZERO_POINT when asymmetric), or int32 could overflow.
        bias: whether there is one.
        granularity: (activation, weight), or one for both. A static activation is PerTensor.
        act_mapping_type: symmetric or asymmetric activations; weights are always symmetric.
        static: take the activation's scale from `input_scale`, calibrated ahead, instead of choosing it from each input.
        act_pre_scale: whether there is one. A state dict that is loaded decides it anew, as the pre-scale belongs to the weight.
        device, dtype: of the buffers; `dtype` is the bias's.
    """

    INTEGERS = {"weight": torch.int8, "input_zero_point": torch.int8}  # noqa: RUF012 - the base class declares it
    SCALES = ("weight_scale", "input_scale")

    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        granularity: Granularity | tuple[Granularity, Granularity] = PerRow(),  # noqa: B008 - frozen, and torchao's default
        act_mapping_type: MappingType = MappingType.SYMMETRIC,
        static: bool = False,
        act_pre_scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_mapping_type(act_mapping_type)
        pair = (PerTensor(), granularity) if static and isinstance(granularity, Granularity) else granularity
        self.act_granularity, self.weight_granularity = normalize_granularity(pair)
        _check_features(in_features, out_features, act_mapping_type)
        if static and self.act_granularity != PerTensor():
            raise ValueError(f"granularity of a static activation must be PerTensor(), got {self.act_granularity!r}")
        self.in_features, self.out_features = in_features, out_features
        self.act_mapping_type, self.static = act_mapping_type, static
        self.calibrated = not static
        self._calibrating = False
        scales = out_features if self.weight_granularity == PerRow() else 1
        shape = (scales, 1) if self.weight_granularity == PerRow() else (1,)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(shape, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        self.register_buffer("input_scale", torch.ones(1, dtype=torch.float32, device=device) if static else None)
        asymmetric = static and act_mapping_type is MappingType.ASYMMETRIC
        self.register_buffer("input_zero_point", torch.zeros(1, dtype=torch.int8, device=device) if asymmetric else None)
        self.act_pre_scale = torch.ones(in_features, dtype=torch.float32, device=device) if act_pre_scale else None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        granularity: Granularity | tuple[Granularity, Granularity] = PerRow(),  # noqa: B008
        act_mapping_type: MappingType = MappingType.SYMMETRIC,
        static: bool = False,
        act_pre_scale: Tensor | None = None,
    ) -> Int8Linear:
        """Quantize `linear`'s weight to int8, symmetric; the bias is copied as it is. ValueError for a weight that is not finite.

        act_pre_scale: float [K], finite and positive: multiply x by it, and divide the weight by it before that is quantized. By default that which
        `smooth_quant` has left on `linear`, if it has.
        """
        weight, pre_scale = divided_weight(linear, act_pre_scale)
        has_bias = linear.bias is not None
        self = cls(
            linear.in_features, linear.out_features, has_bias, granularity=granularity, act_mapping_type=act_mapping_type,
            static=static, act_pre_scale=pre_scale is not None, device="meta", dtype=linear.bias.dtype if has_bias else None,
        )  # fmt: skip
        self.act_pre_scale = pre_scale
        scale, _, quant_min = MappingType.SYMMETRIC.choose(weight, self.weight_granularity)
        check_weight_scale(scale)
        self.weight = reference.quantize(weight, scale, None, quant_min)
        self.weight_scale = scale.reshape(self.weight_scale.shape)
        self.bias = linear.bias.detach().clone() if has_bias else None
        if self.input_scale is not None:
            self.input_scale = torch.ones_like(self.input_scale, device=weight.device)
        if self.input_zero_point is not None:
            self.input_zero_point = torch.zeros_like(self.input_zero_point, device=weight.device)
        return self.train(linear.training)

    def shard(self, dim: int, start: int, stop: int) -> Int8Linear:
        """The part of this layer that one rank of a tensor-parallel group holds, with buffers of its own.

        dim 0 cuts the outputs [start, stop) (column parallel): weight, per-row scale and bias. dim 1 cuts the inputs (row parallel): the weight's
        columns and the pre-scale; the scale is whole, and the bias stays with the part that starts at 0, as the parts' results are summed.
        """
        if dim not in (0, 1):
            raise ValueError(f"dim must be 0 (outputs) or 1 (inputs), got {dim}")
        size = (self.out_features, self.in_features)[dim]
        if not 0 <= start < stop <= size:
            raise ValueError(f"start and stop must satisfy 0 <= start < stop <= {size}, got {start} and {stop}")
        keeps_bias = self.bias is not None and (dim == 0 or start == 0)
        features = (self.in_features, stop - start) if dim == 0 else (stop - start, self.out_features)
        part = Int8Linear(
            *features, keeps_bias, granularity=(self.act_granularity, self.weight_granularity),
            act_mapping_type=self.act_mapping_type, static=self.static, act_pre_scale=self.act_pre_scale is not None, device="meta",
        )  # fmt: skip
        part.weight = self.weight.narrow(dim, start, stop - start).clone()
        cuts_scale = dim == 0 and self.weight_scale.numel() > 1
        part.weight_scale = self.weight_scale[start:stop].clone() if cuts_scale else self.weight_scale.clone()
        if keeps_bias and self.bias is not None:
            part.bias = self.bias[start:stop].clone() if dim == 0 else self.bias.clone()
        for name in ("input_scale", "input_zero_point"):
            buffer = getattr(self, name)
            setattr(part, name, None if buffer is None else buffer.clone())
        if self.act_pre_scale is not None:
            part.act_pre_scale = (self.act_pre_scale if dim == 0 else self.act_pre_scale[start:stop]).clone()
        part.calibrated = self.calibrated
        return part.train(self.training)

    def set_input_scale(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Give a static layer its activation scale (float32, one element) and, when asymmetric, its zero point (int8, one element)."""
        if self.input_scale is None:
            raise ValueError("set_input_scale needs a layer with static=True, got a dynamic one")
        if scale.numel() != 1:
            raise ValueError(f"scale must have one element, got shape {list(scale.shape)}")
        check_scale("scale", scale)
        if (zero_point is None) != (self.input_zero_point is None):
            raise ValueError(f"zero_point goes with MappingType.ASYMMETRIC alone, got {zero_point} with {self.act_mapping_type}")
        if zero_point is not None and self.input_zero_point is not None:
            if zero_point.dtype != torch.int8 or zero_point.numel() != 1:
                raise TypeError(f"zero_point must be torch.int8 with one element, got {zero_point.dtype} {list(zero_point.shape)}")
            self.input_zero_point = zero_point.detach().reshape(1).to(self.weight.device, copy=True)
        self.input_scale = scale.detach().reshape(1).to(self.weight.device, copy=True)
        self.calibrated = True

    def dequantized_weight(self) -> Tensor:
        """float32 [N, K]."""
        return reference.dequantize(self.weight, self.weight_scale)

    def _linear(self, x: Tensor) -> Tensor:
        weight = self.dequantized_weight()
        bias = None if self.bias is None else self.bias.float()
        if self._calibrating:
            return F.linear(x.float(), weight, bias)
        scale, zero_point, quant_min = self._input_qparams(x)
        q = reference.quantize(x, scale, zero_point, quant_min)
        return F.linear(reference.dequantize(q, scale, zero_point), weight, bias)

    def _input_qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None, int]:
        if self.input_scale is None:
            return self.act_mapping_type.choose(x, self.act_granularity)
        if not self.calibrated:
            raise RuntimeError(
                "this static Int8Linear has no input_scale yet: run int8_inductor.calibrate(model, batches), "
                "load a calibrated state_dict, or call set_input_scale"
            )
        return self.input_scale, self.input_zero_point, self.act_mapping_type.quant_min

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        scale = state_dict.get(prefix + "input_scale")
        if self.input_scale is not None and scale is not None:
            complete = self.input_zero_point is None or prefix + "input_zero_point" in state_dict
            self.calibrated = complete and scale.shape == self.input_scale.shape and not _is_uncalibrated(scale)

    def _is_unset(self, name: str, scale: Tensor) -> bool:
        return name == "input_scale" and _is_uncalibrated(scale)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.input_scale is not None and not self.calibrated:
            # A state dict has tensors only: zero, which no scale can be, says that there is none yet.
            destination[prefix + "input_scale"] = torch.zeros_like(self.input_scale)

    def extra_repr(self) -> str:
        kind = "static" if self.static else "dynamic"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation={kind} {self.act_granularity!r} {self.act_mapping_type.value}, weight={self.weight_granularity!r}"
            + (", act_pre_scale=True" if self.act_pre_scale is not None else "")
        )


def _is_uncalibrated(scale: Tensor) -> bool:
    return not scale.is_meta and bool((scale == 0).all())


def _check_features(in_features: int, out_features: int, mapping: MappingType) -> None:
    check_features(in_features, out_features)
    limit = reference.MAX_K if mapping is MappingType.SYMMETRIC else reference.MAX_K_ZERO_POINT
    if in_features > limit:
        raise ValueError(f"in_features must be at most {limit} for {mapping.value} int8, or int32 could overflow; got {in_features}")
