"""Weight-only and int4 linears: modules, configs, every spelling of their dequantization, near-misses; counts, kernels and values against float64."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decline_cases import assert_left, left_alone
from support import FLOATS, PRECISION, run
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401 - defines torch.ops.quantized_decomposed

from int8_inductor import (
    Int4Linear,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8WeightOnlyConfig,
    Int8WeightOnlyLinear,
    PerGroup,
    PerTensor,
    int4,
    quantize_,
    reference,
)
from int8_inductor.granularity import Granularity
from int8_inductor.quantize import Int8Config
from int8_inductor.quantized_linear import QuantizedLinear

K, N, G = 128, 48, 32
CONFIGS: dict[str, tuple[Int8Config, str]] = {
    "int8 per row": (Int8WeightOnlyConfig(), "weight_int8_mm"),
    "int8 per tensor": (Int8WeightOnlyConfig(PerTensor()), "weight_int8_mm"),
    "int8 in groups": (Int8WeightOnlyConfig(PerGroup(64)), "weight_int8_group_mm"),
    "int4": (Int4WeightOnlyConfig(G), "weight_int4_mm"),
    "int4, one group": (Int4WeightOnlyConfig(), "weight_int4_mm"),
    "int4 with int8": (Int8DynamicActivationInt4WeightConfig(G), "int8_int4_mm"),
    "int4 with int8 in groups": (Int8DynamicActivationInt4WeightConfig(64, PerGroup(64)), "int8_int4_group_mm"),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(config: Int8Config, dtype: torch.dtype = torch.float32, bias: bool = True) -> QuantizedLinear:
    linear = nn.Linear(K, N, bias, dtype=dtype)
    linear.weight = nn.Parameter(randn(N, K, seed=1).to(dtype))
    if bias:
        linear.bias = nn.Parameter(randn(N, seed=2).to(dtype))
    model = nn.Sequential(linear)
    quantize_(model, config)
    quantized = model[0]
    assert isinstance(quantized, QuantizedLinear)
    return quantized


def weight64(module: QuantizedLinear) -> Tensor:
    """The dequantized weight in float64, by arithmetic of its own."""
    scale = module.weight_scale.double()
    if module.weight.dtype == torch.uint8:
        values = torch.stack((module.weight.int() % 16, module.weight.int() // 16), -1).flatten(-2) - 8
    else:
        values = module.weight
    return values.double() * (scale.repeat_interleave(K // scale.shape[1], 1) if scale.ndim == 2 else scale)


def float64(module: QuantizedLinear, x: Tensor) -> Tensor:
    """The layer's result on the same integers in float64."""
    granularity: Granularity | None = getattr(module, "act_granularity", None)
    a = x.double()
    if granularity is not None:
        rows = x.unflatten(-1, (-1, granularity.group_size)) if isinstance(granularity, PerGroup) else x
        scale = reference.choose_scale_symmetric(rows, [-1])
        a = (reference.quantize(rows, scale, None, reference.SYMMETRIC_MIN).double() * scale.double()).reshape(x.shape)
    y = a @ weight64(module).t()
    return y if module.bias is None else y + module.bias.double()


def one_step(module: QuantizedLinear, x: Tensor) -> Tensor:
    """What one int8 step of an activation that is quantized at run time makes of a result.

    A GPU divides float32 to 2 ulp (PTX div.full), so that its scale may be the next float, and a value that lies on a tie, as half of the largest
    does, may go to the other side of it.
    """
    granularity: Granularity | None = getattr(module, "act_granularity", None)
    if granularity is None:
        return torch.zeros(*x.shape[:-1], 1, dtype=torch.float64)
    return x.double().abs().amax(-1, keepdim=True) / 127 * weight64(module).abs().amax(1)


def check(got: Tensor, want: Tensor, dtype: torch.dtype, step: Tensor | float = 0.0) -> None:
    """Within 2 ulp of the largest value of a row, and 1e-5: the float32 sums; and `step`."""
    assert got.dtype == dtype
    tolerance = 2.0 ** (2 - PRECISION[dtype]) * want.abs() + 2e-5 * want.abs().amax(-1, keepdim=True) + step
    assert bool(((got.double() - want).abs() <= tolerance).all()), (got.double() - want).abs().max()


