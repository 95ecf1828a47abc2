"""The demo `python -m examples.minilm`: its text, what it counts and reports, and a quick run of the whole."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text
from processes import python
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import examples.minilm.__main__ as demo
from examples.minilm.chart import draw
from examples.minilm.encoder import load_encoder, tokenize
from examples.minilm.measure import prepare, run_rounds
from examples.minilm.report import Row, correctness, make_rows, table
from examples.minilm.text import MIN_WORDS, paragraphs, samples
from examples.minilm.variants import GPU_MODES, Variant, quantized
from int8_inductor import Int8Linear

ROOT = Path(__file__).parent.parent
INT8 = ["int8 dynamic", "int8 static"]
NAMES = {
    "cpu": ["eager float32", "torch.compile float32", *INT8],
    "cuda": ["eager bf16", *(f"{name}, {mode}" for name in ("torch.compile bf16", *INT8) for mode in GPU_MODES)],
}


def row(name: str, device: str = "cpu", **changes: object) -> Row:
    """A made-up row that holds every bar."""
    values = {
        "name": name, "device": device, "is_int8": name.startswith("int8"), "median_ms": 2.0, "p10_ms": 1.5, "p90_ms": 2.5, "speedup": 2.5,
        "megabytes": 60.0, "mean_cosine": 0.998, "worst_cosine": 0.995, "neighbour_agreement": 0.95, "linears": 36,
        "rewritten": 36 if name.startswith("int8") else None, "kernels": 80, "compile_seconds": 9.0, "all_ms": [2.0],
    }  # fmt: skip
    return Row(**{**values, **changes})


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
        assert python(code, ROOT, PYTHONHASHSEED=seed).stdout.strip() == wanted


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
    """Real weights: a paraphrase is nearer than what is about something else, and padding changes nothing."""
    texts = ["How do I cook rice?", "What is the best way to boil rice?", "The train to Paris leaves at noon.", "When does the Paris train depart?"]
    encoder = load_encoder()
    with torch.inference_mode():
        short, long = (encoder(*tokenize(texts, 4, tokens)[0]) for tokens in (16, 64))
    similarity = long @ long.T
    assert similarity.fill_diagonal_(-2).argmax(1).tolist() == [1, 0, 3, 2]
    assert similarity[0, 1] > 0.7 > 0.3 > similarity[0, 2:].max()
    torch.testing.assert_close(short, long, rtol=0, atol=1e-5)


def test_quantized_encoders_leave_the_float_one_alone():
    encoder = load_encoder(1)
    made = quantized(encoder, tokenize(samples(0, 8)[1], 4, 32))
    assert list(made) == INT8
    for module in made.values():
        assert sum(isinstance(each, Int8Linear) for each in module.modules()) == 6
        assert not any(isinstance(each, nn.Linear) for each in module.modules())
    assert all(each.static and each.calibrated for each in made["int8 static"].modules() if isinstance(each, Int8Linear))
    assert sum(isinstance(each, nn.Linear) for each in encoder.modules()) == 6


class ThreeKernels(nn.Module):
    """linear, gelu and a copy compute; view and transpose do not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.linear(ids)).view(-1, 2, 3)
        return hidden.transpose(1, 2).contiguous().view(-1, 6)


def test_weights_are_frozen_while_a_variant_compiles_on_the_cpu():
    variant, seen = Variant("one", ThreeKernels()), []
    variant.run = lambda *batch: seen.append(inductor_config.freezing) or variant.module(*batch)
    prepare([variant], (torch.randn(2, 4), torch.ones(2, 4)))
    assert set(seen) == {True}
    assert not inductor_config.freezing


def test_kernels_are_counted_and_rounds_keep_every_embedding_once():
    variants = [Variant("one", ThreeKernels()), Variant("two", ThreeKernels())]
    batches = [(torch.randn(2, 4), torch.ones(2, 4)) for _ in range(3)]
    prepare(variants, batches[0])
    assert [each.kernels for each in variants] == [3, 3]
    run_rounds(variants, batches, 7)
    for each in variants:
        assert len(each.milliseconds) == 7
        assert min(each.milliseconds) > 0
        with torch.no_grad():
            torch.testing.assert_close(torch.cat(each.embeddings), torch.cat([each.module(*batch) for batch in batches]))
    with pytest.raises(ValueError, match="rounds must be at least the 3 batches, got 2"):
        run_rounds(variants, batches, 2)


