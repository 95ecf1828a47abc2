"""The benchmarks of models themselves: tiny CPU runs end to end, what runs and in which order, and variants by turns."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_support import CPU, ENVIRONMENT_FIELDS, is_png, one_thread, only_result  # noqa: F401 - a fixture that is used by itself
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from benchmarks import minilm, models, second_process, tables, turns
from benchmarks.model_rows import compile_cache, counting_tunings, setting_of, verdict
from benchmarks.variants import VARIANTS, Variant
from benchmarks.workloads import TINY, WORKLOADS
from int8_inductor import autotune

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
    assert chosen == [f"MiniLM, {size}" for size in ("1 x 1", "1 x 16", "1 x 128", "4 x 128", "32 x 128")]


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


# Variants by turns.

TURNS = ["--tiny", "--device", "cpu"]


def test_variants_by_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every variant gets as many turns as another, also where the budget ends them: with none left, one."""
    names = ["stock-eager", "ours-dynamic-frozen"]
    assert turns.main([*TURNS, "--variants", ",".join(names), "--rounds", "2", "--out", str(tmp_path)]) == 0
    result, path = only_result(tmp_path)
    assert result["kind"] == "turns"
    assert [(row["variant"], row["calls"], row["status"]) for row in result["rows"]] == [(name, 2 * turns.CALLS, "ok") for name in names]
    for row in result["rows"]:
        assert 0 < row["ms_least"] <= row["ms_p20"] <= row["ms"] <= row["ms_p80"]
    assert is_png(path.with_suffix(".png"))
    header, lines = tables.turns(result)
    assert [(line[0], line[header.index("vs best fp32")]) for line in lines] == [
        ("tiny Llama, 1 x 8, stock-eager", "1.00x"),
        ("tiny Llama, 1 x 8, ours-dynamic-frozen", f"{result['rows'][0]['ms'] / result['rows'][1]['ms']:.2f}x"),
    ]
    times = iter([0.0] * 3 + [1.0] * 9)
    budget = SimpleNamespace(seconds=1.0, elapsed=1.0, spent=lambda: next(times) > 0)
    setting = setting_of(TINY[1], TINY[1].make(CPU, torch.float32), CPU)
    eager = [each for each in VARIANTS if each.name == "stock-eager"]
    (row,) = turns.rows_of(setting, eager, 10, budget)
    assert row["calls"] == 4 * turns.CALLS
    assert "1 s are spent: 4 of 10 turns" in capsys.readouterr().out


def test_a_turn_is_of_what_was_compiled() -> None:
    """Dynamo gives one variant what it has compiled for another with the same guards, and compiles again what it was made to forget."""
    stock = next(each for each in VARIANTS if each.name == "stock-default")
    setting = setting_of(TINY[1], TINY[1].make(CPU, torch.float32), CPU)
    with inductor_config.patch(compile_threads=1):
        firsts = turns.compiled(setting, [stock])
        with pytest.raises(RuntimeError, match=r"^frozen: must compile a graph of its own, got 0 graphs$"):
            turns.compiled(setting, [dataclasses.replace(stock, name="frozen", freezing=True)])
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=r"^a turn of stock-default: must compile nothing, got 1 graphs$"):
            turns.times_of(firsts[stock], stock)


def test_a_spent_budget_leaves_workloads_out(tmp_path: Path) -> None:
    assert turns.main([*TURNS, "--variants", "stock-eager", "--seconds", "0", "--out", str(tmp_path)]) == 0
    result, _ = only_result(tmp_path)
    assert (result["rows"], result["left_out"]) == ([], [TINY[1].name])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--device", "cuda"], "--device must be cpu, got cuda"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        ([], "stock-eager: it is not there"),
    ],
)
def test_turns_that_cannot_be_taken_are_refused(argv: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dataclasses.replace(next(each for each in VARIANTS if each.name == "stock-eager"), lacks=lambda: "it is not there")
    monkeypatch.setattr(turns, "VARIANTS", (missing,))
    with pytest.raises(SystemExit, match=words):
        turns.main([*TURNS, "--variants", "stock-eager", *argv])


def test_a_wrong_result_has_a_verdict() -> None:
    assert verdict(9.9) == {"status": "wrong", "reason": "SQNR to float32 is 9.9 dB, under 10.0"}
    assert verdict(None) == verdict(10.0) == {"status": "ok", "reason": None}
