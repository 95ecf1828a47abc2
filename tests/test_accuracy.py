"""`python -m benchmarks.accuracy`: a tiny run of the whole, what its perplexities are, and its place in the README."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from benchmarks import accuracy, common, report, subjects, tables
from benchmarks.subjects import GAIN, OUTLIERS, PAIRS, SCHEMES, SUBJECTS, TINY

CPU = torch.device("cpu")
LLAMA = next(subject for subject in TINY if subject.key == "llama1")
MINILM = next(subject for subject in TINY if subject.key == "minilm")


def only_result(out: Path) -> tuple[dict[str, Any], Path]:
    (path,) = out.glob("*.json")
    return common.read_json(path), path


def test_accuracy_runs_end_to_end_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["float32", "dynamic-per-row", "smooth-dynamic-per-row", "static"]
    assert accuracy.main(["--device", "cpu", "--tiny", "--schemes", ",".join(chosen), "--out", str(tmp_path)]) == 0
    result, path = only_result(tmp_path)
    assert (result["kind"], result["compiled"], result["left_out"]) == ("accuracy", False, [])
    rows = {(row["subject"], row["scheme"]): row for row in result["rows"]}
    assert list(rows) == [(subject.name, name) for subject in TINY for name in chosen]
    for (subject, scheme), row in rows.items():
        linears = 0 if scheme in ("float32", "bfloat16") else 6 if subject == MINILM.name else 14
        assert (row["status"], len(row["layers"])) == ("ok", linears)
        assert all(5 < value < 60 for value in row["layers"].values())
        assert not any("lm_head" in name for name in row["layers"])
        assert row["perplexity"] > 1
        assert row["perplexity_float32"] == rows[subject, "float32"]["perplexity"]
    assert rows[LLAMA.name, "float32"]["sqnr_db"] is None
    assert rows[LLAMA.name, "static"]["weights_mb"] < 0.8 * rows[LLAMA.name, "float32"]["weights_mb"]
    plain, smooth = (rows[LLAMA.name, name] for name in ("dynamic-per-row", "smooth-dynamic-per-row"))
    assert plain["sqnr_db"] + 10 < smooth["sqnr_db"] < 60
    assert min(plain["layers"].values()) + 10 < min(smooth["layers"].values())
    printed = capsys.readouterr().out
    assert "worst layer dB" in printed
    height, width = matplotlib.image.imread(path.with_suffix(".png")).shape[:2]
    assert width > 1000
    assert height > 600


def test_compiled_models_are_judged_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(LLAMA, build=lambda: nn.Sequential(nn.Embedding(1024, 32), nn.Linear(32, 64)))
    monkeypatch.setattr(accuracy, "TINY", (small,))
    argv = ["--device", "cpu", "--tiny", "--compile", "--subjects", "llama1", "--schemes", "dynamic-per-row", "--out", str(tmp_path)]
    with inductor_config.patch(cpu_backend="cpp"):
        assert accuracy.main(argv) == 0
    result, _ = only_result(tmp_path)
    assert result["compiled"]
    assert 30 < result["rows"][0]["sqnr_db"] < 50
    assert list(result["rows"][0]["layers"]) == ["1"]


def test_what_cannot_run_and_what_the_budget_leaves_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(accuracy, "TINY", (replace(MINILM, lacks=lambda: "no weights"), LLAMA))
    assert accuracy.main(["--device", "cpu", "--tiny", "--schemes", "float32", "--seconds", "0", "--out", str(tmp_path)]) == 0
    result, path = only_result(tmp_path)
    assert [(row["status"], row["reason"]) for row in result["rows"]] == [("unavailable", "no weights")]
    assert result["left_out"] == [f"{LLAMA.name}, float32"]
    assert f"left out: {MINILM.name}: no weights" in capsys.readouterr().out
    assert not path.with_suffix(".png").exists()


def test_an_output_that_is_not_finite_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "TINY", (replace(LLAMA, perplexity=lambda outputs, exact: 2.0 if outputs is exact else math.nan),))
    assert accuracy.main(["--device", "cpu", "--tiny", "--schemes", "bfloat16", "--out", str(tmp_path)]) == 1
    result, _ = only_result(tmp_path)
    assert (result["rows"][0]["status"], result["rows"][0]["reason"]) == ("wrong", "the output is not finite")


@torch.no_grad()
def test_planted_outliers_change_the_activations_and_not_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    planted, (ids,) = LLAMA.make(CPU), LLAMA.batches(1, 0)[0]
    monkeypatch.setattr(subjects, "_plant_outliers", lambda model: None)
    plain = LLAMA.make(CPU)
    torch.testing.assert_close(planted(ids), plain(ids), rtol=1e-4, atol=1e-5)
    for layer in planted.model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            assert sorted(norm.weight.tolist()) == [1.0] * (64 - OUTLIERS) + [GAIN] * OUTLIERS


def test_batches_of_other_seeds_are_others() -> None:
    for subject in TINY:
        first, again, other = (subject.batches(2, seed) for seed in (0, 0, 1))
        assert len(first) == 2
        assert all(torch.equal(t, u) for one, two in zip(first, again, strict=True) for t, u in zip(one, two, strict=True))
        rows = [{tuple(row) for batch in batches for row in batch[0].tolist()} for batches in (first, other)]
        assert not rows[0] & rows[1]


def test_perplexity_of_pairs() -> None:
    """1 where every second half is found for sure, and their number where all look alike."""
    apart = torch.eye(PAIRS).repeat(2, 1)
    assert subjects._pair_perplexity([apart], []) == pytest.approx(1.0, abs=1e-6)
    assert subjects._pair_perplexity([torch.ones(2 * PAIRS, 4)] * 3, []) == pytest.approx(3 * PAIRS)


def test_perplexity_of_a_model_on_its_own_text() -> None:
    """exp of the entropy for the model itself, and exp of the divergence times more for another one."""
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]).log().reshape(1, 2, 3)
    other = torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]).log().reshape(1, 2, 3)
    assert subjects._self_perplexity([probabilities + 3.0], [probabilities]) == pytest.approx(2**1.5)
    divergence = 0.5 * (0.5 * math.log(2) + 0.25 * math.log(0.5))
    assert subjects._self_perplexity([other], [probabilities]) == pytest.approx(2**1.5 * math.exp(divergence))


def test_names_are_distinct() -> None:
    assert len({subject.key for subject in SUBJECTS}) == len(SUBJECTS)
    assert len({scheme.name for scheme in SCHEMES}) == len(SCHEMES)


def result_by_hand() -> dict[str, Any]:
    record = {
        "date": "2026-01-02T03:04:05Z", "command": "x", "torch": "2", "triton": None, "torchao": None, "commit": None, "dirty": None,
        "device": {"type": "cpu", "name": "a CPU"},
    }  # fmt: skip
    row = {"subject": "S", "subject_index": 0, "status": "ok", "reason": None, "weights_mb": 5.0, "perplexity_float32": 2.0}
    rows = [
        row | {"scheme": "float32", "scheme_index": 0, "perplexity": 2.0, "sqnr_db": None, "layers": {}},
        row | {"scheme": "static", "scheme_index": 1, "perplexity": 2.1, "sqnr_db": 30.0, "layers": {"a": 40.0, "b": 20.0, "c": None, "d": 30.0}},
        row | {"scheme": "gone", "scheme_index": 2, "status": "error", "reason": "x"},
    ]
    return {"kind": "accuracy", "environment": record, "compiled": False, "rows": rows, "left_out": []}


def test_table_and_section_of_the_readme(tmp_path: Path) -> None:
    header, rows = tables.accuracy(result_by_hand())
    assert rows == [
        ["S, float32", "2.0000", "+0.00%", "-", "-", "-", "-", "5.0"],
        ["S, static", "2.1000", "+5.00%", "30.0", "30.0", "20.0", "b", "5.0"],
        ["S, gone", "FAILED", *["-"] * (len(header) - 2)],
    ]
    path = tmp_path / "accuracy.json"
    common.write_json(path, result_by_hand())
    ((section, paths),) = report.newest([path]).items()
    assert (section.head, paths) == ("Accuracy", [path])
    assert "| S, static | 2.1000 |" in report.one(section, path)
    assert "a CPU, torch 2, 2026-01-02, commit not recorded: `x`" in report.one(section, path)


def test_a_model_that_returns_its_input_is_exact() -> None:
    class Identity(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.one_hot(ids, 1024).float()

    bench = accuracy.Bench(replace(LLAMA, build=Identity), CPU, compiled=False)
    row = bench.measure(SCHEMES[0])
    assert (row["sqnr_db"], row["layers"], row["perplexity"]) == (None, {}, row["perplexity_float32"])
