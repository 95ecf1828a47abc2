"""smooth_quant: which norms may take the factors of the linears that read them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from smooth_cases import OUTLIERS, Block, Scaled, pre_scaled, randn, smooth
from torch import Tensor, nn


def llama_norm(size: int) -> nn.Module:
    return pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(size)


def gemma_norm(size: int) -> nn.Module:
    return pytest.importorskip("transformers.models.gemma.modeling_gemma").GemmaRMSNorm(size)


FOLDING_NORMS = [nn.LayerNorm, lambda size: nn.LayerNorm(size, bias=False), nn.RMSNorm, llama_norm, Scaled]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", FOLDING_NORMS, ids=["LayerNorm", "LayerNorm without bias", "RMSNorm", "LlamaRMSNorm", "one of its own"])
def test_a_norm_takes_the_factors_of_all_that_read_it(norm: Callable[[int], nn.Module], dtype: torch.dtype) -> None:
    model, x = Block(norm(8)).to(dtype), randn(5, 3, 8).to(dtype)
    before, want = copy.deepcopy(model), model(x)
    smooth(model, x)
    assert pre_scaled(model) == {"after"}
    factors = (before.norm.weight / model.norm.weight).float()
    assert factors.max() / factors.min() > 4
    tolerance = 2.0**-22 if dtype == torch.float32 else 2.0**-6
    for name, parameter in before.norm.named_parameters():
        torch.testing.assert_close(getattr(model.norm, name).float() * factors, parameter.float(), rtol=tolerance, atol=0)
        assert getattr(model.norm, name).dtype == dtype
    for name in ("left", "right"):
        torch.testing.assert_close(getattr(model, name).weight.float(), getattr(before, name).weight.float() * factors, rtol=tolerance, atol=0)
    torch.testing.assert_close(model(x), want, rtol=0, atol=64 * tolerance * want.abs().max().item())
    assert all(p.requires_grad for p in model.parameters())
    first = copy.deepcopy(model.state_dict())
    smooth(model, x)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, first[name], rtol=8 * tolerance, atol=0)


def keep(self: Any, normed: Tensor, y: Tensor) -> Tensor:
    self.kept = normed
    return y


USES = {
    "the residual": lambda self, normed, y: y + normed,
    "a view": lambda self, normed, y: y + normed.view(-1, 8)[0],
    "its own product": lambda self, normed, y: y + nn.functional.linear(normed, self.left.weight).sum(),
    "an output": lambda self, normed, y: (y, normed),
    "an attribute": keep,
    "numpy": lambda self, normed, y: y + float(normed.detach().numpy().sum()),
    "in place": lambda self, normed, y: (y, normed.mul_(2))[0],
    "a linear left out": lambda self, normed, y: y + self.other(normed),
    "the linear after, too": lambda self, normed, y: y + self.left(normed + 1).sum(),
}


@pytest.mark.parametrize("use", list(USES))
@torch.no_grad()
def test_a_norm_that_something_else_reads_is_left_alone(use: str) -> None:
    model, x = Block(nn.LayerNorm(8), USES[use]), randn(5, 3, 8)
    model.other = nn.Linear(8, 8)
    norm = copy.deepcopy(model.norm.state_dict())
    want = model(x)
    smooth(model, x, filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "other")
    assert pre_scaled(model) == {"left", "right", "after"}
    assert all(torch.equal(t, norm[name]) for name, t in model.norm.state_dict().items())
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)


class InPlace(nn.Module):
    """Changes what it is given, which the residual holds too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.weight)


class Twice(nn.Module):
    """A weight whose square counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * self.weight


class WithABuffer(nn.LayerNorm):
    """Has state beside its weight and bias."""

    def __init__(self) -> None:
        super().__init__(8)
        self.register_buffer("calls", torch.zeros(()))


def hooked() -> nn.Module:
    norm = nn.LayerNorm(8)
    norm.register_forward_hook(lambda module, args, output: output + 1)
    return norm


@pytest.mark.parametrize(
    "norm", [lambda: gemma_norm(8), lambda: Scaled(8, 1.0), InPlace, Twice, WithABuffer, hooked, nn.Identity, lambda: nn.PReLU(8)]
)
@torch.no_grad()
def test_what_does_not_scale_with_its_weight_is_no_such_norm(norm: Callable[[], nn.Module]) -> None:
    model, x = Block(norm()), randn(5, 8)
    before, want = copy.deepcopy(model.norm.state_dict()), model(x.clone())
    smooth(model, x.clone())
    assert pre_scaled(model) == {"left", "right", "after"}
    assert all(torch.equal(t, before[name]) for name, t in model.norm.state_dict().items())
    assert torch.equal(model(x.clone()), want)


class Stack(nn.Module):
    """One norm called twice, by two linears; `mixed`: one of them reads something else as well."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.first, self.second, self.mixed = nn.RMSNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), mixed

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.norm(x * OUTLIERS))
        y = self.second(self.norm(x))
        return y + self.second(x.sin()) if self.mixed else y


@pytest.mark.parametrize("mixed", [False, True])
@torch.no_grad()
def test_a_norm_with_two_readers_takes_one_factor_for_both_or_none(mixed: bool) -> None:
    model, x = Stack(mixed), randn(5, 8)
    want = model(x)
    smooth(model, x)
    assert pre_scaled(model) == ({"first", "second"} if mixed else set())
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_weight_that_is_tied_elsewhere_stays_there() -> None:
    model, x = Block(nn.LayerNorm(8)), randn(5, 8)
    embedding, other = nn.Embedding(6, 8), nn.LayerNorm(8)
    embedding.weight, other.weight = model.left.weight, model.norm.weight
    kept = embedding.weight.clone(), other.weight.clone()
    smooth(model, x)
    assert pre_scaled(model) == {"after"}
    assert torch.equal(embedding.weight, kept[0])
    assert torch.equal(other.weight, kept[1])


def tiny_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, use_cache=False
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_a_llama_folds_both_norms_of_every_layer() -> None:
    model, ids = tiny_llama(), torch.arange(14).reshape(2, 7)
    want = model(ids).logits
    smooth(model, {"input_ids": ids}, filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
    assert pre_scaled(model) == {f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")}
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_torchs_encoder_layer_is_run_past_its_fast_path() -> None:
    model, x = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), 2).eval(), randn(2, 5, 8)
    want = model(x)
    enabled = torch.backends.mha.get_fastpath_enabled()
    smooth(model, x)
    assert torch.backends.mha.get_fastpath_enabled() is enabled
    assert pre_scaled(model) == {"layers.0.linear2", "layers.1.linear2"}
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
