"""calibrate: the scales that real batches give, the ways to pass batches, and what stays as it was."""

from __future__ import annotations

import math
from collections import UserDict
from typing import Any

import pytest
import torch
from calibrate_cases import BATCHES, Net, quietly, randn, scales, static, watched
from torch import Tensor, nn

from int8_inductor import (
    Int8DynamicActivationInt8WeightConfig,
    Int8Linear,
    Int8StaticActivationInt8WeightConfig,
    MappingType,
    MinMaxObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
    PerTensor,
    calibrate,
    quantize_,
    reference,
)

ASYMMETRIC = MappingType.ASYMMETRIC
OBSERVERS = [MinMaxObserver(), PercentileObserver(95.0), MSEObserver()]


def inputs_of_the_layers(model: Net, batches: list[Tensor]) -> dict[str, Tensor]:
    """What reaches each layer where all of them multiply their dequantized weight with an exact input."""
    first = model.first.to_linear()
    return {"first": torch.cat(batches), "second": torch.cat([nn.functional.gelu(first(x)) for x in batches]).detach()}


@pytest.mark.parametrize("mapping", list(MappingType))
def test_min_max_scales_are_those_of_all_batches_together(mapping: MappingType) -> None:
    model = static(mapping)
    quietly(model)
    for name, x in inputs_of_the_layers(model, BATCHES).items():
        layer = model.get_submodule(name)
        scale, zero_point, _ = mapping.choose(x, PerTensor())
        assert layer.calibrated
        assert layer.input_scale.tolist() == scale.flatten().tolist()
        assert (layer.input_zero_point is None) == (zero_point is None)
        if zero_point is not None:
            assert layer.input_zero_point.tolist() == zero_point.flatten().tolist()
        else:
            assert float(layer.input_scale) == float(x.abs().max() / 127)


@pytest.mark.parametrize("mapping", list(MappingType))
@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_gives_the_scale_of_its_range(observer: Observer, mapping: MappingType) -> None:
    model = static(mapping)
    quietly(model, observer=observer)
    for name, x in inputs_of_the_layers(model, BATCHES).items():
        layer, seen = model.get_submodule(name), observer.start()
        seen.update(x, float(x.min()), float(x.max()))
        scale, zero_point, _ = mapping.choose(torch.tensor(observer.clip_range(seen, mapping)), PerTensor())
        assert layer.input_scale.tolist() == scale.tolist()
        assert layer.input_zero_point is None or layer.input_zero_point.tolist() == zero_point.tolist()


@pytest.mark.parametrize("mapping", list(MappingType))
def test_a_calibrated_model_computes_nearly_what_the_float_model_does(mapping: MappingType) -> None:
    model, x = static(mapping), randn(64, 8)
    quietly(model, [x])
    expected = Net()(x)
    noise = (model(x) - expected).square().mean()
    assert 10 * math.log10(expected.square().mean() / noise) > 30


class Encoding(UserDict):  # type: ignore[type-arg]
    """A mapping that is no dict, as transformers' BatchEncoding."""


def test_batches_are_tensors_positional_or_keyword_arguments() -> None:
    expected = static()
    quietly(expected, [BATCHES[0] + 0.0])
    kinds: list[Any] = [BATCHES[0], (BATCHES[0],), [BATCHES[0], 0.0], {"x": BATCHES[0]}, Encoding(x=BATCHES[0], shift=0.0)]
    for batch in kinds:
        model = static()
        quietly(model, [batch])
        assert scales(model) == scales(expected)
    shifted = static()
    quietly(shifted, [(BATCHES[0], 10.0)])
    assert shifted.first.input_scale == expected.first.input_scale
    assert float(shifted.second.input_scale) > float(expected.second.input_scale) + 9 / 127


def test_batches_may_be_any_iterable() -> None:
    expected = static()
    quietly(expected)
    dataset = torch.utils.data.TensorDataset(torch.cat(BATCHES))
    for batches in (iter(BATCHES), (x for x in BATCHES), torch.utils.data.DataLoader(dataset, batch_size=4)):
        model = static()
        quietly(model, batches)
        assert scales(model) == scales(expected)


def test_a_layer_may_get_its_input_by_keyword_or_none_at_all_in_a_batch() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = Int8Linear.from_linear(nn.Linear(8, 4), static=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x=x)

    model = ByKeyword()
    quietly(model, [BATCHES[0], BATCHES[0][:0]])
    assert float(model.linear.input_scale) == float(BATCHES[0].abs().max() / 127)


