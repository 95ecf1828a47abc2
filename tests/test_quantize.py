"""quantize_ and its configs: which layers are swapped, for what, and that on an error none is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from int8_inductor import (
    Int8DynamicActivationInt8WeightConfig,
    Int8Linear,
    Int8StaticActivationInt8WeightConfig,
    MappingType,
    PerRow,
    PerTensor,
    quantize_,
)
from int8_inductor.quantize import Int8Config

Dynamic, Static = Int8DynamicActivationInt8WeightConfig, Int8StaticActivationInt8WeightConfig
ASYMMETRIC = MappingType.ASYMMETRIC
WEIGHTS = (PerRow(), PerTensor())
CONFIGS: list[tuple[Int8Config, dict[str, Any]]] = [
    (Dynamic(), {"granularity": (PerRow(), PerRow())}),
    *((Dynamic(w), {"granularity": (w, w)}) for w in WEIGHTS),
    *((Dynamic((a, w), ASYMMETRIC), {"granularity": (a, w), "act_mapping_type": ASYMMETRIC}) for a in WEIGHTS for w in WEIGHTS),
    (Static(), {"granularity": (PerTensor(), PerRow()), "static": True}),
    *((Static(w, ASYMMETRIC), {"granularity": (PerTensor(), w), "static": True, "act_mapping_type": ASYMMETRIC}) for w in WEIGHTS),
    (Static([PerTensor(), PerTensor()]), {"granularity": (PerTensor(), PerTensor()), "static": True}),
]


class Net(nn.Module):
    """Linears at several depths: plain, in a ModuleList and a ModuleDict, one of them under two names, and layers of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 16)
        self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16, bias=False)) for _ in range(2)])
        self.heads = nn.ModuleDict({"a": nn.Linear(16, 4)})
        self.again = self.first
        self.conv = nn.Conv1d(1, 1, 1)
        self.missing = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(torch.relu(self.first(x)))
        for layer in self.layers:
            x = x + layer(x)
        return self.heads["a"](x)


LINEARS = {"first", "layers.0.1", "layers.1.1", "heads.a"}


def of_type(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is kind}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("config", "arguments"), CONFIGS)
def test_every_linear_becomes_what_the_config_says(config: Int8Config, arguments: dict[str, Any]) -> None:
    model, original = Net(), Net()
    assert quantize_(model, config) is None
    assert of_type(model, Int8Linear) == LINEARS
    assert of_type(model, nn.Linear) == set()
    for name in LINEARS:
        layer, expected = model.get_submodule(name), Int8Linear.from_linear(original.get_submodule(name), **arguments)
        assert repr(layer) == repr(expected)
        assert all(torch.equal(t, expected.state_dict()[key]) for key, t in layer.state_dict().items())
        assert layer.calibrated is not layer.static


@pytest.mark.parametrize("config", [config for config, arguments in CONFIGS if "static" not in arguments])
def test_a_dynamic_model_computes_nearly_what_it_did(config: Int8Config) -> None:
    model, x = Net(), randn(64, 16)
    expected = model(x)
    quantize_(model, config)
    noise = (model(x) - expected).square().mean()
    assert 10 * math.log10(expected.square().mean() / noise) > 30


def test_a_layer_under_two_names_is_converted_once() -> None:
    model = Net()
    quantize_(model, Dynamic())
    assert model.first is model.again
    filtered = Net()
    quantize_(filtered, Dynamic(), filter_fn=lambda module, name: name == "first")
    assert filtered.first is filtered.again
    assert type(filtered.again) is Int8Linear


def test_filter_fn_gets_modules_with_their_names() -> None:
    model, seen = Net(), {}

    def choose(module: nn.Module, name: str) -> bool:
        seen[name] = module
        return name.startswith("layers.") and isinstance(module, nn.Linear)

    expected = dict(model.named_modules())
    quantize_(model, Dynamic(), filter_fn=choose)
    assert seen == expected
    assert of_type(model, Int8Linear) == {"layers.0.1", "layers.1.1"}
    assert of_type(model, nn.Linear) == {"first", "heads.a"}
    quantize_(model, Static())
    assert model.layers[0][1].static is False
    assert model.first.static is True


