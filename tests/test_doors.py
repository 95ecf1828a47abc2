"""The two doors: the backend name with its modes and options, and the flag that puts the passes into stock Inductor beside the user's own."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python_json
from support import Compiled, run
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

from int8_inductor import (
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    KernelPreference,
    KernelPreferenceError,
    LeftBehindError,
    calibrate,
    config,
    quantize_,
)
from int8_inductor.backend import OptionError, _check_options
from int8_inductor.passes import Int8Pass

ONE_LINEAR = {"linear": {"rewritten": 1}, "quant": {"feeds": 1}, "dequant": {"rewritten": 2}}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def check(compiled: Compiled, model: nn.Module, x: Tensor) -> None:
    """Assert that the one linear of `model` was rewritten, once, and computes what it does in eager."""
    assert compiled.report.graphs == 1
    compiled.check_report(**ONE_LINEAR)
    torch.testing.assert_close(compiled.output, model(x), rtol=1e-6, atol=1e-6)


def templates(compiled: Compiled) -> int:
    """How many of the launched kernels are templates."""
    return sum(name.startswith("triton_tem_") for name in compiled.kernels)


def statements(code: list[str]) -> list[str]:
    """Generated modules without comments and blank lines."""
    return [line for each in code for line in each.splitlines() if line.strip() and not line.lstrip().startswith("#")]


# The backend name -----------------------------------------------------------------------------------------------------------------

BY_HAND = """
import json, sys, torch
listed = "int8_inductor" in torch._dynamo.list_backends()
imported = [name for name in sys.modules if name.split(".")[0] == "int8_inductor"]

def linear(q, x_scale, w, w_scale):
    return torch.nn.functional.linear(q.float() * x_scale, w.float() * w_scale)

torch.manual_seed(0)
int8 = lambda *shape: torch.randint(-127, 128, shape, dtype=torch.int8)
inputs = int8(20, 32), torch.rand(20, 1), int8(24, 32), torch.rand(24, 1)
from torch._inductor.utils import run_and_get_code
got, code = run_and_get_code(torch.compile(linear, backend="int8_inductor"), *inputs)
want = linear(*(t.double() if t.is_floating_point() else t for t in inputs))
error = ((got - want).abs().max() / want.abs().max()).item()
print(json.dumps([listed, imported, sum(each.count("_int_mm(") for each in code), error]))
"""


def test_the_backend_is_found_by_name_without_an_import(tmp_path: Path) -> None:
    listed, imported, products, error = python_json(BY_HAND, tmp_path)
    assert listed
    assert imported == []
    assert products == 1
    assert error < 1e-6


class Seen(CustomGraphPass):
    """A pass of the user's that notes what holds while it runs: how often, with which operators in the graph, under which options."""

    def __init__(self, *options: str, has_uuid: bool = True) -> None:
        self.options, self.has_uuid = options, has_uuid
        self.rewritten: list[bool] = []
        self.values: list[tuple[Any, ...]] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.rewritten.append(any(node.target is torch.ops.int8_inductor.scaled_mm.default for node in graph.nodes))
        self.values.append(tuple(inductor_config.get_config_copy()[name] for name in self.options))

    def uuid(self) -> Any:
        return "seen" if self.has_uuid else None


MODES = {
    None: (False, False, False),
    "default": (False, False, False),
    "reduce-overhead": (False, True, False),
    "max-autotune": (True, True, True),
    "max-autotune-no-cudagraphs": (True, False, True),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_those_of_inductor(mode: str | None, model: nn.Module, x: Tensor) -> None:
    seen = Seen("max_autotune", "triton.cudagraphs", "coordinate_descent_tuning")
    with inductor_config.patch(joint_custom_post_pass=seen):
        compiled = run(model, x, mode=mode)
    check(compiled, model, x)
    assert templates(compiled) == 1
    assert seen.values == [MODES[mode]]
    assert seen.rewritten == [True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fastest"}, "mode must be one of 'default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs', got 'fastest'"),
        ({"mode": "lite"}, "got 'lite'"),
        ({"options": {"epilogue_fusio": True}}, "unknown option 'epilogue_fusio': allowed are kernel_preference and those of torch._inductor"),
        ({"options": {"epilogue_fusion": "yes"}}, "option 'epilogue_fusion' must be bool, got str 'yes'"),
        ({"options": {"kernel_preference": "cuda"}}, "option kernel_preference must be one of 'auto', 'triton', 'torch', got 'cuda'"),
        ({"options": {"kernel_preference": 3}}, "option kernel_preference must be one of 'auto', 'triton', 'torch', got 3"),
        ({"options": {"use_joint_graph_passes": False}}, "use_joint_graph_passes is False"),
    ],
)
def test_what_the_backend_does_not_take_is_refused_before_anything_is_compiled(
    arguments: dict[str, Any], message: str, model: nn.Module, x: Tensor
) -> None:
    seen = Seen()
    with inductor_config.patch(joint_custom_pre_pass=seen), pytest.raises(OptionError) as raised:
        run(model, x, **arguments)
    assert message in str(raised.value)
    assert isinstance(raised.value, RuntimeError)
    assert seen.rewritten == []


def test_every_option_of_inductor_is_taken_with_the_value_that_it_has() -> None:
    known = inductor_config.get_config_copy()
    assert len(known) > 100
    ours, theirs = _check_options(dict(known))
    assert ours == {}
    assert theirs == known


