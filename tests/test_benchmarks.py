"""The benchmark of products itself: tiny CPU runs end to end, and what it calls wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_support import CPU, ENVIRONMENT_FIELDS, is_png, one_thread, only_result  # noqa: F401 - a fixture that is used by itself

from benchmarks import common, gemm
from benchmarks.cases import TAILS, Case
from benchmarks.operands import FLOAT, INT8, INT8_BF16_SCALES, OUT_SCALE, check, float64_truth
from benchmarks.peers import PEERS, Peer
from benchmarks.variants import VARIANTS

GELU = "gelu-int8"


# The GEMM benchmark, end to end.


def test_a_command_says_which_instructions_it_was_held_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    record = common.environment(torch.device("cpu"), "benchmarks.turns", ["--rounds", "2", "--out", "there"])
    assert record["command"] == "ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python -m benchmarks.turns --rounds 2"


def test_gemm_runs_end_to_end_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["ours", "stock-eager", "stock-int-mm", "fp8-rowwise"]
    argv = ["--device", "cpu", "--shape", "33,48,64", "--shape", f"17,40,32,{GELU}", "--peers", ",".join(chosen), "--out", str(tmp_path)]
    assert gemm.main(argv) == 0
    result, path = only_result(tmp_path)
    assert result["kind"] == "gemm"
    assert result["float"] == "fp32"
    assert result["left_out"] == []
    assert result["environment"].keys() == ENVIRONMENT_FIELDS
    assert result["environment"]["torch"] == torch.__version__
    assert result["environment"]["device"]["type"] == "cpu"
    assert result["environment"]["command"] == f"python -m benchmarks.gemm {' '.join(argv[:-2])}"
    assert len(result["environment"]["source_sha256"]) == 64
    rows = {(row["m"], row["peer"]): row for row in result["rows"]}
    assert list(rows) == [(m, name) for m in (33, 17) for name in ("ours", "stock-eager", "fp8-rowwise", "stock-int-mm")]
    for (m, name), row in rows.items():
        if name == "fp8-rowwise":
            assert (row["status"], row["reason"], row["ms"]) == ("unavailable", "needs a CUDA GPU", None)
            continue
        assert (row["status"], row["reason"]) == ("ok", None)
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["tops"] == pytest.approx(2 * m * row["n"] * row["k"] / (row["ms"] * 1e-3) / 1e12)
        assert row["first_call_s"] > 0
        assert row["single_call"]["ms"] == row["ms"]
        int8_out = m == 17 and name != "stock-eager"
        assert row["check"]["off_by"] in ((0, 1) if int8_out else (None,))
        if not int8_out:
            assert 0 < row["check"]["error"] < 1e-6
    printed = capsys.readouterr().out
    assert "33 x 48 x 64" in printed
    assert "vs best fp32" in printed
    assert "left out: fp8-rowwise: needs a CUDA GPU" in printed
    assert is_png(path.with_suffix(".png"))


def test_a_spent_budget_starts_nothing_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--device", "cpu", "--shape", "8,8,8", "--shape", "9,8,8", "--peers", "stock-eager", "--seconds", "0", "--out", str(tmp_path)]
    assert gemm.main(argv) == 0
    result, path = only_result(tmp_path)
    assert result["rows"] == []
    assert result["left_out"] == ["8 x 8 x 8", "9 x 8 x 8"]
    assert "not reached: 8 x 8 x 8, 9 x 8 x 8" in capsys.readouterr().out
    assert not path.with_suffix(".png").exists()


@pytest.mark.parametrize("argv", [["--peers", "ours,nobody"], ["--peers", ""], ["--shapes", "none"]])
def test_unknown_names_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        gemm.main(["--device", "cpu", *argv])
    assert raised.value.code not in (0, None)


# What is called wrong.

STOCK = next(peer for peer in PEERS if peer.name == "stock-eager")


def eager_peer(name: str, form: Any, call: Any) -> Peer:
    return Peer(name, name, form, lambda case, device: call)


def noisy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b.t()) * 1.001


REUSED = torch.empty(64, 64)
"""An output buffer that outlives a call: what lay in it before is certain, as it is not in memory from the CPU's allocator."""


