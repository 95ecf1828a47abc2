"""calibrate's errors, each by its exact words, and that they leave the model as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from calibrate_cases import BATCHES, Net, quietly, static, watched

from int8_inductor import Int8DynamicActivationInt8WeightConfig, MappingType, MinMaxObserver, quantize_


def nan_in_the_second_batch() -> Iterator[Any]:
    yield BATCHES[0]
    yield BATCHES[1], math.nan


def failing() -> Iterator[Any]:
    yield BATCHES[0]
    raise OSError("the disk is gone")


NOT_FINITE = "batches must give finite activations, got NaN or infinity in the input of"
BAD_BATCHES: list[tuple[Callable[[], Any], type[BaseException], str]] = [
    (list, ValueError, "batches must have at least one batch, got none"),
    (lambda: [(BATCHES[0],), {"x": BATCHES[0], "skip": True}, 3], TypeError, "batch 2 must be a tensor, a tuple or list, or a mapping, got int"),
    (lambda: ["text"], TypeError, "batch 0 must be a tensor, a tuple or list, or a mapping, got str"),
    (lambda: [{"x": BATCHES[0], "skip": True}], ValueError, "batches must reach every static Int8Linear, got none that reaches 'second'"),
    (lambda: [BATCHES[0][:0]], ValueError, "batches must reach every static Int8Linear, got none that reaches 'first'"),
    (lambda: [BATCHES[0], BATCHES[0] / 0], ValueError, f"{NOT_FINITE} 'first'"),
    (nan_in_the_second_batch, ValueError, f"{NOT_FINITE} 'second'"),
    (lambda: [BATCHES[0], (BATCHES[0], -math.inf)], ValueError, f"{NOT_FINITE} 'second'"),
    (failing, OSError, "the disk is gone"),
    (lambda: [BATCHES[0], BATCHES[0][:, :7]], ValueError, "x must have shape [..., 8], got [5, 7]"),
    (lambda: torch.zeros(2, 5, 8), TypeError, "batches must be an iterable of batches, got Tensor"),
    (lambda: {"x": BATCHES[0]}, TypeError, "batches must be an iterable of batches, got dict"),
    (lambda: "text", TypeError, "batches must be an iterable of batches, got str"),
    (lambda: 3, TypeError, "batches must be an iterable of batches, got int"),
]


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(("batches", "error", "message"), BAD_BATCHES, ids=[message for *_, message in BAD_BATCHES])
def test_an_error_leaves_the_model_as_it_was(
    batches: Callable[[], Any], error: type[BaseException], message: str, calibrated: bool
) -> None:
    model = static(MappingType.ASYMMETRIC)
    if calibrated:
        quietly(model)
    before, state = watched(model), copy.deepcopy(model.state_dict())
    with pytest.raises(error) as raised:
        quietly(model, batches())
    assert str(raised.value) == message
    assert watched(model) == before
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert model.first.calibrated is model.second.calibrated is calibrated


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (lambda: "net", {}, TypeError, "model must be a torch.nn.Module, got str"),
        (static, {"observer": MinMaxObserver}, TypeError, f"observer must be an Observer such as MinMaxObserver(), got {MinMaxObserver!r}"),
        (static, {"observer": "mse"}, TypeError, "observer must be an Observer such as MinMaxObserver(), got 'mse'"),
        (Net, {}, ValueError,
         "model must have an Int8Linear with static=True (quantize_ with Int8StaticActivationInt8WeightConfig makes them), got Net without one"),
        (lambda: static().to("meta"), {}, ValueError, "model must have its weights loaded, got 'first' on the meta device"),
    ],
)  # fmt: skip
def test_argument_errors(model: Callable[[], Any], arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        quietly(model(), **arguments)
    assert str(raised.value) == message


def test_a_dynamic_model_has_nothing_to_calibrate() -> None:
    model = Net()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match=r"^model must have an Int8Linear with static=True"):
        quietly(model)
