"""smooth_quant: the factors of the paper, what becomes of them in quantize_, and errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from smooth_cases import OUTLIERS, PRE_SCALE, Block, TwoOfOneInput, pre_scaled, randn, smooth
from support import examples, run
from torch import Tensor, nn

import int8_inductor
from int8_inductor import (
    Int8DynamicActivationInt8WeightConfig,
    Int8Linear,
    Int8StaticActivationInt8WeightConfig,
    MappingType,
    PerTensor,
    calibrate,
    quantize_,
    smooth_quant,
)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1])
def test_factors_are_the_papers_and_one_for_all_linears_of_one_input(alpha: float) -> None:
    model, batches = TwoOfOneInput(), [randn(5, 3, 8), randn(2, 8, seed=1)]
    before, want = copy.deepcopy(model.state_dict()), [model(x) for x in batches]
    smooth(model, *batches, alpha=alpha)
    x = torch.cat([(each * OUTLIERS).reshape(-1, 8) for each in batches]).abs().amax(0)
    weight = torch.cat([model.left.weight, model.right.weight]).abs().amax(0)
    x, weight = (each.clamp(min=each.max() / 1024) for each in (x, weight))
    torch.testing.assert_close(1 / model.left.act_pre_scale, (x**alpha / weight ** (1 - alpha)).detach(), rtol=1e-6, atol=0)
    assert torch.equal(model.left.act_pre_scale, model.right.act_pre_scale)
    assert model.left.act_pre_scale.data_ptr() != model.right.act_pre_scale.data_ptr()
    assert model.after.act_pre_scale.shape == (6,)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if not name.endswith(PRE_SCALE))
    assert all(torch.equal(model(x), y) for x, y in zip(batches, want, strict=True))


def test_silent_channels_get_a_bounded_factor() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), randn(5, 8)
    x[:, 2], model[0].weight.data[:, 5] = 0.0, 0.0
    smooth(model, x)
    assert bool(torch.isfinite(model[0].act_pre_scale).all())
    assert model[0].act_pre_scale.max() / model[0].act_pre_scale.min() < 1024
    for silent in (torch.zeros(5, 8), x):
        model = nn.Sequential(nn.Linear(8, 4))
        if silent is x:
            model[0].weight.data.zero_()
        smooth(model, silent)
        assert torch.equal(model[0].act_pre_scale, torch.ones(8))


# After quantize_ ------------------------------------------------------------------------------------------------------------------


def sqnr(got: Tensor, want: Tensor) -> float:
    return 10 * math.log10(float(want.double().square().sum() / (got.double() - want.double()).square().sum()))


STATIC = Int8StaticActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC)
CONFIGS = {
    "dynamic": Int8DynamicActivationInt8WeightConfig(),
    "per tensor": Int8DynamicActivationInt8WeightConfig(granularity=PerTensor()),
    "static": STATIC,
}


@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("device", [None, "cpu"])
@torch.no_grad()
def test_a_smoothed_model_is_nearer_to_the_float_one(config: str, device: str | None) -> None:
    model, batches = TwoOfOneInput(), [randn(64, 8), randn(64, 8, seed=1)]
    want, results = model(batches[0]), []
    for smoothed in (False, True):
        quantized = copy.deepcopy(model)
        if smoothed:
            smooth(quantized, *batches)
        quantize_(quantized, CONFIGS[config], device=device)
        if config == "static":
            calibrate(quantized, batches, progress=False)
        assert pre_scaled(quantized) == ({"left", "right", "after"} if smoothed else set())
        results.append(sqnr(quantized(batches[0]), want))
    assert results[1] > results[0] + 5


@torch.no_grad()
def test_calibration_sees_the_scaled_input() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), randn(64, 8) * OUTLIERS
    smooth(model, x)
    quantize_(model, Int8StaticActivationInt8WeightConfig())
    calibrate(model, [x], progress=False)
    assert model[0].input_scale.item() == ((x * model[0].act_pre_scale).abs().max() / 127).item()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_the_pre_scale_is_part_of_the_kernel_that_quantizes(device: str, static: bool) -> None:
    """One kernel and one scaled_mm for a linear, and nothing else. With a static scale the second quant rides in the first product's kernel."""
    model, x = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 4)), randn(5, 8) * OUTLIERS
    smooth(model, x)
    quantize_(model, STATIC if static else CONFIGS["dynamic"])
    if static:
        calibrate(model, [x], progress=False)
    want = model(x)
    model.to(device)
    compiled = run(model, x.to(device))
    compiled.check_report(linear={"rewritten": 2}, quant={"feeds": 2}, dequant={"rewritten": 4})
    expected = [False, True, True] if static else [False, True, False, True]
    assert [name.startswith("triton_tem_") for name in compiled.kernels] == expected, compiled.kernels
    assert {entry.kernel for entry in compiled.report.linears} == {"triton"}
    scales = "scales + zero point" if static else "scales"
    assert [entry.epilogue for entry in compiled.report.linears] == [f"{scales} + bias + gelu", f"{scales} + bias"]
    step = max(float(layer.weight_scale.max()) for layer in model.modules() if isinstance(layer, Int8Linear))
    torch.testing.assert_close(compiled.output.cpu(), want, rtol=1e-4, atol=step * 127 * 0.05)


