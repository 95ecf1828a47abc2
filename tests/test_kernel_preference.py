"""Kernel preference: which kernels run where, by config and by option, and what cannot be met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from doors import one_linear, rows, templates
from support import run
from torch import Tensor, nn

from int8_inductor import (
    Int8StaticActivationInt8WeightConfig,
    KernelPreference,
    KernelPreferenceError,
    MappingType,
    calibrate,
    config,
    kernels,
    quantize_,
)
from int8_inductor.kernels import resolve


@pytest.fixture
def x() -> Tensor:
    return rows()


@pytest.fixture
def model() -> nn.Module:
    return one_linear()


@pytest.fixture(scope="module")
def mlp() -> tuple[nn.Module, Tensor]:
    """Two static linears, asymmetric, with a GELU between them, and an input."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8)).eval()
    x = torch.randn(6, 24)
    quantize_(model, Int8StaticActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC))
    calibrate(model, [x], progress=False)
    return model, x


PREFERENCES = {
    "auto": "triton",
    "triton": "triton",
    "torch": "torch",
    KernelPreference.AUTO: "triton",
    KernelPreference.TRITON: "triton",
    KernelPreference.TORCH: "torch",
}


@pytest.mark.parametrize("door", ["option", "global", "option over global"])
@pytest.mark.parametrize("preference", PREFERENCES, ids=repr)
def test_kernel_preference(preference: str, door: str, mlp: tuple[nn.Module, Tensor]) -> None:
    """TRITON launches templates, TORCH calls _int_mm, AUTO is TRITON where there is Triton; the results agree."""
    model, x = mlp
    opposite = "torch" if PREFERENCES[preference] == "triton" else "triton"
    flag = {"option": "auto", "global": preference, "option over global": opposite}[door]
    with config.patch(kernel_preference=flag):
        compiled = run(model, x, options=None if door == "global" else {"kernel_preference": preference})
    compiled.check_report(linear={"rewritten": 2}, quant={"feeds": 1, "rewritten": 1}, dequant={"rewritten": 4})
    products = sum(code.count("_int_mm(") for code in compiled.code)
    assert (templates(compiled), products) == ((2, 0) if PREFERENCES[preference] == "triton" else (0, 2))
    # The second linear reads what the first one quantized: in a case with no tie, the same int8 values.
    torch.testing.assert_close(compiled.output, model(x), rtol=1e-5, atol=1e-6)


def test_an_unknown_preference_in_the_config_is_refused(model: nn.Module, x: Tensor) -> None:
    message = "kernel_preference must be one of 'auto', 'triton', 'torch', got 'fast'"
    with config.patch(kernel_preference="fast"), pytest.raises(RuntimeError, match=message):
        run(model, x)


@pytest.mark.parametrize("door", ["option", "global"])
def test_triton_on_plain_cpp_is_an_error_that_names_what_is_possible(door: str, model: nn.Module, x: Tensor) -> None:
    flag, options = ("triton", None) if door == "global" else ("auto", {"kernel_preference": "triton"})
    with config.patch(kernel_preference=flag), pytest.raises(KernelPreferenceError) as raised:
        run(model, x, cpu_backend="cpp", options=options)
    assert "kernel_preference 'triton' cannot be met on cpu: Inductor's CPU backend is not Triton; use 'torch' or 'auto'" in str(raised.value)


@pytest.mark.parametrize(
    ("device", "capability", "triton", "auto", "why_not"),
    [
        ("cuda:0", (8, 0), True, "triton", None),
        ("cuda:0", (12, 0), True, "triton", None),
        ("cuda:0", (7, 5), True, "torch", "compute capability 7.5 is below 8.0"),
        ("cuda:0", (9, 0), False, KernelPreferenceError, "the triton package is not installed"),
        ("xpu:0", None, True, "torch", "there is no template for xpu"),
    ],
)
def test_what_a_device_can_run(
    device: str, capability: tuple[int, int] | None, triton: bool, auto: Any, why_not: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kernels, "has_triton_package", lambda: triton)
    place = torch.device(device)
    assert resolve(KernelPreference.TORCH, place) is KernelPreference.TORCH
    if auto is KernelPreferenceError:
        with pytest.raises(KernelPreferenceError, match="cuda:0 needs triton: the triton package is not installed"):
            resolve(KernelPreference.AUTO, place)
    else:
        assert resolve(KernelPreference.AUTO, place).value == auto
    if why_not is None:
        assert resolve(KernelPreference.TRITON, place) is KernelPreference.TRITON
    else:
        with pytest.raises(KernelPreferenceError, match=f"kernel_preference 'triton' cannot be met on {device}: {why_not}"):
            resolve(KernelPreference.TRITON, place)
