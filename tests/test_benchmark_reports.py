"""What the benchmarks make of their results: shapes, roofline, tables, figures, and the README block's freshness. No compilation here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from benchmarks import common, plot, report, tables
from benchmarks.cases import GROUPS, HELD_OUT_SEED, SHAPE_SETS, TAILS, Case, held_out, parse_case
from benchmarks.roofline import floor_ms

GELU = "gelu-int8"


def is_png(path: Path) -> bool:
    height, width = matplotlib.image.imread(path).shape[:2]
    return width > 600 and height > 200


# Shapes, roofline, tables, figures.


def test_shapes() -> None:
    assert parse_case("3,5,7") == Case(3, 5, 7)
    assert parse_case(f"3,5,7,{GELU}") == Case(3, 5, 7, TAILS[GELU])
    for text in ("3,5", "3,5,0", "3,5,-7", "a,5,7", "3,5,7,none", "3,5,7,plain,plain"):
        with pytest.raises(ValueError, match="a shape must be M,N,K"):
            parse_case(text)
    everything = set(SHAPE_SETS["all"])
    assert len(everything) == len(SHAPE_SETS["all"]) == 7 * 4 + 4 + 1 + 2
    for name in ("quick", "table", "llama", "vit"):
        assert set(SHAPE_SETS[name]) <= everything | {Case(16, 4096, 4096)}


def test_roofline_is_the_longer_of_arithmetic_and_memory() -> None:
    cube, skinny = Case(8192, 8192, 8192), Case(1, 28672, 4096)
    assert floor_ms("NVIDIA H200", cube.operations, cube.bytes_moved(2)) == pytest.approx(2 * 8192**3 / 1979e12 * 1e3)
    moved = 4096 + 28672 * 4096 + 2 * 28672 + 4 * (1 + 28672)
    assert floor_ms("NVIDIA H200", skinny.operations, skinny.bytes_moved(2)) == pytest.approx(moved / 4.8e12 * 1e3)
    assert floor_ms("a device nobody knows", 1, 1) is None


def gemm_result(speed: float = 2.0, date: str = "2026-01-02T03:04:05Z", device: str = "cuda") -> dict[str, Any]:
    """A result by hand: stock 8, fp8 5, _int_mm refused at M <= 16, torchao wrong, ours `speed` times stock's."""
    rows = []
    for case in SHAPE_SETS["all"]:
        row = {"m": case.m, "n": case.n, "k": case.k, "tail": case.tail.name, "floor_ms": 1.0, "method": "by hand", "reason": None}
        for peer, group, ms in (("stock-default", "stock", 9.0), ("stock-eager", "stock", 8.0), ("fp8", "fp8", 5.0), ("ours", "ours", 8.0 / speed)):
            rows.append(row | {"peer": peer, "group": group, "ms": ms, "status": "ok", "tops": case.operations / ms / 1e9, "roofline_share": 1 / ms})
        int_mm = {"status": "refused", "ms": None} if case.m <= 16 else {"status": "ok", "ms": 10.0, "tops": 1.0, "roofline_share": 0.1}
        rows.append(row | {"peer": "stock-int-mm", "group": "int_mm"} | int_mm)
        rows.append(row | {"peer": "torchao-triton", "group": "torchao", "ms": None, "status": "wrong", "reason": "relative error 1"})
        rows.append(row | {"peer": "absent", "group": "absent", "ms": None, "status": "unavailable", "reason": "not installed"})
    return {"kind": "gemm", "environment": record(date, device), "float": "bf16", "rows": rows, "left_out": []}


def record(date: str, device: str) -> dict[str, Any]:
    return {
        "date": date, "command": "python -m benchmarks.gemm", "torch": "2.11.0", "triton": "3.6.0", "torchao": None, "commit": "f" * 40,
        "dirty": True, "device": {"type": device, "name": "NVIDIA H200", "driver": "580.1"},
    }  # fmt: skip