def test_rows_compare_with_the_reference_and_the_fastest_stock_row():
    reference = nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), dim=1)
    swapped = reference[[0, 2, 1, 3]]
    variants = [Variant(name, nn.Linear(2, 2), is_stock="stock" in name) for name in ("stock", "slow stock", "other")]
    all_times = ([4.0] * 3, [8.0] * 3, [1.0, 2.0, 6.0])
    for each, times, embeddings in zip(variants, all_times, (reference, reference, swapped), strict=True):
        each.milliseconds, each.embeddings = times, [embeddings[:2], embeddings[2:]]
    stock, slow, other = make_rows(variants, reference)
    assert [each.speedup for each in (stock, slow, other)] == [1.0, 0.5, 2.0]
    assert (other.p10_ms, other.median_ms, other.p90_ms) == pytest.approx((1.2, 2.0, 5.2))
    assert (stock.mean_cosine, stock.worst_cosine, stock.neighbour_agreement) == pytest.approx((1, 1, 1))
    expected = nn.functional.cosine_similarity(swapped, reference)
    assert (other.mean_cosine, other.worst_cosine) == pytest.approx((expected.mean().item(), expected.min().item()))
    assert other.neighbour_agreement == 0.0
    assert stock.megabytes == 6 * 4 / 1e6
    lines = table([stock, slow, other]).splitlines()
    assert lines[6].split()[:5] == ["other", "2.00", "(1.20", "-", "5.20)"]


@pytest.mark.parametrize(("change", "failing"), [
    ({}, []),
    ({"rewritten": 35}, ["35 of 36 linears rewritten"]),
    ({"mean_cosine": 0.9969}, ["mean cosine 0.99690, at least 0.997 wanted"]),
    ({"worst_cosine": 0.98}, ["worst cosine 0.98000, at least 0.99 wanted"]),
    ({"mean_cosine": float("nan")}, ["mean cosine nan, at least 0.997 wanted"]),
    ({"speedup": 0.1}, []),
])  # fmt: skip
def test_bars_of_correctness_decide_the_exit_status(change, failing, monkeypatch, tmp_path, capsys):
    rows = [row("eager float32", mean_cosine=0.0), row("int8 dynamic"), row("int8 static", **change)]
    assert [what.partition(": ")[2] for holds, what in correctness(rows) if not holds] == failing
    monkeypatch.setattr(demo, "_measure", lambda settings, device: rows)
    monkeypatch.setattr(sys, "argv", ["minilm", "--output", str(tmp_path / "new")])
    assert demo.main() == bool(failing)
    assert capsys.readouterr().out.count("FAILS") == len(failing)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["minilm.json", "minilm.png"]


def test_no_text_of_the_chart_lies_on_another(monkeypatch):
    monkeypatch.setattr("examples.minilm.chart.device_name", lambda device: f"a {device} with a name of the usual length")
    rows = [row(name, "cpu", p10_ms=40.0 * i, median_ms=50.0 * i + 1, p90_ms=90.0 * i + 2) for i, name in enumerate(NAMES["cpu"])]
    rows += [row(name, "cuda", worst_cosine=0.98 + i / 1000) for i, name in enumerate(NAMES["cuda"])]
    figure = draw(rows, "batch 32 x 128 tokens")
    drawn: dict[int, Text] = {}
    draw_text = Text.draw

    def recorded(text: Text, *args: object, **kwargs: object) -> None:
        drawn[id(text)] = text
        draw_text(text, *args, **kwargs)

    monkeypatch.setattr(Text, "draw", recorded)
    figure.draw_without_rendering()
    boxes = {f"{text.get_text()} {i}": text.get_window_extent() for i, text in enumerate(drawn.values()) if text.get_text() and text.get_visible()}
    assert len(boxes) > 6 * len(rows)
    overlapping = [(a, b) for (a, one), (b, other) in itertools.combinations(boxes.items(), 2) if one.overlaps(other)]
    assert overlapping == []
    page = figure.bbox
    outside = [name for name, box in boxes.items() if box.x0 < page.x0 or box.x1 > page.x1 or box.y0 < page.y0 or box.y1 > page.y1]
    assert outside == []


@pytest.mark.long
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_quick_run_writes_table_json_and_chart(device, tmp_path):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "examples.minilm", "--quick", "--device", device, "--output", str(tmp_path)],
        cwd=ROOT, env=kept, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    result = json.loads((tmp_path / "minilm.json").read_text())
    rows = {each["name"]: each for each in result["rows"]}
    assert list(rows) == NAMES[device]
    for name, each in rows.items():
        assert each["device"] == device
        assert 0 < each["p10_ms"] <= each["median_ms"] <= each["p90_ms"]
        assert len(each["all_ms"]) == result["settings"][f"{'gpu' if device == 'cuda' else 'cpu'}_rounds"]
        assert (each["linears"], each["rewritten"]) == (6, 6 if name.startswith("int8") else None)
        assert each["kernels"] >= 6
        assert name in done.stdout
    eager, *compiled = rows.values()
    assert all(each["kernels"] < eager["kernels"] for each in compiled)
    assert all(rows[name]["megabytes"] < 0.95 * eager["megabytes"] for name in rows if name.startswith("int8"))
    assert len(result["correctness"]) == 3 * sum(name.startswith("int8") for name in rows)
    assert all(each["holds"] for each in result["correctness"])
    assert "FAILS" not in done.stdout
    assert f"measure on {device}: 100%" in done.stderr
    signature, width, height = struct.unpack(">8s8xII", (tmp_path / "minilm.png").read_bytes()[:24])
    assert signature == b"\x89PNG\r\n\x1a\n"
    assert (width, height) > (1000, 300)
