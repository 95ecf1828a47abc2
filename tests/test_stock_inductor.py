"""config.register_passes: the passes in stock Inductor beside the user's own; a model with nothing quantized; and config.strict at both doors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import Seen, check, one_linear, rows, statements, stock, templates
from processes import python_json
from support import run
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from int8_inductor import LeftBehindError, config
from int8_inductor.backend import OptionError
from int8_inductor.passes import Int8Pass


@pytest.fixture
def x() -> Tensor:
    return rows()


@pytest.fixture
def model() -> nn.Module:
    return one_linear()


def test_the_flag_rewrites_in_stock_inductor_and_is_undone(model: nn.Module, x: Tensor) -> None:
    off = stock(model, x)
    # A copy of the config copies passes too, and torchao leaves one there when its x86 quantizer is imported: no two copies would be equal.
    with inductor_config.patch(pre_grad_custom_pass=None):
        before = inductor_config.get_config_copy()
        config.register_passes = True
        try:
            check(stock(model, x), model, x)
            check(stock(model, x, mode="max-autotune"), model, x)
            assert inductor_config.get_config_copy() == before
        finally:
            config.register_passes = False
    again = stock(model, x)
    assert off.report.graphs == again.report.graphs == 0
    assert templates(off) == templates(again) == 0
    assert statements(again.code) == statements(off.code)


def _single(each: Seen) -> Any:
    return each


def _list(each: Seen) -> Any:
    return [each]


def _plain_function(each: Seen) -> Any:
    return lambda graph: each(graph)


# A list in a slot is new in 2.13.
SHAPES = [_single, _plain_function] + ([_list] if hasattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes") else [])


@pytest.mark.parametrize("order", ["user first", "flag first"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_users_passes_stand_beside_ours(shape: Callable[[Seen], Any], order: str, model: nn.Module, x: Tensor) -> None:
    pre, post = Seen(), Seen()
    users = {"joint_custom_pre_pass": shape(pre), "joint_custom_post_pass": shape(post)}
    patches: list[AbstractContextManager[Any]] = [inductor_config.patch(users), config.patch(register_passes=True)]
    first, second = patches if order == "user first" else reversed(patches)
    with first, second:
        check(stock(model, x), model, x)
        assert inductor_config.joint_custom_pre_pass is users["joint_custom_pre_pass"]
        assert inductor_config.joint_custom_post_pass is users["joint_custom_post_pass"]
    assert pre.rewritten == [True]
    assert post.rewritten == [True]
    with inductor_config.patch(users):
        assert stock(model, x).report.graphs == 0
    assert pre.rewritten == post.rewritten == [True, False]


def test_both_doors_at_once_run_the_passes_once(model: nn.Module, x: Tensor) -> None:
    seen = Seen()
    with config.patch(register_passes=True), inductor_config.patch(joint_custom_pre_pass=seen):
        check(run(model, x), model, x)
        assert seen.rewritten == [True]
        with inductor_config.patch(joint_custom_pre_pass=Int8Pass("torch")):
            mine = stock(model, x)
    check(mine, model, x)
    assert mine.has("_int_mm(")


def test_the_flag_heeds_the_kernel_preference(model: nn.Module, x: Tensor) -> None:
    with config.patch(register_passes=True, kernel_preference="torch"):
        compiled = stock(model, x)
    check(compiled, model, x)
    assert compiled.has("_int_mm(")


def test_the_flag_where_inductor_runs_no_passes_is_named(model: nn.Module, x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with config.patch(register_passes=True):
        assert stock(model, x, mode="lite").report.graphs == 0
        (record,) = [each for each in caplog.records if each.name == "int8_inductor"]
        assert record.levelno == logging.WARNING
        assert "use_joint_graph_passes is False" in record.getMessage()
        with config.patch(strict=True), pytest.raises(OptionError, match="use_joint_graph_passes is False"):
            stock(model, x, mode="lite")


BY_ENVIRONMENT = """
import json, torch, int8_inductor
from torch._inductor.utils import run_and_get_code
from int8_inductor.explain import recording
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 24)).eval()
int8_inductor.quantize_(model, int8_inductor.Int8DynamicActivationInt8WeightConfig())
x = torch.randn(20, 32)
with torch.no_grad(), recording() as report:
    got, code = run_and_get_code(torch.compile(model), x)
    flag = int8_inductor.config.register_passes, int8_inductor.config.strict, int8_inductor.config.kernel_preference
    # By what is fastest on this CPU.
    products = sum(code[0].count(each) for each in ("extern_kernels._int_mm(", "extern_kernels.mm(", "avx2_int_mm.default("))
    print(json.dumps([*flag, report.counts()["linear"]["rewritten"], products, (got - model(x)).abs().max().item()]))
"""


def test_environment_variables_set_the_flags(tmp_path: Path) -> None:
    names = {"REGISTER_PASSES": "1", "STRICT": "1", "KERNEL_PREFERENCE": "torch"}
    result = python_json(BY_ENVIRONMENT, tmp_path, **{f"INT8_INDUCTOR_{name}": value for name, value in names.items()})
    assert result[:5] == [True, True, "torch", 1, 1]
    assert result[5] < 1e-5


# Nothing quantized, and strict ----------------------------------------------------------------------------------------------------


def test_a_model_with_nothing_quantized_compiles_as_with_inductor(x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    theirs = stock(model, x)
    with caplog.at_level(logging.INFO, "int8_inductor"):
        mine = run(model, x)
        with config.patch(register_passes=True):
            flagged = stock(model, x)
    assert statements(mine.code) == statements(theirs.code) == statements(flagged.code)
    assert torch.equal(mine.output, theirs.output)
    records = [(each.levelno, each.getMessage()) for each in caplog.records if each.name == "int8_inductor"]
    assert records == [(logging.INFO, "nothing quantized in this graph (2 float linears): it compiles as with inductor")] * 2


def left_behind(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """A float activation, and a weight [K, N]."""
    return x @ (w.float() * scale)


@pytest.fixture
def strict() -> Iterator[None]:
    with config.patch(strict=True):
        yield


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("door", ["backend", "flag"])
def test_strict_raises_on_what_is_left(door: str, model: nn.Module, x: Tensor) -> None:
    inputs = x, torch.ones(16, 8, dtype=torch.int8), torch.ones(1, 8)
    backend = "int8_inductor" if door == "backend" else "inductor"
    flag = nullcontext() if door == "backend" else config.patch(register_passes=True)
    with flag:
        with pytest.raises(LeftBehindError, match=r"linear mm was left as it was: the weight is \[K, N\] in memory, not \[N, K\]"):
            run(left_behind, *inputs, backend=backend)
        check(run(model, x, backend=backend), model, x)
        with config.patch(strict=False):
            compiled = run(left_behind, *inputs, backend=backend)
    torch.testing.assert_close(compiled.output, left_behind(*inputs))
    assert [entry.kind for entry in compiled.report.left()] == ["dequant", "linear"]


@pytest.mark.usefixtures("strict")
def test_strict_has_nothing_against_float_linears(x: Tensor) -> None:
    model = nn.Linear(16, 8).eval()
    run(model, x).check_report(linear={"float": 1})