def test_mode_and_hooks_stay() -> None:
    model, calls = Net(), []
    model.first.eval()
    before = model.first.register_forward_pre_hook(lambda module, args: calls.append("before"))
    after = model.first.register_forward_hook(lambda module, args, kwargs, output: calls.append("after"), with_kwargs=True, always_call=True)
    quantize_(model, Dynamic())
    assert (model.first.training, model.heads["a"].training) == (False, True)
    model.first(randn(2, 16))
    assert calls == ["before", "after"]
    before.remove()
    after.remove()
    model.first(randn(2, 16))
    assert calls == ["before", "after"]


def test_device_moves_the_whole_model_there() -> None:
    model = Net()
    quantize_(model, Static(PerRow(), ASYMMETRIC), device="meta")
    assert of_type(model, Int8Linear) == LINEARS
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    expected, same = Net(), Net()
    quantize_(expected, Dynamic())
    quantize_(same, Dynamic(), device=torch.device("cpu"))
    assert all(torch.equal(t, expected.state_dict()[name]) for name, t in same.state_dict().items())
    assert torch.equal(same(randn(3, 16)), expected(randn(3, 16)))


def spoil(name: str, replacement: Callable[[], nn.Module]) -> nn.Module:
    """A Net with one module replaced by one that cannot be quantized."""
    model = Net()
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, replacement())
    return model


def nan_linear() -> nn.Linear:
    linear = nn.Linear(16, 16)
    linear.weight.data[3, 5] = math.nan
    return linear


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def patched() -> nn.Linear:
    linear = nn.Linear(16, 16)
    linear.forward = lambda x: x  # type: ignore[method-assign]
    return linear


DTYPES = "torch.float32, torch.bfloat16, torch.float16"
OWN_FORWARD = "has a forward of its own, which would be lost; leave it out"
BAD_LAYERS = [
    (nan_linear, Dynamic(), ValueError, "cannot quantize 'layers.1.1': linear.weight must be finite, got NaN or infinity"),
    (lambda: nn.Linear(131072, 1), Dynamic(), ValueError,
     "cannot quantize 'layers.1.1': in_features must be at most 131071 for symmetric int8, or int32 could overflow; got 131072"),
    (lambda: nn.Linear(65794, 1), Static(PerRow(), ASYMMETRIC), ValueError,
     "cannot quantize 'layers.1.1': in_features must be at most 65793 for asymmetric int8, or int32 could overflow; got 65794"),
    (lambda: nn.Linear(16, 16).double(), Dynamic(), TypeError,
     f"cannot quantize 'layers.1.1': linear.weight must be one of {DTYPES}, got torch.float64"),
    (lambda: Scaled(16, 16), Dynamic(), TypeError, f"cannot quantize 'layers.1.1': Scaled {OWN_FORWARD}"),
    (patched, Dynamic(), TypeError, f"cannot quantize 'layers.1.1': Linear {OWN_FORWARD}"),
]  # fmt: skip


def assert_left_alone(model: nn.Module, modules: dict[str, nn.Module], state: dict[str, Tensor]) -> None:
    assert dict(model.named_modules()) == modules
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name].nan_to_num(), t.nan_to_num()) for name, t in state.items())


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize(("bad", "config", "error", "message"), BAD_LAYERS, ids=[message for *_, message in BAD_LAYERS])
def test_one_bad_layer_leaves_the_model_as_it_was(
    bad: Callable[[], nn.Module], config: Int8Config, error: type[Exception], message: str, device: str | None
) -> None:
    model = spoil("layers.1.1", bad)
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(error) as raised:
        quantize_(model, config, device=device)
    assert str(raised.value) == message
    assert_left_alone(model, modules, state)


def test_an_uninitialized_layer_leaves_the_model_as_it_was() -> None:
    model = spoil("layers.1.1", lambda: nn.LazyLinear(4))
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"^cannot quantize 'layers\.1\.1': .*uninitialized parameter"):
        quantize_(model, Dynamic())
    assert dict(model.named_modules()) == modules