def test_a_shared_layer_sees_all_that_reaches_it() -> None:
    layer = Int8Linear.from_linear(nn.Linear(8, 8), static=True)
    model = nn.Sequential(layer, nn.Hardtanh(-100.0, 100.0), layer)
    quietly(model, [BATCHES[0]])
    hidden = layer.to_linear()(BATCHES[0])
    assert float(layer.input_scale) == float(torch.cat([BATCHES[0], hidden]).abs().max().detach() / 127)


def test_dynamic_layers_compute_as_always() -> None:
    model = Net()
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, name: name == "first")
    quantize_(model, Int8StaticActivationInt8WeightConfig())
    quietly(model, [BATCHES[0]])
    assert float(model.second.input_scale) == float(nn.functional.gelu(model.first(BATCHES[0])).abs().max() / 127)


def test_calibrating_anew_replaces_the_scales() -> None:
    model, expected = static(ASYMMETRIC), static(ASYMMETRIC)
    quietly(model, [x * 100 for x in BATCHES])
    quietly(model)
    quietly(expected)
    assert scales(model) == scales(expected)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("mapping", list(MappingType))
def test_an_input_of_zeros_gives_the_smallest_scale(mapping: MappingType, observer: Observer) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    quantize_(model, Int8StaticActivationInt8WeightConfig(act_mapping_type=mapping))
    quietly(model, [torch.zeros(2, 8)], observer=observer)
    assert model[0].input_scale.tolist() == [reference.SMALLEST_SCALE]
    assert torch.equal(model(torch.zeros(2, 8)), model[0].bias.expand(2, 4))


@pytest.mark.parametrize("dtype", reference.OUT_DTYPES)
def test_models_of_every_dtype(dtype: torch.dtype) -> None:
    model, x = static().to(dtype), BATCHES[0].to(dtype)
    quietly(model, [x])
    assert model.first.input_scale.dtype == torch.float32
    assert float(model.first.input_scale) == float(x.float().abs().max() / 127)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_the_scales_changes(training: bool) -> None:
    model = static().train(training)
    model.first.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    grads: list[tuple[bool, bool, bool]] = []
    model.second.register_forward_hook(lambda module, args, output: grads.append((torch.is_grad_enabled(), output.requires_grad, module.training)))
    before = watched(model)
    others = {name: t.clone() for name, t in model.state_dict().items() if "input_" not in name}
    with torch.enable_grad():
        quietly(model, [BATCHES[0].clone().requires_grad_()])
        assert torch.is_grad_enabled()
    assert grads == [(False, False, training)]
    assert watched(model) == before
    assert all(torch.equal(model.state_dict()[name], t) for name, t in others.items())
    # Seen as forward sees it, behind the hook that was there.
    assert float(model.first.input_scale) == float(BATCHES[0].abs().max() * 2 / 127)


def test_inference_mode_leaves_no_inference_tensors() -> None:
    model = static(ASYMMETRIC)
    with torch.inference_mode():
        quietly(model)
    assert not any(t.is_inference() for t in model.buffers())
    x = randn(2, 8).requires_grad_()
    assert model(x).shape == (2, 4)


def test_default_device_and_dtype_do_not_matter() -> None:
    model, expected = static(), static()
    quietly(expected, observer=MSEObserver())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            quietly(model, observer=MSEObserver())
    finally:
        torch.set_default_dtype(torch.float32)
    assert scales(model) == scales(expected)


@pytest.mark.parametrize("ran_before", [True, False])
def test_a_compiled_model_is_calibrated_eagerly(ran_before: bool) -> None:
    model, expected = static(), static()
    quietly(expected)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    if ran_before:
        quietly(model, [torch.ones(5, 8)])
        compiled(BATCHES[0])
    before = len(graphs)
    quietly(compiled)
    assert len(graphs) == before
    assert scales(model) == scales(expected)
    torch.testing.assert_close(compiled(BATCHES[0]), expected(BATCHES[0]))


def test_progress_goes_to_stderr_with_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(static(), BATCHES)
    out, err = capsys.readouterr()
    assert out == ""
    assert "calibrate: 100%" in err
    assert "3/3" in err
    calibrate(static(), iter(BATCHES))
    assert "calibrate: 3batch" in capsys.readouterr().err
    calibrate(static(), BATCHES, progress=False)
    assert capsys.readouterr() == ("", "")