def models_result(date: str = "2026-01-02T03:04:05Z") -> dict[str, Any]:
    rows = []
    for i, workload in enumerate(("ViT", "Llama")):
        for j, (variant, ms) in enumerate((("stock-eager", 9.0), ("stock-default", 6.0), ("ours-dynamic-default", 4.0))):
            rows.append({
                "workload": workload, "variant": variant, "group": variant.split("-")[0], "workload_index": i, "variant_index": j, "label": variant,
                "mode": "default" if j else None, "cold": j < 2, "ms": ms, "ms_p20": ms - 0.1, "ms_p80": ms + 0.1, "method": "by hand",
                "status": "ok", "reason": None, "compile_s": None if j == 0 else 12.0, "peak_mb": (120.0, 100.0, 90.0)[j],
                "weights_mb": (50.0, 50.0, 25.0)[j], "sqnr_db": None if j == 0 else 30.0, "kernels": 7,
                "linears": {"rewritten": 28, "present": 29} if j == 2 else None,
            })  # fmt: skip
    absent = {"variant": "torchao", "group": "torchao", "variant_index": 3, "status": "unavailable", "reason": "not installed", "ms": None}
    rows.append(rows[0] | absent)
    return {"kind": "models", "environment": record(date, "cuda"), "float": "bf16", "rows": rows, "left_out": []}


def test_gemm_table() -> None:
    header, rows = tables.gemm(gemm_result())
    assert header == [
        "M x N x K, us", "best bf16", "fp8", "ours", "int_mm", "torchao", "vs best bf16", "vs fp8", "vs torchao", "vs int_mm", "of roofline",
    ]  # fmt: skip
    lines = {row[0]: row[1:] for row in rows}
    assert len(lines) == 35
    assert lines["8192 x 8192 x 8192"] == ["8000.0", "5000.0", "4000.0", "10000.0", "FAILED", "2.00x", "1.25x", "-", "2.50x", "25%"]
    assert lines["1 x 4096 x 4096"] == ["8000.0", "5000.0", "4000.0", "refused", "FAILED", "2.00x", "1.25x", "-", "-", "25%"]
    means = {(name, rival): (mean, least, count) for name, rival, mean, least, count in tables.gemm_means(gemm_result())}
    assert means[("Llama, M >= 1024", "stock")] == (pytest.approx(2.0), pytest.approx(2.0), 12)
    assert means[("Llama, M 1 and 16", "fp8")] == (pytest.approx(1.25), pytest.approx(1.25), 8)
    assert ("Llama, M 1 and 16", "int_mm") not in means
    assert "left out: absent: not installed" in tables.notes(gemm_result())


def test_means_by_range_of_m_are_a_table() -> None:
    header, rows = tables.means(gemm_result())
    assert header == ["geometric mean", "vs best bf16", "vs fp8", "vs int_mm"]
    assert rows == [
        ["Llama, M >= 1024", "2.00x, least 2.00x of 12", "1.25x, least 1.25x of 12", "2.50x, least 2.50x of 12"],
        ["Llama, M 64 and 256", "2.00x, least 2.00x of 8", "1.25x, least 1.25x of 8", "2.50x, least 2.50x of 8"],
        ["Llama, M 1 and 16", "2.00x, least 2.00x of 8", "1.25x, least 1.25x of 8", "-"],
        ["ViT-B/16, batch 32", "2.00x, least 2.00x of 4", "1.25x, least 1.25x of 4", "2.50x, least 2.50x of 4"],
    ]
    nothing = gemm_result() | {"rows": []}
    assert tables.means(nothing)[1] == []


def test_held_out_shapes_are_drawn_by_seed_and_stand_in_no_set() -> None:
    cases = held_out()
    assert cases == held_out(HELD_OUT_SEED)
    assert not set(cases) & set(held_out(1))
    known = {(case.n, case.k) for each in SHAPE_SETS.values() for case in each}
    assert len(set(cases)) == len(cases) == 24
    for case in cases:
        assert (case.n, case.k) not in known
        assert 1 <= case.m <= 8192
        assert case.n % 16 == case.k % 16 == 0
        assert min(case.n, case.k) >= 512
        assert next(name for name, belongs in GROUPS.items() if belongs(case)).startswith("other shapes")
    assert {case.tail.name for case in cases} == {"plain", GELU}
    assert any(case.m % 2 for case in cases)


