"""torch's own attention modules, which read weights past the linears' forward, after quantize_."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from int8_inductor import Int8DynamicActivationInt8WeightConfig, Int8Linear, quantize_

PADDING = torch.tensor([[False] * 6, [False] * 3 + [True] * 3])


@contextmanager
def fast_path(enabled: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Int8Linear]:
    """The Int8Linears that ran, in order. Not by hooks: a module with hooks does not take its fast path."""
    ran: list[Int8Linear] = []
    forward = Int8Linear.forward

    def record(self: Int8Linear, x: Tensor) -> Tensor:
        ran.append(self)
        return forward(self, x)

    monkeypatch.setattr(Int8Linear, "forward", record)
    return ran


def layer(activation: str = "relu") -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True).eval()


def assert_fast_path_is_eager(model: nn.Module, x: Tensor, padding: Tensor | None) -> None:
    """What the model gives without gradients is what its Python forward gives. Padded places, which have no meaning, are left out."""
    kept = torch.ones(2, 6, dtype=torch.bool) if padding is None else ~padding
    with fast_path(False):
        expected = model(x, src_key_padding_mask=padding)[kept]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = model(x, src_key_padding_mask=padding)
        assert got.shape == x.shape
        torch.testing.assert_close(got[kept], expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [None, PADDING], ids=["unpadded", "padded"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("depth", [0, 2], ids=["a layer", "an encoder"])
def test_transformer_encoder(depth: int, activation: str, padding: Tensor | None, calls: list[Int8Linear]) -> None:
    model: nn.Module = nn.TransformerEncoder(layer(activation), depth).eval() if depth else layer(activation)
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    unquantized = model(x, src_key_padding_mask=padding)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    linears = [m for m in model.modules() if isinstance(m, Int8Linear)]
    assert len(linears) == 2 * max(depth, 1)
    assert_fast_path_is_eager(model, x, padding)
    assert calls == linears * 3
    difference = (model(x, src_key_padding_mask=padding) - unquantized).abs()
    assert 0 < float(difference[~PADDING].max()) < 0.05


def test_an_encoder_inside_a_model_is_found_however_deep() -> None:
    model = nn.Sequential(nn.ModuleDict({"encoder": nn.TransformerEncoder(layer(), 1)}), nn.Linear(16, 4)).eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    assert_fast_path_is_eager(model[0]["encoder"], torch.randn(2, 6, 16), PADDING)


def test_an_encoder_that_stays_float_keeps_its_fast_path() -> None:
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer(), 1), "head": nn.Linear(16, 4)}).eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, name: name == "head")
    assert model["encoder"].use_nested_tensor is True
    assert model["encoder"].layers[0].activation_relu_or_gelu == 1


def test_multihead_attention_stays_float_and_runs() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, batch_first=True), "head": nn.Linear(16, 4)}).eval()
    x = torch.randn(2, 6, 16)
    expected, _ = model["attention"](x, x, x)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    assert [name for name, m in model.named_modules() if isinstance(m, Int8Linear)] == ["head"]
    for enabled in (True, False):
        with fast_path(enabled), torch.no_grad():
            got, _ = model["attention"](x, x, x)
        torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)


def test_a_decoder_layer_runs_and_agrees() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True).eval()
    x, memory = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    unquantized = model(x, memory)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with fast_path(False):
        expected = model(x, memory)
    with torch.no_grad():
        torch.testing.assert_close(model(x, memory), expected.detach(), rtol=1e-5, atol=1e-5)
    assert 0 < float((expected - unquantized).abs().max()) < 0.05