def test_options_reach_inductor(model: nn.Module, x: Tensor) -> None:
    seen = Seen("epilogue_fusion", "triton.cudagraphs")
    with inductor_config.patch(joint_custom_post_pass=seen):
        compiled = run(model, x, options={"epilogue-fusion": False, "triton.cudagraphs": True, "kernel-preference": "torch"})
    check(compiled, model, x)
    assert seen.values == [(False, True)]
    assert compiled.has("_int_mm(")


def test_a_pass_among_the_options_runs_beside_ours(model: nn.Module, x: Tensor) -> None:
    seen = Seen()
    check(run(model, x, options={"joint_custom_pre_pass": seen}), model, x)
    assert seen.rewritten == [True]


def test_a_named_region_is_taken_where_torch_has_them(model: nn.Module, x: Tensor) -> None:
    names = {"name": "region"} if "name" in inspect.signature(torch.compile).parameters else {}
    check(run(model, x, **names), model, x)


def test_dynamo_reset_reaches_the_backend(model: nn.Module, x: Tensor) -> None:
    check(run(model, x, mode="reduce-overhead"), model, x)
    torch._dynamo.reset()
    check(run(model, x, mode="reduce-overhead"), model, x)


# Kernel preference ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlp() -> tuple[nn.Module, Tensor]:
    """Two static linears, asymmetric, with a GELU between them, and an input."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8)).eval()
    x = torch.randn(6, 24)
    quantize_(model, Int8StaticActivationInt8WeightConfig())
    calibrate(model, [x], progress=False)
    return model, x


PREFERENCES = {
    "auto": "triton",
    "triton": "triton",
    "torch": "torch",
    KernelPreference.AUTO: "triton",
    KernelPreference.TRITON: "triton",
    KernelPreference.TORCH: "torch",
}


@pytest.mark.parametrize("door", ["option", "global", "option over global"])
@pytest.mark.parametrize("preference", PREFERENCES, ids=repr)
def test_kernel_preference(preference: str, door: str, mlp: tuple[nn.Module, Tensor]) -> None:
    """TRITON launches templates, TORCH calls _int_mm, AUTO is TRITON where there is Triton; the results agree."""
    model, x = mlp
    opposite = "torch" if PREFERENCES[preference] == "triton" else "triton"
    flag = {"option": "auto", "global": preference, "option over global": opposite}[door]
    with config.patch(kernel_preference=flag):
        compiled = run(model, x, options=None if door == "global" else {"kernel_preference": preference})
    compiled.check_report(linear={"rewritten": 2}, quant={"feeds": 1, "rewritten": 1}, dequant={"rewritten": 4})
    products = sum(code.count("_int_mm(") for code in compiled.code)
    assert (templates(compiled), products) == ((2, 0) if PREFERENCES[preference] == "triton" else (0, 2))
    # The second linear reads what the first one quantized: in a case with no tie, the same int8 values.
    torch.testing.assert_close(compiled.output, model(x), rtol=1e-5, atol=1e-6)


def test_an_unknown_preference_in_the_config_is_refused(model: nn.Module, x: Tensor) -> None:
    message = "kernel_preference must be one of 'auto', 'triton', 'torch', got 'fast'"
    with config.patch(kernel_preference="fast"), pytest.raises(RuntimeError, match=message):
        run(model, x)


@pytest.mark.parametrize("door", ["option", "global"])
def test_triton_on_plain_cpp_is_an_error_that_names_what_is_possible(door: str, model: nn.Module, x: Tensor) -> None:
    flag, options = ("triton", None) if door == "global" else ("auto", {"kernel_preference": "triton"})
    with config.patch(kernel_preference=flag), pytest.raises(KernelPreferenceError) as raised:
        run(model, x, cpu_backend="cpp", options=options)
    assert "kernel_preference 'triton' cannot be met on cpu: Inductor's CPU backend is not Triton; use 'torch' or 'auto'" in str(raised.value)


# Stock Inductor -------------------------------------------------------------------------------------------------------------------


def stock(model: nn.Module, x: Tensor, **kwargs: Any) -> Compiled:
    return run(model, x, backend="inductor", **kwargs)


def test_the_flag_rewrites_in_stock_inductor_and_is_undone(model: nn.Module, x: Tensor) -> None:
    before = inductor_config.get_config_copy()
    off = stock(model, x)
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
    print(json.dumps([*flag, report.counts()["linear"]["rewritten"], code[0].count("_int_mm("), (got - model(x)).abs().max().item()]))
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
    """Weight only: the activation is not quantized."""
    return torch.nn.functional.linear(x, w.float() * scale)


@pytest.fixture
def strict() -> Iterator[None]:
    with config.patch(strict=True):
        yield


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("door", ["backend", "flag"])
def test_strict_raises_on_what_is_left(door: str, model: nn.Module, x: Tensor) -> None:
    inputs = x, torch.ones(8, 16, dtype=torch.int8), torch.ones(8, 1)
    backend = "int8_inductor" if door == "backend" else "inductor"
    flag = nullcontext() if door == "backend" else config.patch(register_passes=True)
    with flag:
        with pytest.raises(LeftBehindError, match=r"linear mm was left as it was: its weight is dequantized from int8 and its activation is not"):
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