def unwritten(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    torch.mm(a[:-1], b.t(), out=REUSED[:-1])
    return REUSED


def broken(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel at /some/where/kernel.py today\nand more")


def test_wrong_and_failing_peers_are_reported_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [eager_peer("noisy", FLOAT, noisy), eager_peer("broken", FLOAT, broken)]
    peers = (*bad, STOCK, dataclasses.replace(STOCK, name="picky", refuses=lambda case, device: f"M is {case.m}"))
    assert gemm.main(["--device", "cpu", "--shape", "64,64,64", "--out", str(tmp_path)], peers) == 1
    result, _ = only_result(tmp_path)
    rows = {row["peer"]: row for row in result["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {"noisy": "wrong", "broken": "error", "stock-eager": "ok", "picky": "refused"}
    assert rows["noisy"]["reason"].startswith("relative error 1.00e-03 is above")
    assert rows["broken"]["reason"] == "RuntimeError: no kernel at kernel.py today"
    assert rows["picky"]["reason"] == "M is 64"
    assert rows["noisy"]["ms"] is None
    assert rows["broken"]["ms"] is None
    printed = capsys.readouterr().out
    assert "FAILED 64 x 64 x 64 noisy: wrong" in printed
    assert "FAILED 64 x 64 x 64 broken: error" in printed
    assert "FAILED 64 x 64 x 64 picky" not in printed


def test_an_output_that_is_not_written_is_wrong() -> None:
    case = Case(64, 64, 64)
    REUSED.zero_()
    checked = check(case, FLOAT, unwritten, FLOAT.draw(case, CPU), CPU)
    assert checked.poisoned
    assert checked.wrong == "relative error nan is above 1.00e-05"
    assert checked.record()["error"] is None


def int8_peer_off_by(steps: int, where: Any) -> Any:
    """An exact int8 result, but for `steps` added where `where(exact)`."""

    def call(*operands: torch.Tensor) -> torch.Tensor:
        exact = float64_truth(Case(64, 64, 64, TAILS[GELU]), operands)
        return (exact.round() + steps * where(exact)).clamp(-128, 127).to(torch.int8)

    return call


def at(exact: torch.Tensor) -> torch.Tensor:
    """One place, well inside the range and far from a tie."""
    place = torch.zeros_like(exact)
    middle = ((exact - exact.round()).abs() < 0.2) & (exact > 0) & (exact < 100)
    place.view(-1)[int(middle.view(-1).nonzero()[0])] = 1
    return place


@pytest.mark.parametrize(
    ("steps", "where", "wrong"),
    [
        (0, torch.zeros_like, None),
        (2, at, "int8 output is off by 2"),
        (1, at, "int8 output is off by one 0."),
        (-1, lambda exact: ((exact - exact.floor()) - 0.5).abs().lt(1e-2) & exact.round().gt(exact), None),
    ],
)
def test_int8_output_may_be_off_by_one_only_at_a_tie(steps: int, where: Any, wrong: str | None) -> None:
    case = Case(64, 64, 64, TAILS[GELU])
    checked = check(case, INT8, int8_peer_off_by(steps, where), INT8.draw(case, CPU), CPU)
    if wrong is None:
        assert checked.wrong is None
    else:
        assert checked.wrong is not None
        assert checked.wrong.startswith(wrong)
    assert checked.off_by == abs(steps)


def test_scales_rounded_to_bfloat16_are_wrong_in_float32_and_bfloat16_output() -> None:
    case = Case(256, 256, 256)
    operands = INT8.draw(case, CPU)
    truth = float64_truth(case, operands)
    assert 0.5 < truth.std().item() < 2
    a, b, a_scale, b_scale = operands
    rounded = float64_truth(case, (a, b, a_scale.bfloat16(), b_scale.bfloat16()))
    assert ((rounded - truth).norm() / truth.norm()).item() > 1e-3
    assert ((rounded.bfloat16().double() - truth).norm() / truth.norm()).item() > 2e-3
    assert 1.2e-3 < ((truth.bfloat16().double() - truth).norm() / truth.norm()).item() < 2e-3


def test_wrong_dtype_or_shape_is_wrong() -> None:
    case = Case(8, 8, 8)
    checked = check(case, FLOAT, lambda a, b: (a @ b.t())[:4], FLOAT.draw(case, CPU), CPU)
    assert checked.wrong == "output is torch.float32 [4, 8], wanted torch.float32 [8, 8]"


def test_float64_truth_is_the_definition() -> None:
    case = Case(5, 6, 7, TAILS[GELU])
    a, b, a_scale, b_scale, bias, out_scale = INT8.draw(case, CPU)
    y = (a.double() @ b.double().t()) * a_scale.double() * b_scale.double() + bias.double()
    torch.testing.assert_close(float64_truth(case, (a, b, a_scale, b_scale, bias, out_scale)), torch.nn.functional.gelu(y) / out_scale.double())
    assert out_scale.item() == pytest.approx(OUT_SCALE)
    assert {t.dtype for t in INT8_BF16_SCALES.draw(Case(5, 6, 7), CPU)} == {torch.int8, torch.bfloat16}


def test_every_model_variant_and_peer_has_a_name_of_its_own() -> None:
    assert len({each.name for each in VARIANTS}) == len(VARIANTS)
    assert len({each.name for each in PEERS}) == len(PEERS)


# On a GPU.


@pytest.mark.gpu
def test_gemm_on_a_gpu(tmp_path: Path) -> None:
    argv = ["--shape", "64,512,256", "--shape", f"64,512,256,{GELU}", "--shape", "1,512,256", "--peers", "ours,stock-eager,fp8-rowwise,stock-int-mm"]
    assert gemm.main([*argv, "--out", str(tmp_path)]) == 0
    result, path = only_result(tmp_path)
    statuses = {(row["m"], row["tail"], row["peer"]): row["status"] for row in result["rows"]}
    assert statuses[(64, "plain", "ours")] == statuses[(64, GELU, "ours")] == statuses[(1, "plain", "ours")] == "ok"
    assert statuses[(1, "plain", "stock-int-mm")] == "refused"
    measured = [row for row in result["rows"] if row["status"] == "ok"]
    assert all("CUDA-graph replay" in row["method"] for row in measured)
    assert any(row["check"]["poisoned"] for row in measured)
    assert is_png(path.with_suffix(".png"))
