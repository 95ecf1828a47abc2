"""explain and the log: what was rewritten into which kernel, what was left and why; and that looking changes nothing."""

from __future__ import annotations

import copy
import doctest
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python
from support import run
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache

import int8_inductor.explain
from int8_inductor import (
    Int8DynamicActivationInt8WeightConfig,
    Int8Linear,
    Int8StaticActivationInt8WeightConfig,
    Report,
    calibrate,
    config,
    explain,
    quantize_,
)
from int8_inductor.explain import Entry


class Mixed(nn.Module):
    """A chain of two static linears, a float one, and one whose weight alone is int8, and [K, N]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.chain = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 8)
        self.weight = nn.Buffer(torch.randint(-127, 128, (8, 4), dtype=torch.int8))
        quantize_(self, Int8StaticActivationInt8WeightConfig(), lambda module, name: name.startswith("chain.") and isinstance(module, nn.Linear))
        calibrate(self, [torch.randn(32, 16)], progress=False)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        y = self.head(self.chain(x)) * gain
        return y @ (self.weight.float() * 0.01)


class Broken(nn.Module):
    """A graph break between two dynamic linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = (Int8Linear.from_linear(nn.Linear(16, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


def rows(entries: list[Entry], *columns: str) -> list[tuple[str, ...]]:
    return [tuple(getattr(entry, column) for column in columns) for entry in entries]


# The report -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preference", "kernel"), [("auto", "triton"), ("torch", "aten._int_mm")])
def test_every_linear_quant_and_dequant_is_in_the_report(preference: str, kernel: str, x: Tensor) -> None:
    with config.patch(kernel_preference=preference):
        report = explain(Mixed().eval(), x)
    assert rows(report.linears, "source", "status", "kernel", "epilogue", "reason") == [
        ("chain.0", "rewritten", kernel, "scales + bias + gelu + int8", ""),
        ("chain.2", "rewritten", kernel, "scales + bias", ""),
        ("head", "float", "", "", ""),
        ("", "left", "", "", "the weight is [K, N] in memory, not [N, K]"),
    ]
    assert rows(report.quants, "source", "status", "reason") == [
        ("chain.0", "feeds", "no linear comes right before it"),
        ("chain.2", "rewritten", ""),
    ]
    assert rows(report.dequants, "source", "status") == [("chain.0", "rewritten")] * 2 + [("chain.2", "rewritten")] * 2 + [("", "left")]
    (left,) = [entry for entry in report.dequants if entry.status == "left"]
    assert left.reason == f"{report.linears[-1].name}, which reads it, was left"
    assert report.left() == [left, report.linears[-1]]
    assert (report.graphs, report.graph_breaks) == (1, [])


def test_a_report_is_a_table_and_plain_data(x: Tensor) -> None:
    report = explain(Mixed().eval(), x)
    header, rule, *table, summary = str(report).splitlines()
    assert header.split() == ["kind", "name", "status", "kernel", "epilogue", "reason", "source"]
    assert set(rule) == {"-", " "}
    assert [line.split()[:3] for line in table] == [[entry.kind, entry.name, entry.status] for entry in report.entries]
    for line, entry in zip(table, report.entries, strict=True):
        assert entry.reason in line
        assert entry.epilogue in line
    assert summary == report.summary()
    assert summary == "2 of 3 int8 linears rewritten (1 float linears); quants: 1 fused, 1 feeding, 0 left; dequants: 4 fused, 1 left"
    data = json.loads(json.dumps(report.to_dict()))
    assert data["counts"] == {
        "linear": {"rewritten": 2, "feeds": 0, "float": 1, "left": 1},
        "quant": {"rewritten": 1, "feeds": 1, "float": 0, "left": 0},
        "dequant": {"rewritten": 4, "feeds": 0, "float": 0, "left": 1},
    }
    assert [Entry(**each) for each in data["entries"]] == report.entries
    assert (data["graphs"], data["graph_breaks"]) == (1, [])
    assert Report().counts() == {kind: dict.fromkeys(("rewritten", "feeds", "float", "left"), 0) for kind in ("linear", "quant", "dequant")}


# Signal to noise ------------------------------------------------------------------------------------------------------------------


def in_db(got: Tensor, want: Tensor) -> float:
    return 10 * math.log10(float(want.double().square().sum() / (got.double() - want.double()).square().sum()))


class Stack(nn.Module):
    """Two linears, the first of which runs twice; one that does not run; `broken`: the second runs between graphs."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.idle, self.broken = nn.Linear(16, 16), nn.Linear(16, 8, bias=False), nn.Linear(2, 2), broken

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.first(x).relu())
        return outside(self.second, y) if self.broken else self.second(y)


@torch.compiler.disable
def outside(module: nn.Module, y: Tensor) -> Tensor:
    return module(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_sqnr_of_each_layer_on_an_exact_input(dtype: torch.dtype, x: Tensor) -> None:
    reference, x = Stack().to(dtype), x.to(dtype)
    model = copy.deepcopy(reference)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    report = explain(model, x, sqnr=reference)
    hidden = [x, reference.first(x).relu()]
    wide = reference.first(hidden[1])
    wanted = {
        "first": in_db(torch.cat([model.first(each) for each in hidden]), torch.cat([reference.first(each) for each in hidden])),
        "second": in_db(model.second(wide), reference.second(wide)),
    }
    assert report.sqnr == pytest.approx(wanted)
    assert all(25 < value < 60 for value in report.sqnr.values())
    assert report.to_dict()["sqnr"] == report.sqnr

    alone = explain(model, x, sqnr=True)
    hidden = [x, model.first(x).relu()]
    wide, exact = model.first(hidden[1]), model.first.to_linear()
    wanted = {
        "first": in_db(torch.cat([model.first(each) for each in hidden]), torch.cat([exact(each.float()) for each in hidden])),
        "second": in_db(model.second(wide), model.second.to_linear()(wide.float())),
    }
    assert alone.sqnr == pytest.approx(wanted)
    assert explain(model, x).sqnr == {}
    header, _, *lines, _ = str(alone).splitlines()
    assert "kernel  SQNR dB  epilogue" in header
    linears = [line for line in lines if line.startswith("linear")]
    assert [f"{alone.sqnr[name]:.1f}" in line for name, line in zip(("first", "first", "second"), linears, strict=True)] == [True] * 3
    assert not any("in no graph" in line for line in lines)
    assert all(not module._forward_hooks for each in (model, reference) for module in each.modules())


@torch.no_grad()
def test_sqnr_of_what_runs_between_graphs_and_of_what_is_exact(x: Tensor) -> None:
    exact = Int8Linear.from_linear(nn.Linear(16, 8))
    exact.weight.zero_()
    assert explain(nn.Sequential(exact), x, sqnr=True).sqnr == {"0": math.inf}
    assert "inf" in str(explain(nn.Sequential(exact), x, sqnr=True))
    model = Stack(broken=True)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    report = explain(model, x, sqnr=True)
    assert f"second, in no graph: SQNR {report.sqnr['second']:.1f} dB" in str(report)


def test_what_sqnr_takes(x: Tensor) -> None:
    model = Stack()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    other = nn.ModuleDict({"first": nn.Linear(16, 4)})
    for given, error, message in (
        (1, TypeError, "sqnr must be True, False or the float model, a torch.nn.Module, got int"),
        (nn.ReLU(), ValueError, "sqnr must be a float model with an nn.Linear(16, 16) 'first', got none"),
        (other, ValueError, "sqnr must be a float model with an nn.Linear(16, 16) 'first', got Linear(16, 4)"),
        (copy.deepcopy(model), ValueError, "sqnr must be a float model with an nn.Linear(16, 16) 'first', got Int8Linear(16, 16)"),
    ):
        with pytest.raises(error) as raised:
            explain(model, x, sqnr=given)
        assert str(raised.value) == message
    with pytest.raises(TypeError, match=r"^sqnr needs a model that is a torch\.nn\.Module, got function$"):
        explain(lambda x: x, x, sqnr=True)


def test_graph_breaks_are_named(x: Tensor) -> None:
    report = explain(Broken().eval(), x)
    assert report.graphs == 2
    assert report.graph_breaks == ["Call to `torch._dynamo.graph_break()`"]
    assert rows(report.linears, "source", "status") == [("first", "rewritten"), ("second", "rewritten")]
    assert report.summary().endswith("; 2 graphs, and what ran eagerly between them is not in this report")
    assert str(report).splitlines()[-2:] == ["graph break: Call to `torch._dynamo.graph_break()`", report.summary()]


def test_arguments_by_keyword_reach_the_model(x: Tensor) -> None:
    seen: list[tuple[float, torch.Size]] = []

    class Watched(Mixed):
        def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
            seen.append((gain, x.shape))
            return super().forward(x, gain)

    model = Watched().eval()
    seen.clear()
    assert explain(model, x=x, gain=3.0).counts()["linear"]["rewritten"] == 2
    assert seen
    assert set(seen) == {(3.0, x.shape)}


def test_a_function_is_as_good_as_a_module(x: Tensor) -> None:
    linear = Int8Linear.from_linear(nn.Linear(16, 8))

    def fn(x: Tensor) -> Tensor:
        return linear(x).relu()

    assert rows(explain(fn, x).linears, "status", "epilogue") == [("rewritten", "scales + bias + relu")]


def test_inductors_config_is_in_force(x: Tensor) -> None:
    with inductor_config.patch(cpu_backend="cpp"):
        report = explain(Int8Linear.from_linear(nn.Linear(16, 8)), x)
    assert rows(report.linears, "kernel") == [("aten._int_mm",)]


def test_strict_does_not_keep_explain_from_explaining(x: Tensor) -> None:
    with config.patch(strict=True):
        assert len(explain(Mixed().eval(), x).left()) == 2
        assert config.strict


def test_the_model_runs_once_without_gradients(x: Tensor) -> None:
    calls = []
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).train()
    model.register_forward_hook(lambda module, args, output: calls.append((module.training, output.requires_grad)))
    report = explain(model, x.requires_grad_())
    assert calls == [(True, False)]
    assert rows(report.linears, "status") == [("float",)] * 2


def test_the_example_in_the_docstring_is_right() -> None:
    (test,) = doctest.DocTestFinder(recurse=False).find(explain, "explain", module=int8_inductor.explain, globs={})
    assert len(test.examples) == 7
    result = doctest.DocTestRunner(verbose=False).run(test)
    assert result.failed == 0


# Looking changes nothing ----------------------------------------------------------------------------------------------------------


def _compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, backend="int8_inductor")
    return compiled


def _compiled_in_place(model: nn.Module) -> Callable[[Tensor], Tensor]:
    model.compile(backend="int8_inductor")
    return model


def _compiled_function(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda x: model(x) * 2, backend="int8_inductor")


@pytest.mark.parametrize("model", [Mixed, Broken])
@pytest.mark.parametrize("compile_", [_compiled, _compiled_in_place, _compiled_function])
def test_compiled_code_stays_valid(compile_: Any, model: type[nn.Module], x: Tensor) -> None:
    """explain of a compiled model sees what was compiled, as of the model itself, and what was compiled before is not compiled again."""
    fast = compile_(model().eval())
    with torch.no_grad():
        before = fast(x)
        report = explain(fast, x)
        again = explain(fast, x[:3])
        counters.clear()
        with torch._dynamo.config.patch(error_on_recompile=True):
            after = fast(x)
    assert torch.equal(before, after)
    assert counters["stats"]["unique_graphs"] == 0
    assert report.counts() == again.counts() == explain(model().eval(), x).counts()
    assert report.counts()["linear"]["rewritten"] == 2


def test_automatic_dynamic_shapes_learn_nothing_from_explain(x: Tensor) -> None:
    """Another batch size in explain does not make the next compilation symbolic, nor a compilation the next explain."""
    model = Broken().eval()
    explain(model, x[:3])
    fast = _compiled(model)
    with torch.no_grad():
        counters.clear()
        fast(x)
        assert counters["stats"]["unique_graphs"] == 2
        fast(torch.randn(9, 16))  # the second size seen: symbolic from here on
        assert counters["stats"]["unique_graphs"] == 4
        with torch._dynamo.config.patch(error_on_recompile=True):
            fast(torch.randn(11, 16))
    assert rows(explain(model, x).linears, "status") == [("rewritten",)] * 2


def test_explaining_often_uses_up_no_recompile_limit(x: Tensor) -> None:
    model = Mixed().eval()
    for _ in range(4):
        assert explain(model, x).counts()["linear"]["rewritten"] == 2
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        assert explain(model, x).counts()["linear"]["rewritten"] == 2
        torch.testing.assert_close(_compiled(model)(x), model(x), rtol=1e-5, atol=1e-6)


def test_caches_are_neither_read_nor_written(x: Tensor) -> None:
    model = Mixed().eval()

    def compile_and_count() -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad():
            _compiled(model)(x)
        return counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"]

    with fresh_cache():
        explain(model, x)
        assert compile_and_count() == (0, 1)
        assert explain(model, x).counts()["linear"]["rewritten"] == 2
        assert compile_and_count() == (1, 0)


# The log --------------------------------------------------------------------------------------------------------------------------


def test_one_line_a_graph_and_a_warning_for_each_thing_left(x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "int8_inductor"):
        report = run(Mixed().eval(), x).report
    records = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "int8_inductor"]
    dequant, linear = report.left()
    assert len(records) == 3
    assert records[0] == ("INFO", report.summary())
    assert [level for level, _ in records[1:]] == ["WARNING"] * 2
    assert records[1][1].startswith(f"dequant {dequant.name} left as it was: {dequant.reason}")
    assert records[2][1].startswith(f"linear {linear.name} left as it was: the weight is [K, N] in memory, not [N, K]")


LOGGED = """
import sys
sys.path.insert(0, TESTS)
import interpreter
interpreter.install()
import torch
from int8_inductor import Int8DynamicActivationInt8WeightConfig, quantize_
model = torch.nn.Sequential(torch.nn.Linear(16, 8)).eval()
quantize_(model, Int8DynamicActivationInt8WeightConfig())
with torch.no_grad():
    torch.compile(model, backend="int8_inductor")(torch.randn(5, 16))
"""


@pytest.mark.parametrize(("env", "shown"), [({}, False), ({"TORCH_LOGS": "+int8_inductor"}, True)], ids=["quiet", "TORCH_LOGS"])
def test_torch_logs_shows_the_lines(env: dict[str, str], shown: bool, tmp_path: Path) -> None:
    errors = python(f"TESTS = {str(Path(__file__).parent)!r}\n{LOGGED}", tmp_path, **env).stderr
    assert ("1 of 1 int8 linears rewritten" in errors) is shown
    assert ("-> triton, epilogue scales + bias" in errors) is shown