# Layers ---------------------------------------------------------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("dtype", FLOATS)
@torch.no_grad()
def test_a_layer_is_one_kernel(device: str, name: str, dtype: torch.dtype) -> None:
    """Rows of a 3-D input, bias and gelu; float32 activations keep their precision."""
    config, product = CONFIGS[name]
    module = layer(config, dtype).to(device)
    x = randn(2, 3, K, seed=3).to(dtype).to(device)

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(module(x)), module(x[0, :1])

    compiled = run(fn, x)
    assert compiled.linears() == 2, f"\n{compiled.report}"
    assert compiled.report.left() == []
    assert [entry.epilogue for entry in compiled.report.linears] == ["scales + bias + relu", "scales + bias"]
    if device == "cpu":
        expanded = f"aten.mm, the weight expanded to {N * K * 4} bytes"
        wanted = expanded if dtype == torch.float32 and not product.startswith("int8_int4") else "triton"
        assert {entry.kernel for entry in compiled.report.linears} == {wanted}
    cpu, host = layer(config, dtype), x.cpu()
    step = one_step(cpu, host) if device == "cuda" else torch.zeros(())
    check(compiled.output[0].cpu(), F.relu(float64(cpu, host)), dtype, step)
    check(compiled.output[1].cpu(), float64(cpu, host[0, :1]), dtype, step[0, :1] if step.ndim else step)


@every_config
@torch.no_grad()
def test_eager_is_the_definition(name: str) -> None:
    module = layer(CONFIGS[name][0])
    x = randn(4, K, seed=3)
    check(module(x), float64(module, x), torch.float32)
    torch.testing.assert_close(module.dequantized_weight().double(), weight64(module))
    torch.testing.assert_close(module.to_linear().weight.double(), weight64(module))
    noise = (module.dequantized_weight() - randn(N, K, seed=1)).square().mean()
    assert noise < (1e-4 if module.weight.dtype == torch.int8 else 3e-2)


@every_config
def test_buffers_survive_casts_and_checkpoints(name: str) -> None:
    module = layer(CONFIGS[name][0])
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module.half()
    assert module.weight.dtype == before["weight"].dtype
    assert torch.equal(module.weight_scale, before["weight_scale"])
    assert module.bias is not None
    assert module.bias.dtype == torch.float16
    twin = layer(CONFIGS[name][0])
    twin.weight.zero_()
    twin.load_state_dict(before)
    assert all(torch.equal(value, before[key]) for key, value in twin.state_dict().items())
    with pytest.raises(TypeError, match=rf"^weight must be {before['weight'].dtype}, got torch.int32"):
        twin.load_state_dict(before | {"weight": before["weight"].int()})


@pytest.mark.parametrize("name", ["int8 per row", "int4", "int4 with int8"])
@torch.no_grad()
def test_any_number_of_rows_compiles_once(device: str, name: str) -> None:
    module, cpu = layer(CONFIGS[name][0], torch.bfloat16).to(device), layer(CONFIGS[name][0], torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="int8_inductor", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 17, 70):
            x = randn(rows, K, seed=rows).bfloat16()
            check(compiled(x.to(device)).cpu(), float64(cpu, x), torch.bfloat16, one_step(cpu, x) if device == "cuda" else 0.0)


@torch.no_grad()
def test_a_chain_stays_int8(device: str) -> None:
    """The first layer's result is quantized in its kernel where the scale is static."""
    module = layer(CONFIGS["int4"][0], torch.bfloat16).to(device)
    x, scale = randn(6, K, seed=3).bfloat16().to(device), torch.tensor([0.5], device=device)
    compiled = run(lambda x: reference.quantize(F.silu(module(x)), scale), x)
    assert compiled.output.dtype == torch.int8
    assert compiled.report.linears[0].epilogue == "scales + bias + silu + int8", f"\n{compiled.report}"
    assert len(compiled.kernels) == 1


