"""The benchmark of layers of experts: its tiny CPU run end to end, and what it calls wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import common, experts, tables
from benchmarks.experts import CASE_SETS, PEERS, Case, Peer

CPU = torch.device("cpu")


def test_it_runs_end_to_end_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert experts.main(["--device", "cpu", "--cases", "small", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    result = common.read_json(path)
    assert (result["kind"], result["left_out"]) == ("experts", [])
    assert [(row["tokens"], row["variant"]) for row in result["rows"]] == [(tokens, peer.name) for tokens in (1, 7) for peer in PEERS]
    for row in result["rows"]:
        if row["variant"] == "grouped-mm-compiled":
            assert (row["status"], row["ms"]) == ("refused", None)
            continue
        assert (row["status"], row["reason"]) == ("ok", None)
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert 0.9998 <= row["cosine"] <= 1.000001
    printed = capsys.readouterr().out
    assert "4 experts, top 2, 64 x 64, 7 tokens, ours-w4a8" in printed
    assert "vs best fp32" in printed
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_a_wrong_result_fails_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every other column is missing."""

    def build(weights: tuple[torch.Tensor, ...]) -> experts.Layer:
        right = PEERS[0].build(weights)

        def layer(x: torch.Tensor, index: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
            y = right(x, index, routing)
            y[:, ::2] = 0
            return y

        return layer

    assert experts.main(["--device", "cpu", "--out", str(tmp_path)], (Peer("half", "ours", "w4a8", build),)) == 1
    assert "is below 0.9998" in capsys.readouterr().out


def test_a_spent_budget_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert experts.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    assert common.read_json(path)["left_out"] == [case.label for case in CASE_SETS["small"]]
    assert "2 cases left out" in capsys.readouterr().out


def test_floors_count_the_weights_of_active_experts() -> None:
    case = Case(64, 256, 8, 2048, 512)
    assert case.operations == 2 * 3 * 64 * 8 * 2048 * 512
    weights, tokens = 3 * 2048 * 512, 2 * 64 * 2048 * 2
    assert case.bytes_moved("float", 2, 200) == 200 * 2 * weights + tokens
    assert case.bytes_moved("w8a8", 2, 200) == 200 * (weights + 4 * 3072) + tokens
    assert case.bytes_moved("w4a8", 2, 200) == case.bytes_moved("w4a16", 2, 200) == 200 * (weights // 2 + weights // 32) + tokens


def test_tables_take_the_fastest_float_as_one() -> None:
    def row(variant: str, group: str, ms: float | None, index: int) -> dict[str, object]:
        return {
            "workload": "layer", "workload_index": 0, "variant": variant, "variant_index": index, "group": group, "label": variant,
            "status": "ok" if ms else "error", "ms": ms, "ms_p20": ms, "ms_p80": ms, "roofline_share": 0.5, "cosine": 0.99991,
        }  # fmt: skip

    rows = [row("a", "ours", 0.1, 0), row("b", "stock", 0.4, 1), row("c", "stock", 0.3, 2), row("d", "stock", None, 3)]
    _, lines = tables.experts({"float": "bf16", "rows": rows})
    assert [line[1] for line in lines] == ["100.0", "400.0", "300.0", "FAILED"]
    assert [line[3] for line in lines] == ["3.00x", "0.75x", "1.00x", "-"]
