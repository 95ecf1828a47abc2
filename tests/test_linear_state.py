"""What becomes of an Int8Linear's buffers: state dicts, casts, moves, the meta device, and the calibration that goes with them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from linear_cases import ASYMMETRIC, SCHEMES, make, name_of, randn, schemes
from torch import Tensor, nn

from int8_inductor import Int8Linear, MappingType, PerRow

State = dict[str, Tensor]


def through_torch_save(state: State, folder: Path) -> State:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def through_safetensors(state: State, folder: Path) -> State:
    safetensors.torch.save_file(state, folder / "state.safetensors")
    return safetensors.torch.load_file(folder / "state.safetensors")


def model(**scheme: Any) -> nn.Sequential:
    return nn.Sequential(make(12, 8, **scheme), nn.ReLU(), make(8, 5, bias=False, **scheme))


def blank(device: str | None = None, **scheme: Any) -> nn.Sequential:
    return nn.Sequential(Int8Linear(12, 8, device=device, **scheme), nn.ReLU(), Int8Linear(8, 5, bias=False, device=device, **scheme))


@schemes
@pytest.mark.parametrize("travel", [through_torch_save, through_safetensors])
@pytest.mark.parametrize("how", ["copied", "assigned", "on meta, assigned", "on meta, emptied, copied"])
def test_state_dict_round_trip(scheme: dict[str, Any], travel: Callable[[State, Path], State], how: str, tmp_path: Path) -> None:
    original, x = model(**scheme), randn(3, 12)
    state = travel(original.state_dict(), tmp_path)
    loaded = blank("meta" if "meta" in how else None, **scheme)
    if "emptied" in how:
        loaded.to_empty(device="cpu")
    assert loaded.load_state_dict(state, assign="assigned" in how) == ([], [])
    assert {name: t.device.type for name, t in loaded.named_buffers()} == dict.fromkeys(state, "cpu")
    assert all(torch.equal(t, state[name]) for name, t in loaded.named_buffers())
    assert torch.equal(loaded(x), original(x))


@schemes
def test_copies_and_pickles_compute_the_same(scheme: dict[str, Any]) -> None:
    original, x = model(**scheme), randn(3, 12)
    assert torch.equal(copy.deepcopy(original)(x), original(x))
    assert torch.equal(pickle.loads(pickle.dumps(original))(x), original(x))
    buffer = io.BytesIO()
    torch.save(original, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), original(x))


CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "to(bfloat16)": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "half()": (lambda m: m.half(), torch.float16),
    "bfloat16()": (lambda m: m.bfloat16(), torch.bfloat16),
    "double()": (lambda m: m.double(), torch.float64),
    "float()": (lambda m: m.half().float(), torch.float32),
    "to(device, dtype)": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "to(tensor)": (lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)), torch.bfloat16),
}


@pytest.mark.parametrize("scheme", SCHEMES[-4:], ids=name_of)
@pytest.mark.parametrize("cast", list(CASTS))
def test_a_cast_changes_the_bias_alone(scheme: dict[str, Any], cast: str) -> None:
    original, (cast_module, dtype) = model(**scheme), CASTS[cast]
    before = {name: t.clone() for name, t in original.state_dict().items()}
    assert cast_module(original) is original
    for name, t in original.state_dict().items():
        if name.endswith("bias"):
            assert t.dtype == dtype
        else:
            assert t.dtype == before[name].dtype
            assert torch.equal(t, before[name])
    assert original[0].calibrated


@schemes
def test_to_meta_and_to_empty_keep_dtypes_and_shapes(scheme: dict[str, Any]) -> None:
    original = model(**scheme)
    expected = {name: (t.dtype, t.shape) for name, t in original.named_buffers()}
    state = copy.deepcopy(original.state_dict())
    original.to("meta")
    assert {name: (t.dtype, t.shape) for name, t in original.named_buffers()} == expected
    assert all(t.is_meta for t in original.buffers())
    original.to_empty(device="cpu")
    assert {name: (t.dtype, t.shape) for name, t in original.named_buffers()} == expected
    assert not any(t.is_meta for t in original.buffers())
    original.load_state_dict(state)
    assert torch.equal(original(randn(3, 12)), model(**scheme)(randn(3, 12)))


def test_share_memory_shares_the_scales_too() -> None:
    layer = make(granularity=PerRow(), static=True)
    expected = copy.deepcopy(layer.state_dict())
    layer.share_memory()
    assert all(t.is_shared() for t in layer.buffers())
    assert all(torch.equal(t, expected[name]) for name, t in layer.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_a_cast_of_every_buffer_is_refused_before_anything_changes(dtype: torch.dtype) -> None:
    layer = make(granularity=PerRow(), static=True)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(TypeError) as raised:
        layer.type(dtype)
    assert str(raised.value) == (f"Int8Linear keeps its weight int8 and its scales float32, got a cast of all buffers to {dtype}: use .to(dtype)")
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in before.items())


def test_buffers_survive_a_move_that_fails() -> None:
    layer = make(granularity=PerRow(), static=True)
    before = copy.deepcopy(layer.state_dict())

    def refuse(t: Tensor) -> Tensor:
        if t.dtype == torch.int8:
            raise MemoryError("no room for the weight")
        return t

    with pytest.raises(MemoryError, match="no room for the weight"):
        layer._apply(refuse)
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], t) for name, t in before.items())


UNCALIBRATED = (
    "this static Int8Linear has no input_scale yet: run int8_inductor.calibrate(model, batches), "
    "load a calibrated state_dict, or call set_input_scale"
)


def assert_refuses(layer: Int8Linear) -> None:
    with pytest.raises(RuntimeError) as raised:
        layer(randn(2, layer.in_features))
    assert str(raised.value) == UNCALIBRATED


@pytest.mark.parametrize("mapping", list(MappingType))
def test_an_uncalibrated_static_layer_refuses_until_it_has_a_scale(mapping: MappingType) -> None:
    layer = Int8Linear.from_linear(nn.Linear(12, 8), act_mapping_type=mapping, static=True)
    assert_refuses(layer)
    assert_refuses(copy.deepcopy(layer))
    assert_refuses(layer.bfloat16().float())
    layer.set_input_scale(torch.tensor(0.5), torch.tensor(3, dtype=torch.int8) if mapping is ASYMMETRIC else None)
    assert layer(randn(2, 12)).shape == (2, 8)


@pytest.mark.parametrize("mapping", list(MappingType))
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_says_whether_a_layer_is_calibrated(mapping: MappingType, assign: bool) -> None:
    scheme = {"act_mapping_type": mapping, "static": True}
    fresh = Int8Linear.from_linear(nn.Linear(12, 8), **scheme)
    assert fresh.state_dict()["input_scale"].tolist() == [0.0]
    calibrated = make(**scheme)
    receiver = Int8Linear(12, 8, **scheme)
    for source, expected in ((fresh, False), (calibrated, True), (fresh, False)):
        receiver.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
        assert receiver.calibrated is expected
        assert torch.equal(receiver.state_dict()["input_scale"], source.state_dict()["input_scale"])
        if not expected:
            assert_refuses(receiver)


def test_half_a_calibration_is_none() -> None:
    state = make(act_mapping_type=ASYMMETRIC, static=True).state_dict()
    del state["input_zero_point"]
    receiver = Int8Linear(12, 8, act_mapping_type=ASYMMETRIC, static=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*input_zero_point"):
        receiver.load_state_dict(state)
    receiver.load_state_dict(state, strict=False)
    assert_refuses(receiver)
    state = make(static=True).state_dict() | {"input_scale": torch.ones(2)}
    receiver = Int8Linear(12, 8, static=True)
    with pytest.raises(RuntimeError, match="size mismatch for input_scale"):
        receiver.load_state_dict(state)
    assert_refuses(receiver)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_the_pre_scale_comes_and_goes_with_the_weight(assign: bool, strict: bool) -> None:
    """A weight that was divided by a pre-scale is wrong without it, and one that was not is wrong with it."""
    x, smoothed, plain = randn(3, 12), make(act_pre_scale=True), make()
    for source in (smoothed, plain, smoothed):
        for receiver in (make(), make(act_pre_scale=True)):
            assert receiver.load_state_dict(copy.deepcopy(source.state_dict()), strict=strict, assign=assign) == ([], [])
            assert torch.equal(receiver(x), source(x))
    receiver = make(act_pre_scale=True)
    receiver.load_state_dict({"bias": torch.zeros(8)}, strict=False)
    assert torch.equal(receiver.act_pre_scale, smoothed.act_pre_scale)


LOAD_ERRORS = [
    ("act_pre_scale", torch.ones(12).half(), TypeError, "0.act_pre_scale must be torch.float32, got torch.float16"),
    ("act_pre_scale", -torch.ones(12), ValueError, "0.act_pre_scale must be finite and positive, got -1.0 in 12 of 12 places"),
    ("weight", torch.zeros(8, 12), TypeError, "0.weight must be torch.int8, got torch.float32"),
    ("input_zero_point", torch.zeros(1, dtype=torch.int32), TypeError, "0.input_zero_point must be torch.int8, got torch.int32"),
    ("weight_scale", torch.ones(8, 1).half(), TypeError, "0.weight_scale must be torch.float32, got torch.float16"),
    ("weight_scale", torch.zeros(8, 1), ValueError, "0.weight_scale must be finite and positive, got 0.0 in 8 of 8 places"),
    ("weight_scale", torch.tensor([[1.0]] * 7 + [[-2.0]]), ValueError, "0.weight_scale must be finite and positive, got -2.0 in 1 of 8 places"),
    ("input_scale", torch.tensor([float("nan")]), ValueError, "0.input_scale must be finite and positive, got nan in 1 of 1 places"),
    ("input_scale", torch.tensor([float("inf")]), ValueError, "0.input_scale must be finite and positive, got inf in 1 of 1 places"),
    ("input_scale", torch.ones(1).double(), TypeError, "0.input_scale must be torch.float32, got torch.float64"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), LOAD_ERRORS, ids=[message for *_, message in LOAD_ERRORS])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_what_is_no_int8_linear_is_refused(name: str, value: Tensor, error: type[Exception], message: str, assign: bool) -> None:
    receiver = nn.Sequential(make(act_mapping_type=ASYMMETRIC, static=True))
    before = copy.deepcopy(receiver.state_dict())
    with pytest.raises(error) as raised:
        receiver.load_state_dict(copy.deepcopy(before) | {f"0.{name}": value}, assign=assign)
    assert str(raised.value) == message
    assert all(torch.equal(t, before[key]) for key, t in receiver.state_dict().items())


def test_set_input_scale_keeps_a_copy() -> None:
    layer = make(act_mapping_type=ASYMMETRIC, static=True)
    scale, zero_point = torch.tensor([[0.5]]), torch.tensor(3, dtype=torch.int8)
    layer.set_input_scale(scale, zero_point)
    scale.zero_()
    zero_point.zero_()
    assert (layer.input_scale.tolist(), layer.input_zero_point.tolist()) == ([0.5], [3])


INT8 = torch.tensor([3], dtype=torch.int8)
SCALE_ERRORS = [
    (None, (torch.ones(1), None), ValueError, "set_input_scale needs a layer with static=True, got a dynamic one"),
    (MappingType.SYMMETRIC, (torch.ones(2), None), ValueError, "scale must have one element, got shape [2]"),
    (MappingType.SYMMETRIC, (torch.ones(1).half(), None), TypeError, "scale must be torch.float32, got torch.float16"),
    (MappingType.SYMMETRIC, (torch.zeros(1), None), ValueError, "scale must be finite and positive, got 0.0 in 1 of 1 places"),
    (MappingType.SYMMETRIC, (torch.ones(1), INT8), ValueError,
     "zero_point goes with MappingType.ASYMMETRIC alone, got tensor([3], dtype=torch.int8) with MappingType.SYMMETRIC"),
    (ASYMMETRIC, (torch.ones(1), None), ValueError, "zero_point goes with MappingType.ASYMMETRIC alone, got None with MappingType.ASYMMETRIC"),
    (ASYMMETRIC, (torch.ones(1), INT8.int()), TypeError, "zero_point must be torch.int8 with one element, got torch.int32 [1]"),
    (ASYMMETRIC, (torch.ones(1), INT8.expand(2)), TypeError, "zero_point must be torch.int8 with one element, got torch.int8 [2]"),
]  # fmt: skip


@pytest.mark.parametrize(("mapping", "arguments", "error", "message"), SCALE_ERRORS, ids=[message for *_, message in SCALE_ERRORS])
def test_set_input_scale_errors_change_nothing(
    mapping: MappingType | None, arguments: tuple[Tensor, Tensor | None], error: type[Exception], message: str
) -> None:
    layer = make() if mapping is None else make(act_mapping_type=mapping, static=True)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error) as raised:
        layer.set_input_scale(*arguments)
    assert str(raised.value) == message
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
