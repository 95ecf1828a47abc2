"""Int8Linear: its result, its buffers, what becomes of them when they are cast and moved, its shards and its errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from linear_cases import ASYMMETRIC, HALF_ULP, float64, from_linear, make, pre_scale, randn, schemes
from torch import Tensor, nn

from int8_inductor import Int8Linear, MappingType, PerRow, PerTensor, reference


@schemes
@pytest.mark.parametrize("dtype", reference.OUT_DTYPES)
@pytest.mark.parametrize(("shape", "bias"), [((5, 12), True), ((12,), True), ((2, 3, 12), False), ((2, 1, 3, 12), True), ((0, 12), True)])
def test_forward_against_float64(scheme: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    layer = make(bias=bias, **scheme).to(dtype)
    x = randn(*shape).to(dtype)
    got = layer(x)
    assert (got.dtype, got.shape) == (dtype, (*shape[:-1], 8))
    expected, error = float64(layer, x)
    assert bool(((got.double() - expected).abs() <= error + HALF_ULP[dtype] * (expected.abs() + error)).all())


def test_forward_takes_non_contiguous_and_keeps_its_input() -> None:
    layer = make()
    x = randn(12, 5).t()
    before = x.clone()
    expected, error = float64(layer, x)
    assert bool(((layer(x).double() - expected).abs() <= error).all())
    assert torch.equal(x, before)


@schemes
@pytest.mark.parametrize("bias", [True, False])
def test_buffers(scheme: dict[str, Any], bias: bool) -> None:
    static, asymmetric = scheme.get("static", False), scheme["act_mapping_type"] is ASYMMETRIC
    per_row = scheme["granularity"] == PerRow() or scheme["granularity"] in [(PerRow(), PerRow()), (PerTensor(), PerRow())]
    expected = {"weight": (torch.int8, [8, 12]), "weight_scale": (torch.float32, [8, 1] if per_row else [1])}
    if bias:
        expected["bias"] = (torch.bfloat16, [8])
    if static:
        expected["input_scale"] = (torch.float32, [1])
    if static and asymmetric:
        expected["input_zero_point"] = (torch.int8, [1])
    if scheme.get("act_pre_scale"):
        expected["act_pre_scale"] = (torch.float32, [12])
    linear = nn.Linear(12, 8, bias, dtype=torch.bfloat16)
    for layer in (from_linear(linear, **scheme), Int8Linear(12, 8, bias, dtype=torch.bfloat16, **scheme)):
        assert {name: (t.dtype, list(t.shape)) for name, t in layer.named_buffers()} == expected
        assert {name: type(t) for name, t in layer.state_dict().items()} == dict.fromkeys(expected, torch.Tensor)
        assert list(layer.parameters()) == []


def test_from_linear_keeps_what_the_linear_had() -> None:
    linear = nn.Linear(12, 8).eval()
    layer = Int8Linear.from_linear(linear)
    assert not layer.training
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    expected = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    assert torch.equal(layer.weight_scale, expected)
    assert torch.equal(layer.weight, torch.round(linear.weight.detach() / expected).to(torch.int8))
    whole = Int8Linear.from_linear(linear, granularity=PerTensor())
    assert torch.equal(whole.weight_scale, expected.max().reshape(1))


@pytest.mark.parametrize("dtype", reference.OUT_DTYPES)
@pytest.mark.parametrize("weight", [PerRow(), PerTensor()])
def test_to_linear_is_the_dequantized_layer(weight: PerRow | PerTensor, dtype: torch.dtype) -> None:
    layer = make(granularity=(PerRow(), weight)).eval()
    linear = layer.to_linear(dtype)
    assert type(linear) is nn.Linear
    assert (linear.in_features, linear.out_features, linear.training) == (12, 8, False)
    assert torch.equal(linear.weight, (layer.weight.float() * layer.weight_scale).to(dtype))
    assert torch.equal(linear.bias, layer.bias.to(dtype))
    assert linear.bias.data_ptr() != layer.bias.data_ptr()
    assert make(bias=False).to_linear().bias is None
    again = Int8Linear.from_linear(layer.to_linear(), granularity=(PerRow(), weight))
    assert torch.equal(again.weight, layer.weight)


@schemes
@pytest.mark.parametrize("bias", [True, False])
def test_shards_of_the_outputs_concatenate_to_the_whole(scheme: dict[str, Any], bias: bool) -> None:
    layer, x = make(bias=bias, **scheme).eval(), randn(5, 12)
    parts = [layer.shard(0, 0, 3), layer.shard(0, 3, 8)]
    assert [(part.in_features, part.out_features, part.training) for part in parts] == [(12, 3, False), (12, 5, False)]
    assert torch.equal(torch.cat([part.weight for part in parts]), layer.weight)
    expected, error = float64(layer, x)
    assert bool(((torch.cat([part(x) for part in parts], -1).double() - expected).abs() <= 2 * error).all())
    own = {t.untyped_storage().data_ptr() for part in parts for t in part.buffers()}
    assert len(own) == sum(len(list(part.buffers())) for part in parts)
    assert own.isdisjoint(t.untyped_storage().data_ptr() for t in layer.buffers())


@schemes
@pytest.mark.parametrize("bias", [True, False])
def test_shards_of_the_inputs_sum_to_the_whole(scheme: dict[str, Any], bias: bool) -> None:
    layer, x = make(bias=bias, **scheme), randn(5, 12)
    # The same extremes in each part, so that parts that choose a scale for themselves choose that of the whole.
    x[:, [0, 5]], x[:, [1, 6]] = 4.0, -4.0
    parts = [layer.shard(1, 0, 5), layer.shard(1, 5, 12)]
    assert [(part.in_features, part.out_features) for part in parts] == [(5, 8), (7, 8)]
    assert [part.bias is not None for part in parts] == [bias, False]
    expected, error = float64(layer, x)
    total = parts[0](x[:, :5]).double() + parts[1](x[:, 5:]).double()
    assert bool(((total - expected).abs() <= 2 * error).all())


def test_a_shard_of_an_uncalibrated_layer_is_uncalibrated() -> None:
    layer = Int8Linear.from_linear(nn.Linear(4, 4), static=True)
    assert not layer.shard(0, 0, 2).calibrated
    layer.set_input_scale(torch.ones(1))
    assert layer.shard(0, 0, 2).calibrated


def test_autocast_decides_the_output_dtype_and_nothing_else() -> None:
    layer, x = make(), randn(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x)
        disabled = make()(x.half())
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, layer(x).bfloat16())
    assert disabled.dtype == torch.bfloat16
    with torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == torch.float32


@schemes
def test_the_result_does_not_depend_on_the_grad_mode(scheme: dict[str, Any]) -> None:
    layer, x = make(**scheme), randn(5, 12)
    expected = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x.clone().requires_grad_()), expected)


def test_a_pre_scale_divides_the_weight_before_it_is_quantized_and_multiplies_the_input() -> None:
    linear, x = nn.Linear(12, 8, dtype=torch.bfloat16), randn(3, 12).bfloat16()
    chosen = pre_scale(12)
    layer = Int8Linear.from_linear(linear, act_pre_scale=chosen)
    divided = nn.Linear(12, 8)
    divided.weight, divided.bias = nn.Parameter(linear.weight.detach().float() / chosen), linear.bias
    plain = Int8Linear.from_linear(divided)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.weight_scale, plain.weight_scale)
    assert torch.equal(layer(x), plain(x.float() * chosen).bfloat16())
    assert torch.equal(layer.to_linear().weight, plain.to_linear().weight * chosen)
    assert layer.act_pre_scale.data_ptr() != chosen.data_ptr()
    again = Int8Linear.from_linear(layer.to_linear(), act_pre_scale=chosen)
    assert (again.weight.short() - layer.weight.short()).abs().max() <= 1
    assert repr(layer).endswith("weight=PerRow(), act_pre_scale=True)")


def test_the_pre_scale_that_smooth_quant_leaves_is_taken_up() -> None:
    linear = nn.Linear(12, 8)
    linear.register_buffer("act_pre_scale", pre_scale(12))
    wanted = Int8Linear.from_linear(nn.Linear(12, 8), act_pre_scale=pre_scale(12)).state_dict().keys()
    for layer in (Int8Linear.from_linear(linear), Int8Linear.from_linear(linear.to("meta"))):
        assert layer.state_dict().keys() == wanted
    linear.act_pre_scale = torch.zeros(12)
    with pytest.raises(ValueError, match=r"^act_pre_scale must be finite and positive, got 0\.0 in 12 of 12 places$"):
        Int8Linear.from_linear(linear.to_empty(device="cpu"), act_pre_scale=torch.zeros(12))


@pytest.mark.parametrize(("chosen", "error", "message"), [
    ([1.0] * 12, TypeError, "act_pre_scale must be a tensor of one of torch.float32, torch.bfloat16, torch.float16, got list"),
    (torch.ones(12, dtype=torch.int32), TypeError,
     "act_pre_scale must be a tensor of one of torch.float32, torch.bfloat16, torch.float16, got torch.int32"),
    (torch.ones(8), ValueError, "act_pre_scale must have shape [12], got [8]"),
    (torch.ones(1, 12), ValueError, "act_pre_scale must have shape [12], got [1, 12]"),
    (-torch.ones(12), ValueError, "act_pre_scale must be finite and positive, got -1.0 in 12 of 12 places"),
    (torch.full([12], math.inf), ValueError, "act_pre_scale must be finite and positive, got inf in 12 of 12 places"),
])  # fmt: skip
def test_pre_scale_errors(chosen: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        Int8Linear.from_linear(nn.Linear(12, 8), act_pre_scale=chosen)
    assert str(raised.value) == message


def test_zero_rows_give_the_bias_and_rows_that_are_not_finite_give_nan() -> None:
    for mapping in MappingType:
        layer, x = make(act_mapping_type=mapping), randn(5, 12)
        alone = layer(x)
        x[1], x[2, 3], x[3, 4], x[4, 5] = 0.0, math.nan, math.inf, -math.inf
        got = layer(x)
        assert torch.equal(got[0], alone[0])
        assert torch.equal(got[1], layer.bias)
        assert bool(torch.isnan(got[2:]).all())
        per_tensor = make(granularity=(PerTensor(), PerRow()), act_mapping_type=mapping)
        assert bool(torch.isnan(per_tensor(x)).all())


def test_a_static_layer_saturates_infinities_and_takes_nan_for_zero() -> None:
    for mapping in MappingType:
        layer = make(granularity=PerRow(), act_mapping_type=mapping, static=True)
        x, clipped = randn(3, 12), randn(3, 12)
        x[0, 3], x[1, 4], x[2, 5] = math.inf, -math.inf, math.nan
        clipped[0, 3], clipped[1, 4], clipped[2, 5] = 1e30, -1e30, 0.0
        assert torch.equal(layer(x), layer(clipped))


def test_forward_on_meta_gives_the_shape() -> None:
    for layer in (Int8Linear(12, 8, device="meta"), Int8Linear(12, 8, device="meta", granularity=PerTensor())):
        got = layer(torch.zeros(2, 3, 12, device="meta", dtype=torch.bfloat16))
        assert (got.shape, got.dtype, got.is_meta) == ((2, 3, 8), torch.bfloat16, True)


def test_repr_names_the_scheme() -> None:
    assert repr(Int8Linear(12, 8, False, granularity=PerTensor(), act_mapping_type=ASYMMETRIC, static=True)) == (
        "Int8Linear(in_features=12, out_features=8, bias=False, activation=static PerTensor() asymmetric, weight=PerTensor())"
    )
    assert repr(Int8Linear(1, 2)) == ("Int8Linear(in_features=1, out_features=2, bias=True, activation=dynamic PerRow() symmetric, weight=PerRow())")


def test_a_copy_is_its_own() -> None:
    layer = make(granularity=PerRow(), static=True)
    other = copy.deepcopy(layer)
    other.set_input_scale(torch.tensor([7.0]))
    other.weight.zero_()
    assert float(layer.input_scale) == pytest.approx(0.025)
    assert bool(layer.weight.any())


NARROW = "torch.float32, torch.bfloat16, torch.float16"
FORWARD_ERRORS = [
    (torch.zeros(2, 12, dtype=torch.float64), TypeError, f"x must be one of {NARROW}, got torch.float64"),
    (torch.zeros(2, 12, dtype=torch.int8), TypeError, f"x must be one of {NARROW}, got torch.int8"),
    (torch.zeros(2, 11), ValueError, "x must have shape [..., 12], got [2, 11]"),
    (torch.zeros(()), ValueError, "x must have shape [..., 12], got []"),
    (torch.zeros(2, 12, device="meta"), ValueError, "x must be on cpu, the device of the weight, got meta"),
]


@pytest.mark.parametrize(("x", "error", "message"), FORWARD_ERRORS, ids=[message for _, _, message in FORWARD_ERRORS])
def test_forward_errors(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        make()(x)
    assert str(raised.value) == message


BAD_GRANULARITY = "granularity must be PerTensor(), PerRow() or a pair (activation, weight) of them, got"
OVERFLOW = "int8, or int32 could overflow; got"
CONSTRUCTOR_ERRORS = [
    ({"in_features": 0}, ValueError, "in_features must be at least 1, got 0"),
    ({"out_features": 0}, ValueError, "out_features must be at least 1, got 0"),
    ({"in_features": 131072}, ValueError, f"in_features must be at most 131071 for symmetric {OVERFLOW} 131072"),
    ({"in_features": 65794, "act_mapping_type": ASYMMETRIC}, ValueError, f"in_features must be at most 65793 for asymmetric {OVERFLOW} 65794"),
    ({"granularity": "row"}, TypeError, f"{BAD_GRANULARITY} 'row'"),
    ({"granularity": (PerRow(),)}, TypeError, f"{BAD_GRANULARITY} (PerRow(),)"),
    ({"granularity": (PerRow(), None)}, TypeError, f"{BAD_GRANULARITY} (PerRow(), None)"),
    ({"granularity": (PerRow(), PerRow()), "static": True}, ValueError, "granularity of a static activation must be PerTensor(), got PerRow()"),
    ({"act_mapping_type": "symmetric"}, TypeError,
     "act_mapping_type must be MappingType.SYMMETRIC or MappingType.ASYMMETRIC, got 'symmetric'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), CONSTRUCTOR_ERRORS, ids=[message for _, _, message in CONSTRUCTOR_ERRORS])
def test_constructor_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        Int8Linear(**{"in_features": 4, "out_features": 4, "device": "meta", **arguments})
    assert str(raised.value) == message


def test_from_linear_errors() -> None:
    with pytest.raises(TypeError, match=r"^linear must be a torch\.nn\.Linear, got Conv1d$"):
        Int8Linear.from_linear(nn.Conv1d(1, 1, 1))
    with pytest.raises(TypeError, match=r"^linear\.weight must be one of torch\.float32, torch\.bfloat16, torch\.float16, got torch\.float64$"):
        Int8Linear.from_linear(nn.Linear(2, 2, dtype=torch.float64))
    for bad in (math.nan, math.inf):
        linear = nn.Linear(2, 2)
        linear.weight.data[1, 1] = bad
        with pytest.raises(ValueError, match=r"^linear\.weight must be finite, got NaN or infinity$"):
            Int8Linear.from_linear(linear)


SHARD_ERRORS = [
    ((2, 0, 1), "dim must be 0 (outputs) or 1 (inputs), got 2"),
    ((-1, 0, 1), "dim must be 0 (outputs) or 1 (inputs), got -1"),
    ((0, 0, 9), "start and stop must satisfy 0 <= start < stop <= 8, got 0 and 9"),
    ((1, 3, 3), "start and stop must satisfy 0 <= start < stop <= 12, got 3 and 3"),
    ((1, -1, 3), "start and stop must satisfy 0 <= start < stop <= 12, got -1 and 3"),
]


@pytest.mark.parametrize(("arguments", "message"), SHARD_ERRORS)
def test_shard_errors(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match="must") as raised:
        make().shard(*arguments)
    assert str(raised.value) == message
