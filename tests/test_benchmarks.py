"""The benchmarks themselves: their tiny CPU runs end to end, and what they call wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from benchmarks import common, gemm, minilm, models, second_process, turns
from benchmarks.cases import TAILS, Case
from benchmarks.model_rows import compile_cache, counting_tunings
from benchmarks.operands import FLOAT, INT8, INT8_BF16_SCALES, OUT_SCALE, check, float64_truth
from benchmarks.peers import PEERS, Peer
from benchmarks.variants import VARIANTS, Variant
from benchmarks.workloads import TINY, WORKLOADS
from int8_inductor import autotune

CPU = torch.device("cpu")
GELU = "gelu-int8"
ENVIRONMENT_FIELDS = {
    "date", "command", "python", "torch", "triton", "torchao", "timm", "transformers", "device", "threads", "commit", "dirty", "source_sha256",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tiny sizes need one thread, and more of them wait for each other on a busy machine, in every timed call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def only_result(out: Path) -> tuple[dict[str, Any], Path]:
    (path,) = out.glob("*.json")
    return common.read_json(path), path


def is_png(path: Path) -> bool:
    height, width = matplotlib.image.imread(path).shape[:2]
    return width > 600 and height > 200


# The GEMM benchmark, end to end.


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


# The model benchmark, end to end.


def twice(model: torch.nn.Module, batches: Any) -> torch.nn.Module:
    for parameter in model.parameters():
        parameter.mul_(2)
    return model


def test_models_run_end_to_end_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tuple(each for each in VARIANTS if each.name in ("stock-eager", "ours-dynamic-default"))
    variants = (*kept, Variant("wrong", "wrong", 0, twice, None), Variant("gone", "gone", 0, twice, None, lacks=lambda: "not here"))
    assert models.main(["--device", "cpu", "--tiny", "--models", "llama", "--out", str(tmp_path)], variants) == 1
    result, path = only_result(tmp_path)
    assert result["kind"] == "models"
    assert result["environment"].keys() == ENVIRONMENT_FIELDS
    rows = {row["variant"]: row for row in result["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "stock-eager": "ok", "ours-dynamic-default": "ok", "wrong": "wrong", "gone": "unavailable",
    }  # fmt: skip
    eager, ours, wrong = rows["stock-eager"], rows["ours-dynamic-default"], rows["wrong"]
    assert (eager["compile_s"], eager["sqnr_db"], eager["linears"]) == (None, None, None)
    assert ours["cold"]
    assert ours["compile_s"] > 0
    assert ours["linears"] == {"rewritten": 7, "present": 7}
    assert 20 < ours["sqnr_db"] < 80
    assert 20 < ours["sqnr_float32_db"] < 80
    assert ours["weights_mb"] < 0.75 * eager["weights_mb"]
    assert 0 < ours["ms_p20"] <= ours["ms"] <= ours["ms_p80"]
    assert ours["ms_again"] > 0
    assert (ours["kernels"], ours["peak_mb"]) == (None, None)
    assert wrong["reason"].startswith("SQNR to float32 is ")
    assert "FAILED tiny Llama, 1 x 8, wrong: wrong" in capsys.readouterr().out
    assert is_png(path.with_suffix(".png"))


def test_caches_are_fresh_for_each_variant_unless_modes_share_them(tmp_path: Path) -> None:
    by_name = {each.name: each for each in VARIANTS}
    first, second, other = (by_name[name] for name in ("ours-dynamic-default", "ours-dynamic-max-autotune", "ours-static-default"))
    for warm, expected in ((False, 3), (True, 2)):
        run = models.Run(CPU, warm)
        root = tmp_path / str(warm)
        directories = {run.cache_directory(str(root), (0, place), variant) for place, variant in enumerate((first, second, other))}
        assert len(directories) == expected
        assert run.cache_directory(str(root), (1, 0), first) not in directories


@pytest.mark.long
def test_a_second_process_compiles_nothing_and_tunes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    workload = next(each for each in TINY if each.model == "llama")
    with compile_cache(str(tmp_path)):
        second = second_process.run_again(workload.name, "ours-dynamic-default", CPU)
        assert (second["before"]["graphs_compiled"], second["before"]["hits"]) == (1, {"graphs": 0, "autograd": 0})
        assert (second["graphs_compiled"], second["hits"]) == (0, {"graphs": 1, "autograd": 1})
        assert second["tuned"] == {"products": 0, "candidates": 0, "others": 0}
        assert 0 < second["compile_s"] < second["before"]["compile_s"]
        assert second["start_s"] > 0


def test_a_second_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 2, "", "usage: ...\nerror: argument --variant: invalid choice: 'nobody'\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(second_process.SecondProcessError, match=r"second process: .*invalid choice: 'nobody'"):
        second_process.run_again(TINY[0].name, "nobody", CPU)


def test_what_a_second_process_did_is_part_of_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"compile_s": 1.5, "graphs_compiled": 0, "tuned": {"products": 4, "candidates": 0, "others": 0}}

    def run_again(workload: str, variant: str, device: torch.device) -> dict[str, Any]:
        if "max" in variant:
            raise second_process.SecondProcessError("second process: out of memory")
        return record

    monkeypatch.setattr(models, "run_again", run_again)
    monkeypatch.setattr(models, "measure", lambda setting, variant: {
        "status": "ok", "reason": None, "ms": 1.0, "ms_p20": 1.0, "ms_p80": 1.0, "ms_again": 1.0, "compile_s": 2.0, "linears": None, "peak_mb": None,
        "weights_mb": 1.0, "sqnr_db": None, "kernels": None, "method": "by hand", "tuned": {"products": 5, "candidates": 40, "others": 3},
    })  # fmt: skip
    names = ("stock-default", "ours-dynamic-default", "ours-dynamic-max-autotune")
    argv = ["--device", "cpu", "--tiny", "--models", "llama", "--variants", ",".join(names), "--second-process", ",".join(names[1:])]
    assert models.main([*argv, "--out", str(tmp_path)]) == 1
    result, _ = only_result(tmp_path)
    rows = {row["variant"]: row for row in result["rows"]}
    assert [rows[name].get("second") for name in names] == [None, record, None]
    assert (rows[names[2]]["status"], rows[names[2]]["reason"]) == ("error", "SecondProcessError: second process: out of memory")
    with pytest.raises(SystemExit):
        models.main([*argv[:-1], "stock-eager", "--out", str(tmp_path)])


def test_tunings_are_counted() -> None:
    with counting_tunings() as counts:
        assert counts == {"products": 0, "candidates": 0, "others": 0}
        with pytest.raises(AttributeError):
            autotune._median_ms(None, out=None)
        torch._dynamo.utils.counters["inductor"]["select_algorithm_autotune"] += 2
    assert counts == {"products": 2, "candidates": 1, "others": 0}


def test_stock_inductors_int8_path_is_a_peer() -> None:
    """The quantizer for x86 and freezing end in oneDNN's fused linear on u8, two for two layers."""
    pytest.importorskip("torchao")
    variant = next(each for each in VARIANTS if each.name == "pt2e-static")
    assert variant.lacks() is None
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)).eval(), torch.randn(16, 32)
    with torch.no_grad(), inductor_config.patch(freezing=variant.freezing, cpu_backend="cpp"):
        converted = variant.prepare(copy.deepcopy(model), lambda: [(x,), (torch.randn(16, 32),)])
        output, (code,) = run_and_get_code(variant.compiled(converted), x)
        noise = (output - model(x)).square().sum() / model(x).square().sum()
    assert code.count("torch.ops.onednn.qlinear_pointwise.") == 2
    # Without VNNI oneDNN adds pairs of products in int16, which saturates.
    assert 1e-7 < noise < (1e-3 if torch.cpu._is_vnni_supported() else 0.05)


