"""MiniLM with its real weights, as the demo `python -m examples.minilm` loads it, for the benchmarks of models and of accuracy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

PADDING = 0
"""BERT's token that fills up a text."""


def lacks() -> str | None:
    """Why the encoder cannot be loaded here, or None."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    from examples.minilm.encoder import PACKAGE

    return None if importlib.util.find_spec(PACKAGE) is not None else f"the package {PACKAGE}, which `make demo` installs, is not installed"


def encoder(layers: int | None = None) -> nn.Module:
    """(token ids, mask) -> sentence embeddings; all layers, or the first `layers`. On the CPU, whatever the default device."""
    from examples.minilm.encoder import load_encoder

    with torch.device("cpu"):
        return load_encoder(layers)


class OfTokens(nn.Module):
    """The encoder as a function of token ids alone: int64 [batch, tokens] -> [batch, 384]."""

    def __init__(self, layers: int | None = None) -> None:
        super().__init__()
        self.encoder = encoder(layers)

    def forward(self, input_ids: Tensor) -> Tensor:
        embeddings: Tensor = self.encoder(input_ids, (input_ids != PADDING).long())
        return embeddings


def text_tokens(batch: int, tokens: int) -> Callable[[torch.device, torch.dtype], Tensor]:
    """Draws token ids of `batch` paragraphs of the demo's text, padded or cut to `tokens`; a single one is [CLS]."""

    def draw(device: torch.device, dtype: torch.dtype) -> Tensor:
        from examples.minilm.encoder import tokenize
        from examples.minilm.text import paragraphs

        texts = paragraphs()
        chosen = [texts[i] for i in torch.randperm(len(texts))[:batch].tolist()]
        # The tokenizer cuts no text to less than [CLS] and [SEP].
        ((ids, _),) = tokenize(chosen, batch, max(tokens, 2))
        return ids[:, :tokens].to(device)

    return draw
