"""Symbolic sizes: equal to eager at every size, and no more compilations than stock Inductor makes of the float model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import branches, fresh_compile, run
from torch import Tensor, nn
from torch._dynamo.utils import counters

from int8_inductor import (
    Int8DynamicActivationInt8WeightConfig,
    Int8Linear,
    Int8StaticActivationInt8WeightConfig,
    MappingType,
    PerRow,
    PerTensor,
    calibrate,
    quantize_,
    reference,
)
from int8_inductor.explain import recording

CONFIGS = {
    "dynamic per row": Int8DynamicActivationInt8WeightConfig(),
    "dynamic per tensor, asymmetric": Int8DynamicActivationInt8WeightConfig((PerTensor(), PerRow()), MappingType.ASYMMETRIC),
    "static": Int8StaticActivationInt8WeightConfig(),
    "static, asymmetric": Int8StaticActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC),
}


def float_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8)).eval()


def int8_model(config: Any) -> nn.Module:
    model = float_model()
    quantize_(model, config)
    if isinstance(config, Int8StaticActivationInt8WeightConfig):
        calibrate(model, [torch.randn(64, 24)], progress=False)
    return model


def check_against_eager(model: nn.Module, got: Tensor, want: Tensor) -> None:
    """Equal up to float32 rounding; where the second linear has static scales, its input may be one step off next to a tie, in few rows."""
    assert got.shape == want.shape
    scale = getattr(model[2], "input_scale", None)
    if scale is None:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
        return
    off = (got - want).abs().reshape(-1, want.shape[-1])
    step = float(scale.max() * model[2].to_linear().weight.abs().max())
    assert bool((off <= 1.01 * step).all())
    assert int((off > 2e-6 + 1e-5 * want.abs().reshape(off.shape)).any(-1).sum()) <= max(1, len(off) // 10)


def compilations(
    model: nn.Module, shapes: Sequence[Sequence[int]], backend: str, prepare: Callable[[Tensor], None] = lambda x: None, **kwargs: Any
) -> int:
    """How many graphs are compiled when `model` runs on inputs of `shapes` in order; every output is checked against eager."""
    generator = torch.Generator().manual_seed(1)
    with fresh_compile(), torch.no_grad():
        counters.clear()
        compiled = torch.compile(model, backend=backend, **kwargs)
        for shape in shapes:
            x = torch.randn(*shape, generator=generator)
            want = model(x)
            prepare(x)
            check_against_eager(model, compiled(x), want)
        return int(counters["stats"]["unique_graphs"])


def _mark_batch(x: Tensor) -> None:
    torch._dynamo.mark_dynamic(x, 0)


def _mark_two(x: Tensor) -> None:
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)


BATCHES = [(5, 24), (7, 24), (33, 24), (1, 24), (2, 24), (16, 24)]
RUNS: dict[str, tuple[Sequence[Sequence[int]], dict[str, Any], int]] = {
    "found out": (BATCHES, {}, 3),
    "dynamic=True": (BATCHES, {"dynamic": True}, 2),
    "dynamic=False": (BATCHES[:3], {"dynamic": False}, 3),
    "mark_dynamic": ([shape for shape in BATCHES if shape[0] > 1], {"prepare": _mark_batch}, 1),
    "two dimensions": ([(3, 5, 24), (2, 9, 24), (7, 2, 24)], {"prepare": _mark_two}, 1),
}


PAIRS = [(config, case) for config in CONFIGS for case in RUNS if case == "found out" or config in ("dynamic per row", "static, asymmetric")]


@pytest.mark.parametrize(("config", "case"), PAIRS)
def test_no_more_compilations_than_of_the_float_model(config: str, case: str) -> None:
    shapes, kwargs, expected = RUNS[case]
    model = int8_model(CONFIGS[config])
    with recording() as report:
        mine = compilations(model, shapes, "int8_inductor", **kwargs)
    assert mine == expected
    assert report.graphs == expected
    assert report.counts()["linear"] == {"rewritten": 2 * expected, "feeds": 0, "float": 0, "left": 0}


@pytest.mark.parametrize("case", RUNS)
def test_that_is_what_stock_inductor_makes_of_the_float_model(case: str) -> None:
    shapes, kwargs, expected = RUNS[case]
    assert compilations(float_model(), shapes, "inductor", **kwargs) == expected


def test_a_symbolic_m_is_launched_as_often_as_a_static_one() -> None:
    """One kernel a linear, picked by M (test_ranges.py): of three for the first linear, and of two for the second."""
    model = int8_model(CONFIGS["static"])
    x = torch.randn(6, 24)
    static = run(model, x)
    _mark_batch(x)
    symbolic = run(model, x)
    assert len(static.kernels) == 3
    assert [last for last, _ in branches(symbolic.code[0])] == [16, 64, None, 16, None]
    assert len(symbolic.kernels) == 1 + 3 + 2
    assert [entry.epilogue for entry in symbolic.report.linears] == [entry.epilogue for entry in static.report.linears]
    assert symbolic.has("ks0")


def test_requantize_in_blocks_with_a_symbolic_m() -> None:
    """linear -> silu -> int8 and a scale for each row and 128 columns, in one kernel for every M."""
    torch.manual_seed(2)
    linear = Int8Linear.from_linear(nn.Linear(48, 256))

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.quantize_blocks(nn.functional.silu(linear(x)), 128)

    with fresh_compile(), torch.no_grad(), recording() as report:
        compiled = torch.compile(fn, backend="int8_inductor")
        for m in (5, 2, 37, 129):
            x = torch.randn(m, 48)
            # Rounding to int8 amplifies an error of 1e-6 in y only next to a tie: off by at most one, and the scale close.
            q, scale = fn(x)
            _mark_batch(x)
            got_q, got_scale = compiled(x)
            torch.testing.assert_close(got_scale, scale, rtol=1e-5, atol=0)
            assert int((got_q.int() - q.int()).abs().max()) <= 1
            assert float((got_q != q).float().mean()) < 1e-3
    assert report.graphs == 1
    assert [entry.epilogue for entry in report.linears] == ["scales + bias + silu + int8 in blocks of 128"]
    assert report.counts()["quant"] == {"rewritten": 1, "feeds": 1, "float": 0, "left": 0}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_number_of_rows_that_depends_on_the_data(config: str) -> None:
    """Rows chosen by a mask: M has no value at compile time, and may come out as 0 or 1."""
    model = int8_model(CONFIGS[config])

    def fn(x: Tensor, mask: Tensor) -> Tensor:
        return model(x[mask])

    x = torch.randn(9, 24)
    with fresh_compile(), torch.no_grad(), recording() as report, torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(fn, backend="int8_inductor", fullgraph=True)
        # The largest of no values is an error, in eager a case of its own: where M depends on data, only per row can it be 0.
        for chosen in (4, 9, 1) if "per tensor" in config else (4, 9, 1, 0):
            mask = torch.arange(9) < chosen
            check_against_eager(model, compiled(x, mask), fn(x, mask))
    assert report.graphs == 1
    assert report.counts()["linear"]["rewritten"] == 2
