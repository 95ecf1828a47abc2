"""Int8BlockLinear and its config: its result, its buffers, what becomes of them when they are cast and moved, and its errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support import U
from torch import Tensor, nn

from int8_inductor import (
    Int8BlockLinear,
    Int8DynamicActivationInt8WeightConfig,
    Int8Linear,
    MappingType,
    PerBlock,
    PerRow,
    quantize_,
    reference,
)

HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
BLOCKS = {size: (PerBlock(1, size), PerBlock(size, size)) for size in (32, 64, 128)}


def make(k: int = 100, n: int = 70, bias: bool = True, size: int = 32) -> Int8BlockLinear:
    torch.manual_seed(0)
    return Int8BlockLinear.from_linear(nn.Linear(k, n, bias), granularity=BLOCKS[size])


def float64(layer: Int8BlockLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's definition on the same int8 values in float64, and a bound on what float32 arithmetic may differ by."""
    size = layer.block_size
    q, scale = reference.quantize_blocks(x, size)
    activation = q.double() * scale.double().repeat_interleave(size, -1)[..., : layer.in_features]
    wide = layer.weight_scale.double().repeat_interleave(size, 0).repeat_interleave(size, 1)
    weight = layer.weight.double() * wide[: layer.out_features, : layer.in_features]
    bias = torch.zeros(1, dtype=torch.float64) if layer.bias is None else layer.bias.double()
    magnitude = activation.abs() @ weight.abs().t() + bias.abs()
    return activation @ weight.t() + bias, (layer.in_features + 4) * U * magnitude


@pytest.mark.parametrize("size", BLOCKS)
@pytest.mark.parametrize("dtype", reference.OUT_DTYPES)
@pytest.mark.parametrize(("shape", "n", "bias"), [((5, 100), 70, True), ((100,), 31, True), ((2, 3, 128), 128, False), ((0, 20), 5, True)], ids=str)
def test_forward_against_float64(size: int, dtype: torch.dtype, shape: tuple[int, ...], n: int, bias: bool) -> None:
    layer = make(shape[-1], n, bias, size).to(dtype)
    x = torch.randn(*shape).to(dtype)
    got = layer(x)
    assert (got.dtype, got.shape) == (dtype, (*shape[:-1], n))
    expected, error = float64(layer, x)
    assert bool(((got.double() - expected).abs() <= error + HALF_ULP[dtype] * (expected.abs() + error)).all())


def test_near_the_float_layer_even_with_outliers() -> None:
    """A column a thousand times the others spoils its own block alone: what scales by row cannot do."""
    torch.manual_seed(0)
    linear, x = nn.Linear(512, 64), torch.randn(16, 512)
    x[:, 5] *= 1000
    with torch.no_grad():
        linear.weight[:, 5] /= 1000
    want = linear(x)
    errors = [
        float((layer.from_linear(linear, **options)(x) - want).norm() / want.norm())
        for layer, options in ((Int8BlockLinear, {"granularity": BLOCKS[64]}), (Int8Linear, {"granularity": PerRow()}))
    ]
    assert errors[0] < 0.5 * errors[1]


def test_buffers() -> None:
    linear = nn.Linear(100, 70, dtype=torch.bfloat16)
    expected = {"weight": (torch.int8, [70, 100]), "weight_scale": (torch.float32, [3, 4]), "bias": (torch.bfloat16, [70])}
    for layer in (
        Int8BlockLinear.from_linear(linear, granularity=BLOCKS[32]),
        Int8BlockLinear(100, 70, granularity=BLOCKS[32], dtype=torch.bfloat16),
    ):
        assert {name: (t.dtype, list(t.shape)) for name, t in layer.named_buffers()} == expected
        assert {name: type(t) for name, t in layer.state_dict().items()} == dict.fromkeys(expected, Tensor)
        assert all(t.is_contiguous() for t in layer.state_dict().values())
        assert list(layer.parameters()) == []
    assert Int8BlockLinear(100, 70).weight_scale.shape == (1, 1)


def test_from_linear_keeps_what_the_linear_had_and_to_linear_gives_it_back() -> None:
    linear = nn.Linear(100, 70).eval()
    layer = Int8BlockLinear.from_linear(linear, granularity=BLOCKS[32])
    assert not layer.training
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    assert float(layer.weight_scale[1, 2]) == float(linear.weight[32:64, 64:96].detach().abs().max() / 127)
    back = layer.to_linear(torch.float16)
    assert torch.equal(back.weight, layer.dequantized_weight().half())
    step = layer.weight_scale.repeat_interleave(32, 0).repeat_interleave(32, 1)[:70, :100]
    assert bool(((layer.dequantized_weight() - linear.weight).abs() <= step * 0.501).all())


