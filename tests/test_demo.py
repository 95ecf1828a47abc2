"""The demo `python -m examples.minilm`: its text, its smoothing, what it counts and reports, and a quick run of the whole."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from examples.minilm.chart import write_chart
from examples.minilm.encoder import SentenceEncoder, load_encoder, tokenize
from examples.minilm.measure import prepare, run_rounds
from examples.minilm.report import Row, correctness, make_rows, table
from examples.minilm.smooth import SmoothedLinear, smooth_
from examples.minilm.text import MIN_WORDS, paragraphs, samples
from examples.minilm.variants import Variant, quantized
from torch import Tensor, nn

from int8_inductor import Int8Linear

ROOT = Path(__file__).parent.parent
INT8_NAMES = {"cpu": ["int8 dynamic", "int8 static"]}
MODES = ("default", "reduce-overhead", "max-autotune")
FLOAT_NAMES = {"cpu": ["eager float32", "torch.compile float32"], "cuda": ["eager bf16", *(f"torch.compile bf16, {mode}" for mode in MODES)]}
INT8_NAMES["cuda"] = [f"{name}, {mode}" for name in INT8_NAMES["cpu"] for mode in MODES]


def in_a_fresh_process(*arguments: str, timeout: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository's root, without the interpreter that these tests put in the place of a GPU."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_paragraphs_are_distinct_and_long_enough():
    found = paragraphs()
    assert len(found) == len(set(found)) >= 640
    assert min(len(text.split()) for text in found) >= MIN_WORDS
    assert all(text == " ".join(text.split()) for text in found)


def test_samples_are_the_same_in_every_process_and_have_nothing_in_common():
    measured, calibration = samples(512, 128)
    assert (len(measured), len(calibration)) == (512, 128)
    assert not set(measured) & set(calibration)
    code = "import hashlib; from examples.minilm.text import samples; print(hashlib.sha256(repr(samples(512, 128)).encode()).hexdigest())"
    wanted = hashlib.sha256(repr((measured, calibration)).encode()).hexdigest()
    for seed in ("1", "2"):
        assert in_a_fresh_process("-c", code, timeout=60, PYTHONHASHSEED=seed).stdout.strip() == wanted


def test_more_samples_than_paragraphs_are_refused():
    with pytest.raises(ValueError, match=rf"at most {len(paragraphs())}, .* got 5000 \+ 1"):
        samples(5000, 1)


def test_batches_have_exactly_the_tokens_asked_for():
    texts, _ = samples(8, 0)
    batches = tokenize(texts, 4, 64)
    assert [(ids.shape, mask.shape) for ids, mask in batches] == [((4, 64), (4, 64))] * 2
    again = tokenize(texts, 4, 64)
    assert all(torch.equal(a, b) for one, other in zip(batches, again, strict=True) for a, b in zip(one, other, strict=True))
    with pytest.raises(ValueError, match="multiple of batch_size 3, got 8"):
        tokenize(texts, 3, 64)


def test_embeddings_are_real_ones():
    """Real weights: paraphrases are nearer to one another than to what is about something else, and padding changes nothing."""
    texts = ["How do I cook rice?", "What is the best way to boil rice?", "The train to Paris leaves at noon.", "When does the Paris train depart?"]
    encoder = load_encoder()
    with torch.inference_mode():
        [short], [long] = (encoder(*tokenize(texts, 4, tokens)[0]) for tokens in (16, 64)), (encoder(*tokenize(texts, 4, 64)[0]),)
    similarity = long @ long.T
    assert similarity.fill_diagonal_(-2).argmax(1).tolist() == [1, 0, 3, 2]
    assert similarity[0, 1] > 0.7
    assert similarity[0, 2:].max() < 0.3
    torch.testing.assert_close(short, long, rtol=0, atol=1e-5)
