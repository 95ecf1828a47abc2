"""The schemes of an Int8Linear, layers with random weights for them, and their result in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from int8_inductor import Int8Linear, MappingType, PerRow, PerTensor, reference

EPS = 2.0**-24
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SYMMETRIC, ASYMMETRIC = MappingType.SYMMETRIC, MappingType.ASYMMETRIC
SCHEMES = [
    *({"granularity": (act, weight), "act_mapping_type": mapping}
      for act in (PerRow(), PerTensor()) for weight in (PerRow(), PerTensor()) for mapping in MappingType),
    {"granularity": PerRow(), "act_mapping_type": SYMMETRIC, "act_pre_scale": True},
    {"granularity": (PerTensor(), PerTensor()), "act_mapping_type": ASYMMETRIC, "act_pre_scale": True},
    {"granularity": PerRow(), "act_mapping_type": ASYMMETRIC, "static": True, "act_pre_scale": True},
    *({"granularity": weight, "act_mapping_type": mapping, "static": True} for weight in (PerRow(), PerTensor()) for mapping in MappingType),
]  # fmt: skip


def name_of(scheme: dict[str, Any]) -> str:
    pair = scheme["granularity"]
    names = "-".join(type(each).__name__ for each in (pair if isinstance(pair, tuple) else (pair,)))
    return (
        f"{'static' if scheme.get('static') else 'dynamic'}-{names}-{scheme['act_mapping_type'].value}{'-pre-scaled' * ('act_pre_scale' in scheme)}"
    )


schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pre_scale(k: int) -> Tensor:
    """[k] values from 0.25 to 1, with 1 in the places 0, 1, 5 and 6."""
    values = 0.25 + 0.75 * torch.rand(k, generator=torch.Generator().manual_seed(3))
    values[[i for i in (0, 1, 5, 6) if i < k]] = 1.0
    return values


def from_linear(linear: nn.Linear, *, act_pre_scale: bool = False, **scheme: Any) -> Int8Linear:
    """Int8Linear.from_linear, with a pre-scale where the scheme has one."""
    return Int8Linear.from_linear(linear, act_pre_scale=pre_scale(linear.in_features) if act_pre_scale else None, **scheme)


def make(k: int = 12, n: int = 8, bias: bool = True, **scheme: Any) -> Int8Linear:
    """A layer with random weights, calibrated to about 3 standard deviations where it is static."""
    linear = nn.Linear(k, n, bias)
    linear.weight = nn.Parameter(randn(n, k, seed=1) / math.sqrt(k))
    if bias:
        linear.bias = nn.Parameter(randn(n, seed=2))
    layer = from_linear(linear, **scheme)
    if layer.static:
        zero_point = torch.tensor([11], dtype=torch.int8) if layer.act_mapping_type is ASYMMETRIC else None
        layer.set_input_scale(torch.tensor([0.025]), zero_point)
    return layer


def float64(layer: Int8Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's definition on the same int8 values in float64, and a bound on what float32 arithmetic may differ by."""
    if layer.act_pre_scale is not None:
        x = x.float() * layer.act_pre_scale
    if layer.static:
        scale, zero_point, quant_min = layer.input_scale, layer.input_zero_point, layer.act_mapping_type.quant_min
    else:
        scale, zero_point, quant_min = layer.act_mapping_type.choose(x, layer.act_granularity)
    q = reference.quantize(x, scale, zero_point, quant_min).double()
    activation = (q - (0 if zero_point is None else zero_point.double())) * scale.double()
    weight = layer.weight.double() * layer.weight_scale.double()
    bias = torch.zeros(1) if layer.bias is None else layer.bias
    magnitude = activation.abs() @ weight.abs().t() + bias.double().abs()
    return activation @ weight.t() + bias.double(), (layer.in_features + 4) * EPS * magnitude
