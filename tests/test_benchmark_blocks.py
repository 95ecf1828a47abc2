"""The benchmark of block-scaled products: its peers compute what they should, and a wrong one is found out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import blocks
from benchmarks.cases import SHAPE_SETS, TAILS, Case
from benchmarks.operands import FP8_BLOCKS, INT8_BLOCKS, check, float64_truth

CPU = torch.device("cpu")


def test_rows_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["--shape", "5,200,300", "--shape", "64,256,256,gelu-blocks"]
    assert blocks.main(["--device", "cpu", "--out", str(tmp_path), "--peers", "ours,stock-default,fp8-blockwise", *shapes]) == 0
    (path,) = tmp_path.glob("blocks-*.json")
    rows = {(row["label"], row["peer"]): row for row in json.loads(path.read_text())["rows"]}
    assert [row["status"] for row in rows.values()] == ["ok", "ok", "unavailable"] * 2
    gelu = rows["64 x 256 x 256 gelu-blocks ours", "ours"]
    assert gelu["check"]["off_by"] in (0, 1)
    assert "fp8-blockwise: cuBLAS" not in capsys.readouterr().err


def test_the_plain_kernel() -> None:
    from benchmarks.plain_block_kernel import block_scaled_mm

    case = Case(130, 200, 300)
    operands = INT8_BLOCKS.draw(case, CPU)
    truth = float64_truth(case, operands, INT8_BLOCKS.block_size)
    assert float((block_scaled_mm(*operands).double() - truth).norm() / truth.norm()) < 3e-3


def test_scales_are_laid_out_as_cublas_wants_them() -> None:
    a, b, a_scale, b_scale = FP8_BLOCKS.draw(Case(256, 512, 384), CPU)
    assert (a.dtype, b.dtype) == (torch.float8_e4m3fn, torch.float8_e4m3fn)
    assert (a_scale.shape, a_scale.stride(), b_scale.shape, b_scale.stride()) == ((256, 3), (1, 256), (4, 3), (3, 1))


def test_a_wrong_block_is_found_out() -> None:
    case = Case(16, 256, 256, TAILS["gelu-blocks"])
    right = blocks.PEERS[0].build(case, CPU)

    def wrong(*operands: Tensor) -> Tensor:
        q = right(*operands).clone()
        q[3, 128:] = q[3, 128:] // 2
        return q

    stale = INT8_BLOCKS.draw(case, CPU)
    assert check(case, INT8_BLOCKS, right, stale, CPU).wrong is None
    assert "int8 output is off by" in str(check(case, INT8_BLOCKS, wrong, stale, CPU).wrong)


def test_shapes_of_the_bars_are_there() -> None:
    labels = {case.label for case in SHAPE_SETS["blocks"]}
    assert {"8192 x 8192 x 8192", "4096 x 28672 x 4096", "6304 x 3072 x 768 gelu-blocks"} <= labels