def test_models_that_run_without_being_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {each.model for each in WORKLOADS if each.default_on == "cuda"} == {"vit", "llama"}
    chosen: list[str] = []
    monkeypatch.setattr(models, "plan_of", lambda workloads, variants: chosen.extend(each.name for each in workloads) or [])
    assert models.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    assert chosen == ["MiniLM, 1 x 128", "MiniLM, 32 x 128"]


def test_workloads_by_the_end_of_their_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(models, "plan_of", lambda workloads, variants: chosen.extend(each.name for each in workloads) or [])
    argv = ["--device", "cpu", "--models", "llama,vit", "--out", str(tmp_path), "--workloads"]
    assert models.main([*argv, "1 x 128,32 x 1"]) == 0
    assert chosen == ["Llama x4 layers, 1 x 128", "Llama x4 layers, 32 x 1"]
    with pytest.raises(SystemExit, match="no name ends in '32 x 2'; the names are 'ViT-B/16, batch 32', 'Llama x4 layers, 1 x 2048'"):
        models.main([*argv, "1 x 128,32 x 2"])


def test_minilm_embeds_texts_of_any_length_alike() -> None:
    if (reason := minilm.lacks()) is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    ids = minilm.text_tokens(3, 32)(CPU, torch.float32)
    assert (ids.shape, ids.dtype, int(ids[0, 0])) == ((3, 32), torch.int64, 101)
    model = minilm.OfTokens(1).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.nn.functional.pad(ids, (0, 16))), model(ids), rtol=0, atol=1e-5)


def test_ranks_run_on_every_workload_before_the_next_rank() -> None:
    late, early = Variant("late", "x", 1, twice, None), Variant("early", "x", 0, twice, None)
    plan = models.plan_of(list(TINY), [late, early])
    assert [(place, variant.name) for place, _, variant in plan] == [((0, 1), "early"), ((1, 1), "early"), ((0, 0), "late"), ((1, 0), "late")]


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


def test_variants_by_turns(tmp_path: Path) -> None:
    arguments = ["--tiny", "--variants", "stock-eager,ours-dynamic-frozen", "--rounds", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert turns.main(arguments) == 0
    (path,) = tmp_path.glob("turns-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["variant"], row["calls"], row["status"]) for row in rows] == [("stock-eager", 6, "ok"), ("ours-dynamic-frozen", 6, "ok")]
    for row in rows:
        assert 0 < row["ms_least"] <= row["ms_p20"] <= row["ms"] <= row["ms_p80"]
