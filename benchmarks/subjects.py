"""What the accuracy benchmark judges: models with their text (SUBJECTS) and ways to quantize them (SCHEMES). To add one, list it."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8_inductor import (
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    MappingType,
    PerTensor,
    calibrate,
    quantize_,
    smooth_quant,
)

from . import minilm

SEED = 0
Batches = list[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Subject:
    """A float32 model, batches to calibrate and to judge it on, and what perplexity means for it.

    name: as it stands in tables. key: the name that --subjects takes. lacks: why it cannot be built here, or None.
    build: () -> the model, on the default device. batches: number of them, and a seed -> batches on the CPU; other seeds give other ones.
    perplexity: (outputs, outputs of the float32 model) -> a number of at least 1, smaller is better.
    """

    name: str
    key: str
    lacks: Callable[[], str | None]
    build: Callable[[], nn.Module]
    batches: Callable[[int, int], Batches]
    perplexity: Callable[[list[Tensor], list[Tensor]], float]
    calibration: int = 4
    evaluation: int = 8

    def make(self, device: torch.device) -> nn.Module:
        """The model in eval mode; the same weights every time."""
        torch.manual_seed(SEED)
        with torch.device(device):
            model = self.build()
        return model.to(device, torch.float32).eval().requires_grad_(False)


# MiniLM -----------------------------------------------------------------------------------------------------------------------------

PAIRS = 16
"""Paragraphs in a batch: twice as many texts, first halves and then second halves."""
TOKENS = 64
TEMPERATURE = 0.05
"""Of the loss that MiniLM was trained with: cosines times 20."""


def _halves(count: int, seed: int) -> Batches:
    """Paragraphs of the demo's text cut in the middle: token ids and mask, [2 PAIRS, TOKENS]. Seed 0 and other seeds have none in common."""
    from examples.minilm.encoder import tokenize
    from examples.minilm.text import paragraphs, samples

    shuffled, _ = samples(len(paragraphs()), 0)
    chosen = shuffled[: count * PAIRS] if seed else shuffled[-count * PAIRS :]
    batches: Batches = []
    for start in range(0, count * PAIRS, PAIRS):
        words = [text.split() for text in chosen[start : start + PAIRS]]
        texts = [" ".join(each[: len(each) // 2]) for each in words] + [" ".join(each[len(each) // 2 :]) for each in words]
        batches += tokenize(texts, 2 * PAIRS, TOKENS)
    return batches


def _pair_perplexity(outputs: list[Tensor], exact: list[Tensor]) -> float:
    """exp of the loss that the model was trained on: which of all second halves goes with a first half. Guessing gives their number."""
    first = torch.cat([each[:PAIRS] for each in outputs]).double()
    second = torch.cat([each[PAIRS:] for each in outputs]).double()
    scores = F.normalize(first, dim=1) @ F.normalize(second, dim=1).t() / TEMPERATURE
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device)).exp().item()


# Llama's shapes, random -------------------------------------------------------------------------------------------------------------

VOCABULARY = 1024
OUTLIERS, GAIN = 8, 30.0
"""Channels of each norm's output that are planted this many times larger, as trained models of this size have them."""


class Logits(nn.Module):
    """A causal language model of transformers that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def _plant_outliers(model: Any) -> None:
    """Multiply a few channels of each norm's weight and divide its readers' columns by the same: the function stays, the activations do not."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = {
            layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, linears in readers.items():
            channels = torch.randperm(len(norm.weight), device=norm.weight.device)[:OUTLIERS]
            norm.weight.data[channels] *= GAIN
            for linear in linears:
                linear.weight.data[:, channels] /= GAIN


def _llama(**sizes: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, attn_implementation="sdpa", use_cache=False, **sizes))
        _plant_outliers(model)
        return Logits(model)

    return build


def _tokens(length: int) -> Callable[[int, int], Batches]:
    def batches(count: int, seed: int) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        return [(torch.randint(0, VOCABULARY, (1, length), generator=generator),) for _ in range(count)]

    return batches


def _self_perplexity(outputs: list[Tensor], exact: list[Tensor]) -> float:
    """exp of the cross-entropy to the float32 model's own next-token distribution: as on text that it would write, without sampling that."""
    logits, wanted = (torch.cat([each.flatten(0, -2) for each in many]).double() for many in (outputs, exact))
    return F.cross_entropy(logits, wanted.softmax(-1)).exp().item()


def _transformers_lacks() -> str | None:
    return None if importlib.util.find_spec("transformers") is not None else "transformers is not installed"


def _random_llama(name: str, key: str, length: int, calibration: int, evaluation: int, **sizes: int) -> Subject:
    return Subject(name, key, _transformers_lacks, _llama(**sizes), _tokens(length), _self_perplexity, calibration, evaluation)


_LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
_LLAMA_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}

SUBJECTS: tuple[Subject, ...] = (
    Subject("MiniLM, real weights and text", "minilm", minilm.lacks, minilm.encoder, _halves, _pair_perplexity, calibration=8, evaluation=16),
    _random_llama("Llama-3.1-8B shapes, 1 layer, random", "llama1", 256, 2, 2, num_hidden_layers=1, **_LLAMA_8B),
    _random_llama("Llama-3.1-8B shapes, 4 layers, random", "llama4", 1024, 2, 4, num_hidden_layers=4, **_LLAMA_8B),
)
DEFAULT_KEYS = {"cpu": ("minilm", "llama1"), "cuda": ("minilm", "llama4")}
TINY: tuple[Subject, ...] = (
    Subject("MiniLM, 1 layer", "minilm", minilm.lacks, lambda: minilm.encoder(1), _halves, _pair_perplexity, calibration=1, evaluation=1),
    _random_llama("tiny Llama, random", "llama1", 16, 1, 2, num_hidden_layers=2, **_LLAMA_TINY),
)
"""The same paths in a size for tests, on any machine."""


# Schemes ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """A way to quantize a model. config: of quantize_; None: the model stays float. alpha: of smooth_quant before it; dtype: of the whole model."""

    name: str
    config: Any = None
    alpha: float | None = None
    dtype: torch.dtype = torch.float32

    def prepare(self, model: nn.Module, calibration: Batches) -> tuple[nn.Module, nn.Module]:
        """`model` quantized in place, and a float one that its layers are compared with: smoothed where it is."""
        if self.alpha is not None:
            smooth_quant(model, calibration, self.alpha, progress=False)
        reference = copy.deepcopy(model)
        if self.config is not None:
            quantize_(model, self.config, lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)
        if isinstance(self.config, Int8StaticActivationInt8WeightConfig):
            calibrate(model, calibration, progress=False)
        return model.to(self.dtype), reference


_STATIC = Int8StaticActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC)
_DYNAMIC_PER_TENSOR = Int8DynamicActivationInt8WeightConfig(granularity=PerTensor())

SCHEMES: tuple[Scheme, ...] = (
    Scheme("float32"),
    Scheme("bfloat16", dtype=torch.bfloat16),
    Scheme("dynamic-per-row", Int8DynamicActivationInt8WeightConfig()),
    Scheme("smooth-dynamic-per-row", Int8DynamicActivationInt8WeightConfig(), alpha=0.5),
    Scheme("dynamic-per-tensor", _DYNAMIC_PER_TENSOR),
    Scheme("smooth-dynamic-per-tensor", _DYNAMIC_PER_TENSOR, alpha=0.5),
    Scheme("static", _STATIC),
    Scheme("smooth-static", _STATIC, alpha=0.85),
)