@examples(4)
@given(st.integers(1, 40), st.integers(1, 33), st.integers(1, 9), st.sampled_from(list(CONFIGS)))
@torch.no_grad()
def test_any_shape_compiles_to_what_eager_gives(k: int, n: int, m: int, config: str) -> None:
    torch.manual_seed(k)
    model, x = nn.Sequential(nn.LayerNorm(k), nn.Linear(k, n), nn.ReLU(), nn.Linear(n, 3)), randn(m, k)
    smooth(model, x)
    assert pre_scaled(model) == {"3"}
    quantize_(model, CONFIGS[config])
    if config == "static":
        calibrate(model, [x], progress=False)
    compiled = run(model, x)
    compiled.check_report(linear={"rewritten": 2}, quant={"feeds": 2}, dequant={"rewritten": 4})
    want = model(x)
    torch.testing.assert_close(compiled.output, want, rtol=1e-3, atol=0.03 * float(want.abs().max()) + 1e-6)


# Errors ---------------------------------------------------------------------------------------------------------------------------

X = torch.ones(2, 8)
ERRORS = [
    (lambda: smooth_quant(lambda x: x, [X]), TypeError, "model must be a torch.nn.Module, got function"),
    (lambda: smooth_quant(TwoOfOneInput(), X), TypeError, "batches must be an iterable of batches, got Tensor"),
    (lambda: smooth_quant(TwoOfOneInput(), ["x"], progress=False), TypeError, "batch 0 must be a tensor, a tuple or list, or a mapping, got str"),
    (lambda: smooth_quant(TwoOfOneInput(), [], progress=False), ValueError, "batches must have at least one batch, got none"),
    (lambda: smooth_quant(TwoOfOneInput(), [X], 1.5), ValueError, "alpha must be a number from 0 to 1, got 1.5"),
    (lambda: smooth_quant(TwoOfOneInput(), [X], math.nan), ValueError, "alpha must be a number from 0 to 1, got nan"),
    (lambda: smooth_quant(TwoOfOneInput(), [X], "0.5"), ValueError, "alpha must be a number from 0 to 1, got '0.5'"),
    (lambda: smooth_quant(nn.ReLU(), [X]), ValueError, "model has no nn.Linear that filter_fn chooses, got ReLU"),
    (lambda: smooth_quant(TwoOfOneInput(), [X * math.inf], progress=False), ValueError,
     "batches must give finite activations, got NaN or infinity in the input of 'left'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call: Callable[[], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


def test_an_error_changes_nothing() -> None:
    model = Block(nn.LayerNorm(8))
    model.after.weight.data[0, 0] = math.nan
    before, hooks = copy.deepcopy(model.state_dict()), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(ValueError, match=r"^the weight of 'after' must be finite, got NaN or infinity$"):
        smooth(model, randn(5, 8))
    model.unused = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"^batches must reach every nn\.Linear that is to be smoothed, got none that reaches 'unused'$"):
        smooth(model, randn(5, 8))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        smooth(model, randn(5, 7))
    del model.unused
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(torch.nan_to_num(after[name]), torch.nan_to_num(t)) for name, t in before.items())


def test_quantized_layers_are_refused() -> None:
    model = TwoOfOneInput()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match="3 layers are quantized already"):
        smooth(model, X)
    assert int8_inductor.smooth_quant is smooth_quant
