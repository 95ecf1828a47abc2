"""Models whose graphs are frozen, on a CPU: how many calls of oneDNN's kernel they are, and what explain says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prepacked_cases import calls, frozen, limit, prepacks  # noqa: F401 - a fixture that is used by itself
from support import Compiled
from torch import Tensor, nn

from int8_inductor import (
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    MappingType,
    calibrate,
    quantize_,
)


class Attention(nn.Module):
    """Q, K and V of one activation; V has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64, bias=i != 2) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (linear(h).unflatten(-1, (4, 16)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


CONFIGS = (
    Int8StaticActivationInt8WeightConfig(),
    Int8StaticActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC),
    Int8DynamicActivationInt8WeightConfig(),
)


def quantized(model: nn.Module, config: Any, x: Tensor) -> nn.Module:
    quantize_(model.eval(), config)
    if isinstance(config, Int8StaticActivationInt8WeightConfig):
        calibrate(model, [(x,)], progress=False)
    for buffer in model.buffers():
        if buffer.dtype == torch.int8 and buffer.ndim == 2:
            buffer.clamp_(-limit(), limit())
    return model


def check_model(model: nn.Module, x: Tensor) -> Compiled:
    compiled = frozen(model, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled.output, model(x), rtol=1e-4, atol=1e-4)
    return compiled


@pytest.mark.parametrize(
    ("config", "batch", "joined"),
    [(CONFIGS[0], 2, True), (CONFIGS[0], 40, False), (CONFIGS[1], 40, False), (CONFIGS[2], 2, True)],
    ids=["static, few", "static", "asymmetric", "dynamic, few"],
)
def test_linears_of_one_activation_are_one_call_where_rows_are_few(config: Any, batch: int, joined: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, 16, 64)
    compiled = check_model(quantized(Attention(), config, x), x)
    assert len(calls(compiled)) == (2 if joined else 4)
    assert len({re.search(r"tensor\((\w+)", call).group(1) for call in calls(compiled)[:3]}) == (2 if joined else 1)  # type: ignore[union-attr]
    assert str(compiled.report).count(", 3 side by side") == (3 if joined else 0)
    assert str(compiled.report).count("onednn.qlinear_pointwise on a prepacked weight") == 4
    compiled.check_report(linear={"rewritten": 4}, quant=compiled.report.counts()["quant"], dequant={"rewritten": 8})


def test_linears_of_other_scales_are_not_joined() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 64)
    model: Any = quantized(Attention(), CONFIGS[0], x)
    model.k.input_scale.mul_(1.5)
    compiled = check_model(model, x)
    assert len(calls(compiled)) == 4


@pytest.mark.parametrize("config", CONFIGS[:2], ids=["static", "asymmetric"])
def test_a_chain_stays_int8(config: Any) -> None:
    """linear -> gelu -> quant -> linear: two calls, the first of which stores int8, and nothing between them."""
    torch.manual_seed(0)
    x = torch.randn(32, 48)
    model = quantized(nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 40)), config, x)
    compiled = check_model(model, x)
    first, second = calls(compiled)
    assert ", torch.uint8, 'gelu'," in first
    assert ", torch.float32, 'none'," in second
    assert len({name for code in compiled.code for name in re.findall(r"cpp_fused_\w+", code)}) == 1  # x alone is quantized by a kernel
