"""Kernels that start before the ones that they follow have ended: what they do first, how they are launched, and that they see what was written."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hopper_cases import JOBS as HOPPER_JOBS
from machine_code import Job, compile_all, generated_kernel
from support import run
from test_weight_machine_code import Case, cases, render
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.codegen.triton import TritonKernel

from int8_inductor import Int8DynamicActivationInt8WeightConfig, expand_int4, launching, lowering, operands, ops, quantize_
from int8_inductor._compat import launched_as_dependents
from int8_inductor.int4 import unpack_int4
from int8_inductor.templates import LOWERINGS, hopper_scaled_mm, persistent, tiled, vector

WAIT = "griddepcontrol.wait"
N, K = 256, 4096
gpu = pytest.mark.gpu


@pytest.fixture
def as_dependents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates are rendered as where CUDA graphs launch them on Hopper; kernels for a GPU are looked at, not run."""
    monkeypatch.setattr(operands, "launches_dependents", lambda device: True)
    monkeypatch.setattr(lowering, "has_ptx", lambda device: True)
    monkeypatch.setattr("torch._inductor.runtime.triton_heuristics.CachingAutotuner.run", lambda *args, **kwargs: None)


def rendered(template: Any, config: Any, m: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel of a product of int8 with m rows."""
    monkeypatch.setitem(LOWERINGS, "scaled_mm", dataclasses.replace(LOWERINGS["scaled_mm"], templates=(template,)))
    monkeypatch.setattr(template, "candidates", lambda *args, **kwargs: [config])
    a, b = torch.zeros(m, K, dtype=torch.int8), torch.zeros(N, K, dtype=torch.int8)
    code = run(lambda a, b, x, y: ops.scaled_mm(a, b, x, y, out_dtype=torch.bfloat16), a, b, torch.ones(m, 1), torch.ones(N)).code[0]
    return generated_kernel(code)


MODULES = [
    (tiled, tiled.TiledConfig(16, 64, 256, 4, 4), 7),
    (persistent, persistent.CONFIGS[0], 7),
    (vector, vector.CONFIGS[0], 1),
]


@pytest.mark.parametrize(("template", "config", "m"), MODULES)
def test_a_kernel_waits_before_it_touches_memory(
    template: Any, config: Any, m: int, as_dependents: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = rendered(template, config, m, monkeypatch)
    assert "'launch_pdl': True" in text
    (code,) = compile_all([Job(text, config.num_warps, config.num_stages, 90)])
    assert tuple(code.order) == (WAIT, "memory")
    assert code.mma
    assert code.stack == 0


def test_so_does_every_template_of_other_weights(as_dependents: None, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: dict[Any, Case] = {(case.name, type(case.template)): case for case in cases(90)}
    assert len({name for name, _ in chosen}) >= 4
    jobs = [Job(render(each, monkeypatch), each.config.num_warps, each.constants["num_stages"], 90) for each in chosen.values()]
    assert {tuple(code.order) for code in compile_all(jobs)} == {(WAIT, "memory")}


def test_without_it_kernels_neither_wait_nor_are_launched_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.runtime.triton_heuristics.CachingAutotuner.run", lambda *args, **kwargs: None)
    text = rendered(tiled, MODULES[0][1], 7, monkeypatch)
    assert "gdc_" not in text
    assert "'launch_pdl': True" not in text


def test_kernels_in_gluon_wait_first() -> None:
    """The launch says so too, and Triton sets the launch's attribute from it."""
    job = HOPPER_JOBS[0]
    source, launch = job.program(DEPENDENT=True)
    assert '"dependent": true' in launch
    assert '"dependent": false' in job.program()[1]
    assert "griddepcontrol" not in job.program()[0]
    before, after = source.split("griddepcontrol.launch_dependents")
    assert "griddepcontrol.wait" in before
    assert "warp_specialize" not in before
    assert "warp_specialize" in after


def test_so_does_the_kernel_that_adds_up_parts_of_k() -> None:
    job = next(each for each in HOPPER_JOBS if each.config.splits > 1)
    finish = job.program(DEPENDENT=True)[0].split("def finish(")[1].split("def kernel(")[0]
    assert 0 < finish.index("griddepcontrol.wait") < finish.index("griddepcontrol.launch_dependents") < finish.index("tl.load")
    assert "griddepcontrol" not in job.program()[0]


def test_so_does_the_one_that_unpacks_int4() -> None:
    text = inspect.getsource(expand_int4._expand)
    assert 0 < text.index("gdc_wait") < text.index("gdc_launch_dependents") < text.index("tl.load")


@gpu
def test_int4_is_unpacked_so() -> None:
    packed = torch.randint(0, 256, (1000, 512), dtype=torch.uint8, device="cuda")
    assert torch.equal(expand_int4.expand_int4(packed, dependent=True), unpack_int4(packed))


def test_inductors_kernels_wait_first_even_those_that_read_nothing() -> None:
    wait, go = TritonKernel.GDC_WAIT, TritonKernel.GDC_LAUNCH
    bodies = {("tmp0 = 0.0", "store"): ("tmp0 = 0.0", "store"), ("load", f"    {wait}", f"    {go}", wait, "store"): ("load", "store")}
    on, off = (SimpleNamespace(_enable_pdl_codegen=lambda answer=answer: answer) for answer in (True, False))
    for body, rest in bodies.items():
        code = SimpleNamespace(_lines=list(body))
        with launched_as_dependents():
            assert inductor_config.triton.enable_pdl
            TritonKernel._filter_pdl(off, code)
            assert code._lines == list(body)
            TritonKernel._filter_pdl(on, code)
        assert code._lines == [wait, go, *rest]
    assert not inductor_config.triton.enable_pdl


@pytest.mark.parametrize(
    ("capability", "graphs", "cpp", "want"),
    [
        ((9, 0), True, False, True),
        ((12, 0), True, False, True),
        ((9, 0), False, False, False),
        ((8, 0), True, False, False),
        ((9, 0), True, True, False),
    ],
)
def test_where_kernels_are_launched_so(capability: tuple[int, int], graphs: bool, cpp: bool, want: bool) -> None:
    device = torch.device("cuda", 0)
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(launching, "cuda_of_the_driver", return_value=13000),
        inductor_config.patch({"triton.cudagraphs": graphs, "cpp_wrapper": cpp}),
        launching.launches({device}),
    ):
        assert inductor_config.triton.enable_pdl is want
    with inductor_config.patch({"triton.cudagraphs": True}), launching.launches({torch.device("cpu")}):
        assert not inductor_config.triton.enable_pdl