BAD_CONFIGS: dict[str, tuple[Callable[[], Any], str]] = {
    "int8 in odd groups": (lambda: Int8WeightOnlyConfig(PerGroup(16)), "group_size must be one of 32, 64, 128, got 16"),
    "int8 granularity": (lambda: Int8WeightOnlyConfig("row"), r"granularity must be PerRow\(\), PerTensor\(\) or PerGroup\(group_size\), got 'row'"),
    "int4 group": (lambda: Int4WeightOnlyConfig(256), "group_size must be one of 32, 64, 128, got 256"),
    "activation per tensor": (lambda: Int8DynamicActivationInt4WeightConfig(32, PerTensor()), r"act_granularity must be None, PerRow\(\) or Per"),
    "activation in other groups": (lambda: Int8DynamicActivationInt4WeightConfig(32, PerGroup(64)), r"as the weight's groups are, got PerGroup"),
    "activation None": (lambda: Int8DynamicActivationInt4WeightConfig(32, None), r"act_granularity must be PerRow\(\) or PerGroup\(32\), got None"),
    "K": (lambda: Int4Linear(48, 8, group_size=32), "in_features must be a multiple of group_size 32, got 48"),
    "K of int8": (lambda: Int8WeightOnlyLinear(48, 8, granularity=PerGroup(32)), "in_features must be a multiple of group_size 32, got 48"),
    "no columns": (lambda: Int4Linear(32, 0, group_size=32), "out_features must be at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_errors_name_the_argument(what: str) -> None:
    make, message = BAD_CONFIGS[what]
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_layer_that_cannot_be_converted_leaves_the_model() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"^cannot quantize '1': in_features must be a multiple of group_size 64, got 8"):
        quantize_(model, Int4WeightOnlyConfig(64))
    assert all(type(each) is nn.Linear for each in model)
    bad = nn.Linear(64, 8)
    bad.weight.data[3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"linear.weight must be finite, got NaN or infinity"):
        Int4Linear.from_linear(bad, group_size=64)


# Spellings ------------------------------------------------------------------------------------------------------------------------

PACKED = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
SCALE = torch.rand(N, K // G, generator=torch.Generator().manual_seed(6)) + 0.5
VALUES = int4.unpack_int4(PACKED)
WEIGHT = int4.dequantize_groups(VALUES, SCALE)
X = randn(5, K, seed=7).bfloat16()


def groups(values: Tensor, scale: Tensor = SCALE) -> Tensor:
    return (values.reshape(N, -1, G).float() * scale.unsqueeze(-1)).reshape(N, K)


def _halves_first() -> Tensor:
    low, high = (PACKED & 0xF).to(torch.int8) - 8, (PACKED >> 4).to(torch.int8) - 8
    return groups(torch.stack([low, high], dim=-1).view(N, K))


def _unpacked_by_group() -> Tensor:
    packed = PACKED.view(N, K // G, G // 2)
    values = torch.stack((packed & 15, (packed >> 4) & 15), dim=3).flatten(2).to(torch.int32) - 8
    return (values.float() * SCALE[..., None]).view(N, K)


def _zero_point_in_floats() -> Tensor:
    nibbles = torch.stack((PACKED & 15, PACKED >> 4), -1).view(N, K // G, G)
    return ((nibbles.float() - 8) * SCALE[:, :, None]).reshape(N, K)


def _by_division() -> Tensor:
    return (int4.unpack_int4(PACKED).view(N, -1, G).float() / (1.0 / SCALE).unsqueeze(-1)).view(N, K)


SPELLINGS: dict[str, Callable[[], Tensor]] = {
    "as the layer has it": lambda: int4.dequantize_groups(int4.unpack_int4(PACKED), SCALE),
    "halves first": _halves_first,
    "unpacked by group": _unpacked_by_group,
    "zero point in floats": _zero_point_in_floats,
    "by division": _by_division,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@torch.no_grad()
def test_every_spelling_of_int4(spelling: str) -> None:
    torch.testing.assert_close(SPELLINGS[spelling](), WEIGHT)
    compiled = run(lambda x: F.linear(x.float(), SPELLINGS[spelling]()), X)
    compiled.check_report(linear={"rewritten": 1}, dequant={"rewritten": 1})
    assert compiled.has("weight_int4_mm")
    check(compiled.output, X.double() @ WEIGHT.double().t(), torch.float32)


def _decomposed_groups() -> Tensor:
    return torch.ops.quantized_decomposed.dequantize_per_channel_group(VALUES, SCALE, None, -8, 7, torch.int8, G, torch.float32)


def _torchao_groups() -> Tensor:
    from torchao.quantization.quant_primitives import dequantize_affine

    dequantized: Tensor = dequantize_affine(VALUES, (1, G), SCALE, None, torch.int8, -8, 7)
    return dequantized


INT8_SPELLINGS: dict[str, Callable[[], Tensor]] = {
    "view": lambda: groups(VALUES),
    "quantized_decomposed": _decomposed_groups,
    "torchao": _torchao_groups,
}


@pytest.mark.parametrize("spelling", INT8_SPELLINGS)
@torch.no_grad()
def test_every_spelling_of_int8_in_groups(spelling: str) -> None:
    if spelling == "torchao" and find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    compiled = run(lambda x: F.linear(x.float(), INT8_SPELLINGS[spelling]()), X)
    compiled.check_report(linear={"rewritten": 1}, dequant={"rewritten": 1})
    assert compiled.has("weight_int8_group_mm")
    check(compiled.output, X.double() @ WEIGHT.double().t(), torch.float32)


# Near-misses ----------------------------------------------------------------------------------------------------------------------

NO_GROUPS = "the weight's scale is not one for each row and group"
NEAR_MISSES: dict[str, tuple[Callable[[], Tensor], str]] = {
    "another zero point": (
        lambda: groups(int4.unpack_int4(PACKED) + 1), "the zero point of the weight's nibbles is 7, not 8",
    ),
    "groups along N": (
        lambda: (int4.unpack_int4(PACKED).reshape(-1, 16, K).float() * torch.ones(3, 1, K)).reshape(N, K),
        r"the weight's groups \[3, 16, 128\] are not groups along its rows",
    ),
    "groups of 16": (
        lambda: (int4.unpack_int4(PACKED).view(N, -1, 16).float() * torch.ones(N, K // 16, 1)).view(N, K),
        "the weight is in groups of 16, not of 32, 64, 128",
    ),
    "a scale for each group of all rows": (lambda: groups(int4.unpack_int4(PACKED), SCALE[:1]), NO_GROUPS),
    "a scale for each row": (lambda: int4.unpack_int4(PACKED).float() * SCALE[:, :1], "the weight has 2 dimensions, not rows, groups and values"),
}  # fmt: skip


@pytest.mark.parametrize("what", NEAR_MISSES)
@torch.no_grad()
def test_int4_that_is_not_exactly_the_pattern(what: str) -> None:
    fn, reason = NEAR_MISSES[what]
    assert_left(left_alone(lambda x: F.linear(x.float(), fn()), X), "linear", reason)


UNKNOWN: dict[str, Callable[[], Tensor]] = {
    "high nibble first": lambda: torch.stack((PACKED >> 4, PACKED & 15), -1).view(N, K).to(torch.int8) - 8,
    "low nibbles before high ones": lambda: torch.cat((PACKED & 15, PACKED >> 4), -1).to(torch.int8) - 8,
    "two bits": lambda: torch.stack((PACKED & 3, PACKED >> 4), -1).view(N, K).to(torch.int8) - 8,
    "shifted by 3": lambda: torch.stack((PACKED & 15, (PACKED >> 3) & 15), -1).view(N, K).to(torch.int8) - 8,
    "nibbles of two weights": lambda: torch.stack((PACKED & 15, (PACKED + 1) >> 4), -1).view(N, K).to(torch.int8) - 8,
    "two zero points": lambda: torch.stack(((PACKED & 15).to(torch.int8) - 8, (PACKED >> 4).to(torch.int8) - 7), -1).view(N, K),
    "wrapped around": lambda: (torch.stack((PACKED & 15, PACKED >> 4), -1).view(N, K) - 8).to(torch.int8),
}


@pytest.mark.parametrize("what", UNKNOWN)
@torch.no_grad()
def test_integers_of_another_layout_are_multiplied_as_int8(what: str) -> None:
    """They are int8 by the time they are dequantized, and nothing more is known of them."""
    compiled = run(lambda x: F.linear(x.float(), groups(UNKNOWN[what]())), X)
    compiled.check_report(linear={"rewritten": 1}, dequant={"rewritten": 1})
    assert compiled.has("weight_int8_group_mm")
    assert not compiled.has("weight_int4_mm")
    check(compiled.output, X.double() @ groups(UNKNOWN[what]()).double().t(), torch.float32)


@torch.no_grad()
def test_a_float_weight_with_another_user_is_kept_for_it() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        w = int4.dequantize_groups(int4.unpack_int4(PACKED), SCALE)
        return F.linear(x.float(), w), w.sin()

    compiled = run(fn, X)
    compiled.check_report(linear={"rewritten": 1}, dequant={"left": 1})
    check(compiled.output[0], X.double() @ WEIGHT.double().t(), torch.float32)
    torch.testing.assert_close(compiled.output[1], WEIGHT.sin())


@torch.no_grad()
def test_an_activation_rounded_on_its_way_is_multiplied_as_it_is() -> None:
    """A cast to a narrower dtype and back is part of the model; one that widens is not."""
    x = randn(5, K, seed=8)
    compiled = run(lambda x: F.linear(x.bfloat16().float(), int4.dequantize_groups(int4.unpack_int4(PACKED), SCALE)), x)
    assert compiled.linears() == 1
    check(compiled.output, x.bfloat16().double() @ WEIGHT.double().t(), torch.float32)