def test_a_block_of_zeros_has_scale_zero_and_survives_a_state_dict() -> None:
    linear = nn.Linear(100, 70)
    with torch.no_grad():
        linear.weight[:32, 32:64] = 0
    layer = Int8BlockLinear.from_linear(linear, granularity=BLOCKS[32])
    assert layer.weight_scale[0, 1] == 0
    assert bool((layer.weight_scale > 0).sum() == 11)
    x = torch.randn(3, 100)
    x[1] = 0
    assert torch.equal(layer(x)[1], linear.bias)
    other = Int8BlockLinear(100, 70, granularity=BLOCKS[32])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_pre_scale() -> None:
    linear, x = nn.Linear(100, 70), torch.randn(3, 100)
    pre_scale = torch.rand(100) + 0.5
    layer = Int8BlockLinear.from_linear(linear, granularity=BLOCKS[32], act_pre_scale=pre_scale)
    plain = nn.Linear(100, 70)
    with torch.no_grad():
        plain.weight.copy_(linear.weight / pre_scale)
        plain.bias.copy_(linear.bias)
    assert torch.equal(layer(x), Int8BlockLinear.from_linear(plain, granularity=BLOCKS[32])(x * pre_scale))
    other = Int8BlockLinear(100, 70, granularity=BLOCKS[32])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    torch.testing.assert_close(layer.to_linear().weight, linear.weight.detach(), atol=2e-3, rtol=0.0)


def test_casts_and_copies_keep_the_scales() -> None:
    layer = make()
    scale, x = layer.weight_scale.clone(), torch.randn(3, 100)
    for cast in (layer.half(), layer.bfloat16(), layer.to(torch.float16), copy.deepcopy(layer).float()):
        assert cast.weight_scale.dtype == torch.float32
        assert torch.equal(cast.weight_scale, scale)
        assert cast.weight.dtype == torch.int8
    with torch.autocast("cpu", torch.bfloat16):
        assert make()(x).dtype == torch.bfloat16


def test_config_converts_a_model() -> None:
    model = nn.Sequential(nn.Linear(100, 70), nn.ReLU(), nn.Linear(70, 5))
    want = model(x := torch.randn(4, 100))
    quantize_(model, Int8DynamicActivationInt8WeightConfig(granularity=(PerBlock([1, 64]), PerBlock([64, 64]))))
    assert [type(layer) for layer in model] == [Int8BlockLinear, nn.ReLU, Int8BlockLinear]
    assert model[0].granularity == BLOCKS[64]
    assert repr(model[0]) == (
        "Int8BlockLinear(in_features=100, out_features=70, bias=True, activation=dynamic PerBlock(1, 64), weight=PerBlock(64, 64))"
    )
    assert float((model(x) - want).norm() / want.norm()) < 0.03
    with pytest.raises(ValueError, match="is an Int8BlockLinear already"):
        quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, name: name == "0")


WANTED = "granularity in blocks must be a pair (activation, weight) of (PerBlock(1, B), PerBlock(B, B)) with a B from 32, 64, 128"


@pytest.mark.parametrize(
    ("granularity", "error"),
    [
        (PerBlock(1, 128), TypeError),
        ((PerRow(), PerBlock(128, 128)), TypeError),
        ((PerBlock(1, 128), PerRow()), TypeError),
        ((PerBlock(1, 64), PerBlock(128, 128)), ValueError),
        ((PerBlock(128, 128), PerBlock(128, 128)), ValueError),
        ((PerBlock(1, 16), PerBlock(16, 16)), ValueError),
        ((PerBlock(128), PerBlock(128, 128)), ValueError),
    ],
    ids=str,
)
def test_granularity_errors(granularity: Any, error: type[Exception]) -> None:
    for call in (lambda: Int8DynamicActivationInt8WeightConfig(granularity=granularity), lambda: Int8BlockLinear(4, 4, granularity=granularity)):
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value) == f"{WANTED}, got {granularity!r}"


@pytest.mark.parametrize("sizes", [(), (0, 128), (1, -1), (1.0, 128), (True, 128), ("1", "128")], ids=str)
def test_block_size_errors(sizes: Any) -> None:
    with pytest.raises(ValueError, match="block_size must be positive integers"):
        PerBlock(*sizes)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match=r"act_mapping_type must be MappingType.SYMMETRIC with a granularity in blocks"):
        Int8DynamicActivationInt8WeightConfig(granularity=BLOCKS[32], act_mapping_type=MappingType.ASYMMETRIC)
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        Int8BlockLinear(0, 4)
    linear = nn.Linear(4, 4)
    linear.weight.data[1, 1] = math.nan
    with pytest.raises(ValueError, match=r"linear.weight must be finite"):
        Int8BlockLinear.from_linear(linear)
    layer = make()
    state = layer.state_dict()
    with pytest.raises(ValueError, match=r"weight_scale must be finite and not negative, got -1\.0 in 12 of 12 places"):
        layer.load_state_dict(state | {"weight_scale": torch.full((3, 4), -1.0)})
    with pytest.raises(ValueError, match=r"x must have shape \[..., 100\], got \[3, 99\]"):
        layer(torch.randn(3, 99))