@pytest.mark.parametrize(("driver", "want"), [(12020, False), (12030, True), (13000, True)])
def test_older_drivers_have_no_such_graphs(driver: int, want: bool) -> None:
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(launching, "cuda_of_the_driver", return_value=driver),
    ):
        assert launching.can_launch_dependents(torch.device("cuda", 0)) is want


def test_the_driver_is_asked_by_its_own_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self, name: str) -> None:
            assert name in ("libcuda.so.1", "nvcuda.dll")

        def cuDriverGetVersion(self, version: Any) -> int:
            version._obj.value = 12040
            return 0

    monkeypatch.setattr("ctypes.CDLL", Library)
    assert launching.cuda_of_the_driver.__wrapped__() == 12040
    monkeypatch.setattr("ctypes.CDLL", mock.Mock(side_effect=OSError))
    assert launching.cuda_of_the_driver.__wrapped__() == 0


@gpu
def test_this_driver_has_them() -> None:
    assert launching.cuda_of_the_driver() >= 11000


class Block(nn.Module):
    """Kernels of every kind, one after the other: norms, quantized activations, products, a fill, a gather."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return x + y + torch.zeros_like(y).index_fill(0, torch.arange(1, device=x.device), 0.5)


GLUON = hopper_scaled_mm
IN_TRITON = tuple(each for each in LOWERINGS["scaled_mm"].templates if each is not GLUON)


@gpu
@pytest.mark.parametrize(("rows", "templates"), [*((rows, IN_TRITON) for rows in (1, 16, 100, 4096)), (100, (GLUON,)), (4096, (GLUON,))])
def test_results_are_those_of_launches_one_after_the_other(rows: int, templates: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, over many replays with other inputs: where a kernel read too early, what it read would be the last replay's.

    Both run templates of one kind: Inductor fuses what follows into Triton's alone, where nothing is rounded to bfloat16 on the way.
    """
    if torch.cuda.get_device_capability()[0] != 9 and templates == (GLUON,):
        pytest.skip("the template is for Hopper")
    monkeypatch.setitem(LOWERINGS, "scaled_mm", dataclasses.replace(LOWERINGS["scaled_mm"], templates=templates, rival=None))
    torch.manual_seed(rows)
    with torch.device("cuda"):
        model = nn.Sequential(*(Block(1024) for _ in range(6))).to(torch.bfloat16).eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    plain = {"triton.cudagraphs": False, "triton.enable_pdl": False}
    inputs = [torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(20)]
    with torch.no_grad(), mock.patch.object(torch._inductor.config, "fx_graph_cache", False):
        replayed = run(model, inputs[0], options={"triton.cudagraphs": True})
        _check_kernels(replayed.code[0], gluon=templates == (GLUON,))
        torch._dynamo.reset()
        one_by_one = torch.compile(model, backend="int8_inductor", options=plain)
        want = [one_by_one(x).clone() for x in inputs]
        torch._dynamo.reset()
        graphed = torch.compile(model, backend="int8_inductor", options={"triton.cudagraphs": True})
        for _, (x, y) in itertools.product(range(10), zip(inputs, want, strict=True)):
            assert torch.equal(graphed(x), y)


def _check_kernels(code: str, *, gluon: bool) -> None:
    """Every kernel waits before it touches memory, and lets the next one start unless it computes a product."""
    kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.S)
    assert len(kernels) > 3
    assert any(name.startswith("triton_tem_") for name, _ in kernels) is not gluon
    for name, text in kernels:
        assert "'launch_pdl': True" in text, name
        body = text[text.index("def triton_") :]
        assert body.index("gdc_wait()") < min(body.index("tl.store"), body.find("tl.load") % 2**31)
        assert ("gdc_launch_dependents()" in body) is not name.startswith("triton_tem_")
