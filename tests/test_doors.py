"""The backend name: found without an import, with the modes and options of inductor; and the versions of torch that it is for."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import Seen, check, one_linear, rows, templates
from processes import python_json
from support import run
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from int8_inductor._compat import check_torch_version
from int8_inductor.backend import OptionError, _check_options


@pytest.fixture
def x() -> Tensor:
    return rows()


@pytest.fixture
def model() -> nn.Module:
    return one_linear()


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
# By what is fastest on this CPU.
products = ("extern_kernels._int_mm(", "extern_kernels.mm(", "avx2_int_mm.default(")
print(json.dumps([listed, imported, sum(each.count(product) for each in code for product in products), error]))
"""


def test_the_backend_is_found_by_name_without_an_import(tmp_path: Path) -> None:
    listed, imported, products, error = python_json(BY_HAND, tmp_path)
    assert listed
    assert imported == []
    assert products == 1
    assert error < 1e-6


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


def test_freezing_leaves_the_passes_their_patterns(model: nn.Module, x: Tensor) -> None:
    with inductor_config.patch(freezing=True):
        compiled = run(model, x)
    check(compiled, model, x)
    assert templates(compiled) == 1


def test_dynamo_reset_reaches_the_backend(model: nn.Module, x: Tensor) -> None:
    check(run(model, x, mode="reduce-overhead"), model, x)
    torch._dynamo.reset()
    check(run(model, x, mode="reduce-overhead"), model, x)


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu128", "2.13.0+cpu", "2.15.0a0+git1234"])
def test_torch_in_the_supported_range(version: str) -> None:
    check_torch_version(version)


@pytest.mark.parametrize("version", ["1.13.1", "2.10.2", "2.16.0.dev20261101", "3.0.0"])
def test_torch_outside_the_supported_range_is_refused(version: str) -> None:
    with pytest.raises(ImportError, match=rf"supports torch 2\.11 to 2\.15, got torch {re.escape(version)}: install a release in that range"):
        check_torch_version(version)