def test_an_unknown_device_leaves_the_model_as_it_was() -> None:
    model = Net()
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="nonsense"):
        quantize_(model, Dynamic(), device="nonsense")
    assert_left_alone(model, modules, state)


def chosen(name: str) -> dict[str, Any]:
    return {"filter_fn": lambda module, module_name: module_name == name}


NO_LINEAR = "model has no nn.Linear that filter_fn chooses, got"
CALL_ERRORS = [
    (lambda: "net", {}, TypeError, "model must be a torch.nn.Module, got str"),
    (Net, {"config": "int8"}, TypeError, "config must be one of int8_inductor's configs, got str"),
    (Net, {"config": Dynamic}, TypeError, "config must be one of int8_inductor's configs, got type"),
    (Net, {"config": Int8Config()}, TypeError, "cannot quantize 'first': config must be one of int8_inductor's configs, got Int8Config"),
    (Net, chosen("conv"), TypeError, "filter_fn must choose torch.nn.Linear modules, got Conv1d for 'conv'"),
    (Net, chosen(""), TypeError, "filter_fn must choose torch.nn.Linear modules, got Net for 'model'"),
    (Net, chosen("third"), ValueError, f"{NO_LINEAR} Net"),
    (lambda: nn.Conv1d(1, 1, 1), {}, ValueError, f"{NO_LINEAR} Conv1d"),
    (lambda: nn.Sequential(Int8Linear(4, 4), Int8Linear(4, 4)), {}, ValueError, f"{NO_LINEAR} Sequential; 2 layers are quantized already"),
    (lambda: nn.Sequential(Int8Linear(4, 4)), chosen("0"), ValueError, "0 is an Int8Linear already: a layer can be quantized once"),
    (lambda: nn.Linear(4, 4), {}, ValueError,
     "model is itself an nn.Linear, which has no parent to swap it in: use Int8Linear.from_linear(model)"),
    (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), chosen("0.out_proj"), ValueError,
     "filter_fn chose '0.out_proj', whose weight nn.MultiheadAttention reads past its forward: it cannot be quantized"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "arguments", "error", "message"), CALL_ERRORS, ids=[message for *_, message in CALL_ERRORS])
def test_call_errors(model: Callable[[], Any], arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        quantize_(model(), **{"config": Dynamic(), **arguments})
    assert str(raised.value) == message


BAD_GRANULARITY = "granularity must be PerTensor(), PerRow() or a pair (activation, weight) of them, got"
STATIC_ROW = "granularity of a static activation must be PerTensor(), got PerRow()"
BAD_MAPPING = "act_mapping_type must be MappingType.SYMMETRIC or MappingType.ASYMMETRIC, got"
CONFIG_ERRORS = [
    (lambda: Dynamic("row"), TypeError, f"{BAD_GRANULARITY} 'row'"),
    (lambda: Dynamic((PerRow(), PerRow(), PerRow())), TypeError, f"{BAD_GRANULARITY} (PerRow(), PerRow(), PerRow())"),
    (lambda: Dynamic(PerRow), TypeError, f"{BAD_GRANULARITY} {PerRow!r}"),
    (lambda: Static(None), TypeError, f"{BAD_GRANULARITY} None"),
    (lambda: Dynamic(act_mapping_type="asymmetric"), TypeError, f"{BAD_MAPPING} 'asymmetric'"),
    (lambda: Static(act_mapping_type=None), TypeError, f"{BAD_MAPPING} None"),
    (lambda: Static((PerRow(), PerRow())), ValueError, STATIC_ROW),
]


@pytest.mark.parametrize(("make", "error", "message"), CONFIG_ERRORS, ids=[message for *_, message in CONFIG_ERRORS])
def test_config_errors(make: Callable[[], Int8Config], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value) == message


def test_configs_are_values() -> None:
    assert Dynamic() == Dynamic(PerRow(), MappingType.SYMMETRIC)
    assert Dynamic() != Dynamic(PerTensor())
    assert len({Static(), Static(), Static(PerTensor())}) == 2