def test_a_geometric_mean_is_one() -> None:
    result = gemm_result()
    large = [row for row in result["rows"] if row["peer"] == "ours" and row["m"] == 16]
    for row, factor in zip(large, (1.0, 2.0, 4.0, 8.0), strict=True):
        row["ms"] = 8.0 / factor
    result["rows"] = [row for row in result["rows"] if row["m"] == 16]
    means = {(name, rival): mean for name, rival, mean, _, _ in tables.gemm_means(result)}
    assert means[("Llama, M 1 and 16", "stock")] == pytest.approx(64**0.25)


def test_models_table() -> None:
    header, rows = tables.models(models_result())
    assert header[3] == "vs best bf16"
    assert rows[0][:5] == ["ViT, stock-eager", "9.000", "8.900..9.100", "0.67x", "-"]
    assert rows[1][3:5] == ["1.00x", "12.0"]
    assert rows[2] == [
        "ViT, ours-dynamic-default", "4.000", "3.900..4.100", "1.50x", "12.0 warm", "90.0 (0.90x)", "25.0 (0.50x)", "30.0", "7", "28/29",
    ]  # fmt: skip
    assert rows[3] == ["ViT, torchao", "unavailable", *["-"] * 8]
    assert [row[0].split(",")[0] for row in rows] == ["ViT"] * 4 + ["Llama"] * 3


def test_models_table_of_cold_compilations_and_second_processes() -> None:
    result = models_result()
    ours = next(row for row in result["rows"] if row["group"] == "ours")
    second = {"compile_s": 4.25, "graphs_compiled": 1, "tuned": {"products": 1, "candidates": 8, "others": 2}}
    ours |= {"cold": True, "compile_s": 30.0, "second": second}
    header, rows = tables.models(result)
    assert header[4:6] == ["compile s", "2nd process s"]
    assert rows[2][4:6] == ["30.0 (2.50x)", "4.2, 3 tuned"]
    assert rows[1][4:6] == ["12.0", "-"]
    assert rows[-1][5] == "-"
    assert len({len(row) for row in [header, *rows]}) == 1
    second["graphs_compiled"] = 0
    assert tables.models(result)[1][2][5] == "4.2, 2 tuned"


def test_markdown_has_one_line_a_row() -> None:
    lines = tables.markdown(["a", "b"], [["x|y", "1"]]).splitlines()
    assert lines == ["| a | b |", "| --- | ---: |", "| x/y | 1 |"]


@pytest.mark.parametrize("result", [gemm_result(), models_result(), gemm_result() | {"environment": record("2026", "cpu") | {"triton": None}}])
def test_plot_writes_a_png(tmp_path: Path, result: dict[str, Any]) -> None:
    path = tmp_path / "result.json"
    common.write_json(path, result)
    assert plot.main([str(path)]) == 0
    assert is_png(path.with_suffix(".png"))


def test_plot_refuses_what_is_not_a_result(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"kind": "gemm"}))
    with pytest.raises(ValueError, match=r"other\.json must be a result of benchmarks"):
        plot.main([str(path)])


