"""smooth_quant: the factors of the paper, the function kept, and which norms may take a factor."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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

OUTLIERS = torch.tensor([1.0, 1, 1, 30, 1, 1, 0.1, 1])
PRE_SCALE = "act_pre_scale"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(model: nn.Module, *batches: Any, **arguments: Any) -> None:
    smooth_quant(model, list(batches), progress=False, **arguments)


def pre_scaled(model: nn.Module) -> set[str]:
    """The modules that have a pre-scale."""
    return {name.removesuffix("." + PRE_SCALE) for name, _ in model.named_buffers() if name.endswith(PRE_SCALE)}


class TwoOfOneInput(nn.Module):
    """Two linears that share an input, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.after = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x * OUTLIERS
        return self.after(self.left(x) + self.right(x))


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


# Norms that take the factors ------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A norm as transformers write it, at home in no library; `offset` is 1 where the weight is one from 1, as Gemma's is."""

    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(size)), offset

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.offset + self.weight) * wide.to(hidden.dtype)


class Block(nn.Module):
    """A norm, two linears that read it, and one after them; `use` may do more with what the norm gives."""

    def __init__(self, norm: nn.Module, use: Callable[[Any, Tensor, Tensor], Any] = lambda self, normed, y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.use = norm, use
        self.left, self.right, self.after = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.kept: Any = None
        with torch.no_grad():
            for name, parameter in norm.named_parameters():
                parameter.copy_(randn(8, seed=len(name)).exp() * OUTLIERS)

    def forward(self, x: Tensor) -> Any:
        normed = self.norm(x)
        assert normed.shape[-1] == 8
        return self.use(self, normed, self.after(self.left(normed) * self.right(normed)))


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
