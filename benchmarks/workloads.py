"""The model benchmark's workloads: one object each, with what builds the model and its inputs. Nothing is downloaded: weights are random,
or those that `make demo` installs as a package."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import minilm

SEED = 0


@dataclass(frozen=True)
class Workload:
    """A model and the input of one forward.

    name: as it stands in tables. model: the name that --models takes; workloads of one model share its weights.
    library: the package that the model comes from. build: () -> float32 model on the default device. draw: (device, dtype) -> a fresh random input.
    needs: why the model's files are not here, or None. default_on: the device type where it runs without being asked for.
    """

    name: str
    model: str
    library: str
    build: Callable[[], nn.Module]
    draw: Callable[[torch.device, torch.dtype], Tensor]
    needs: Callable[[], str | None] = lambda: None
    default_on: str = "cuda"

    def lacks(self) -> str | None:
        """Why the model cannot be built here, or None. timm imports torchvision, which may be missing where timm is there."""
        try:
            importlib.import_module(self.library)
        except ImportError as error:
            return f"{self.library} cannot be imported: {error}"
        return self.needs()

    def make(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The model in eval mode; the same weights every time."""
        torch.manual_seed(SEED)
        with torch.device(device):
            model = self.build()
        return model.to(device, dtype).eval().requires_grad_(False)


class HiddenStates(nn.Module):
    """A transformers model that returns its last hidden state alone, a plain tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).last_hidden_state


VOCABULARY = 1024
"""Small, to keep the embedding out of the picture; there is no head."""


def _llama(**sizes: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaModel

        return HiddenStates(LlamaModel(LlamaConfig(vocab_size=VOCABULARY, attn_implementation="sdpa", use_cache=False, **sizes)))

    return build


def _vit(**options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model("vit_base_patch16_224", pretrained=False, **options)

    return build


def _tokens(batch: int, length: int) -> Callable[[torch.device, torch.dtype], Tensor]:
    return lambda device, dtype: torch.randint(0, VOCABULARY, (batch, length), device=device)


def _images(batch: int, size: int) -> Callable[[torch.device, torch.dtype], Tensor]:
    return lambda device, dtype: torch.randn(batch, 3, size, size, device=device, dtype=dtype)


def _minilm(batch: int, tokens: int) -> Workload:
    draw = minilm.text_tokens(batch, tokens)
    return Workload(f"MiniLM, {batch} x {tokens}", "minilm", "transformers", minilm.OfTokens, draw, minilm.lacks, default_on="cpu")


_LLAMA_8B = _llama(hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8)
_LLAMA_TINY = _llama(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
_VIT_TINY = _vit(img_size=32, embed_dim=64, depth=1, num_heads=2, num_classes=16)

WORKLOADS: tuple[Workload, ...] = (
    Workload("ViT-B/16, batch 32", "vit", "timm", _vit(), _images(32, 224)),
    Workload("Llama x4 layers, 1 x 2048", "llama", "transformers", _LLAMA_8B, _tokens(1, 2048)),
    Workload("Llama x4 layers, 1 x 128", "llama", "transformers", _LLAMA_8B, _tokens(1, 128)),
    Workload("Llama x4 layers, 32 x 1", "llama", "transformers", _LLAMA_8B, _tokens(32, 1)),
    _minilm(1, 1),
    _minilm(1, 16),
    _minilm(1, 128),
    _minilm(4, 128),
    _minilm(32, 128),
)
TINY: tuple[Workload, ...] = (
    Workload("tiny ViT, batch 2", "vit", "timm", _VIT_TINY, _images(2, 32)),
    Workload("tiny Llama, 1 x 8", "llama", "transformers", _LLAMA_TINY, _tokens(1, 8)),
)
"""The same paths in a size for tests, on any machine."""