# The README block.


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with a README that has the markers, and one committed GPU result of each kind."""
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "README.md").write_text(f"# Head\n\n{report.BEGIN}\nold\n{report.END}\n\ntail\n")
    add_result(tmp_path, "gemm-a", gemm_result(2.0))
    add_result(tmp_path, "models-a", models_result())
    return tmp_path


def add_result(root: Path, name: str, result: dict[str, Any], track: bool = True) -> None:
    folder = root / "benchmarks" / "results"
    common.write_json(folder / f"{name}.json", result)
    (folder / f"{name}.png").write_bytes(b"")
    if track:
        subprocess.run(["git", "add", f"benchmarks/results/{name}.json", f"benchmarks/results/{name}.png"], cwd=root, check=True)


def test_report_writes_the_block_and_check_sees_that_it_is_stale(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"], checkout) == 1
    assert "stale" in capsys.readouterr().out
    assert report.main(["--readme"], checkout) == 0
    readme = (checkout / "README.md").read_text()
    assert readme.startswith(f"# Head\n\n{report.BEGIN}\n### Scaled INT8 products\n")
    assert readme.endswith(f"{report.END}\n\ntail\n")
    assert "old" not in readme
    assert "| Llama, M >= 1024 | 2.00x, least 2.00x of 12 |" in readme
    for part in ("| 8192 x 8192 x 8192 | 8000.0 | 5000.0 | 4000.0 |", "](benchmarks/results/gemm-a.png)", "](benchmarks/results/models-a.png)",
                 "NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, 2026-01-02, commit ffffffffffff with local changes"):  # fmt: skip
        assert part in readme
    assert report.main(["--check"], checkout) == 0
    add_result(checkout, "gemm-b", gemm_result(3.0, "2026-01-03T00:00:00Z"), track=False)
    add_result(checkout, "gemm-c", gemm_result(3.0, "2026-01-04T00:00:00Z", device="cpu"))
    add_result(checkout, "gemm-d", gemm_result(3.0, "2026-01-01T00:00:00Z"))
    assert report.main(["--check"], checkout) == 1
    assert report.main(["--readme"], checkout) == 0
    readme = (checkout / "README.md").read_text()
    assert [readme.count(f"{name}.png") for name in ("gemm-a", "gemm-b", "gemm-c", "gemm-d")] == [1, 0, 1, 0]
    assert "### Scaled INT8 products on a CPU" in readme
    add_result(checkout, "gemm-b", gemm_result(3.0, "2026-01-03T00:00:00Z"))
    assert report.main(["--check"], checkout) == 1
    assert report.main(["--readme"], checkout) == 0
    assert "gemm-a.png" not in (checkout / "README.md").read_text()


def test_report_shows_the_newest_of_each_command(checkout: Path) -> None:
    for name, command, commit in (("gemm-b", "python -m benchmarks.gemm --shapes vit", "f" * 40), ("gemm-c", "python -m benchmarks.gemm", "e" * 40)):
        result = gemm_result(3.0, "2026-01-01T00:00:00Z")
        result["environment"] |= {"command": command, "commit": commit}
        add_result(checkout, name, result)
    assert report.main(["--readme"], checkout) == 0
    readme = (checkout / "README.md").read_text()
    assert [readme.count(f"{name}.png") for name in ("gemm-a", "gemm-b", "gemm-c")] == [1, 1, 0]


def test_report_has_a_section_for_each_program(checkout: Path) -> None:
    heads = {"blocks": "Block-scaled INT8 products", "weights --scheme w8a16": "INT8 and INT4 weights beside other activations"}
    for number, command in enumerate(heads):
        result = gemm_result(3.0)
        result["environment"] |= {"command": f"python -m benchmarks.{command}"}
        add_result(checkout, f"program-{number}", result)
    assert report.main(["--readme"], checkout) == 0
    sections = (checkout / "README.md").read_text().split("\n### ")
    assert "gemm-a.png" in sections[1]
    for number, (head, text) in enumerate(zip(heads.values(), sections[2:4], strict=True)):
        assert text.startswith(head)
        assert [text.count(f"{name}.png") for name in (f"program-{number}", f"program-{1 - number}", "gemm-a")] == [1, 0, 0]


def test_report_check_sees_an_edited_figure(checkout: Path) -> None:
    assert report.main(["--readme"], checkout) == 0
    readme = (checkout / "README.md").read_text()
    (checkout / "README.md").write_text(readme.replace("4000.0", "3000.0"))
    assert report.main(["--check"], checkout) == 1


def test_report_says_what_is_missing(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "README.md").write_text("no markers")
    assert report.main(["--readme"], checkout) == 2
    assert "each once" in capsys.readouterr().out
    (checkout / "README.md").unlink()
    assert report.main(["--check"], checkout) == 2
    assert "README.md is missing" in capsys.readouterr().out
    subprocess.run(["git", "rm", "-q", "-r", "--cached", "benchmarks"], cwd=checkout, check=True)
    (checkout / "README.md").write_text(f"{report.BEGIN}\n{report.END}")
    assert report.main(["--check"], checkout) == 2
    assert "must hold a committed result" in capsys.readouterr().out
