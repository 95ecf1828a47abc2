"""Inductor's and AOTAutograd's caches: hits within a process and across processes, and never what another source, flag or pass would compile."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python_json
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

import int8_inductor
from int8_inductor import Int8DynamicActivationInt8WeightConfig, LeftBehindError, avx2, config, quantize_
from int8_inductor._compat import custom_pass_slot, unchain
from int8_inductor.explain import recording
from int8_inductor.passes import Int8Pass, sources_digest

PACKAGE = Path(int8_inductor.__file__).parent


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU()).eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


@dataclass
class Outcome:
    """One compilation: its output, how many graphs the passes ran over, and what the caches counted."""

    output: Tensor
    graphs: int
    fx: dict[str, int]
    autograd: dict[str, int]

    @property
    def hit(self) -> bool:
        """Whether a cache had it. An AOTAutograd hit brings its FX graph along."""
        assert (self.graphs == 0) == bool(self.autograd.get("autograd_cache_hit") or self.fx.get("fxgraph_cache_hit"))
        return self.graphs == 0


def compile_and_run(model: Any, *inputs: Tensor, backend: str = "int8_inductor", **kwargs: Any) -> Outcome:
    torch._dynamo.reset()
    counters.clear()
    with recording() as report, torch.no_grad():
        output = torch.compile(model, backend=backend, **kwargs)(*inputs)
    fx = {key: count for key, count in counters["inductor"].items() if key.startswith("fxgraph_cache")}
    return Outcome(output, report.graphs, fx, dict(counters["aot_autograd"]))


@pytest.fixture
def empty_caches() -> Iterator[None]:
    with fresh_cache():
        yield


# Within a process -----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("empty_caches")
def test_a_second_compilation_hits_until_a_flag_changes(model: nn.Module, x: Tensor) -> None:
    first, second = compile_and_run(model, x), compile_and_run(model, x)
    assert (first.hit, second.hit) == (False, True)
    assert torch.equal(first.output, second.output)
    torch.testing.assert_close(first.output, model(x), rtol=1e-6, atol=1e-6)
    with config.patch(kernel_preference="torch"):
        assert [compile_and_run(model, x).hit for _ in range(2)] == [False, True]
    assert not compile_and_run(model, x, options={"kernel_preference": "triton"}).hit
    with config.patch(strict=True):
        assert not compile_and_run(model, x).hit
    assert compile_and_run(model, x).hit


@pytest.mark.usefixtures("empty_caches")
def test_the_flag_in_stock_inductor_is_part_of_the_key(model: nn.Module, x: Tensor) -> None:
    float_first = compile_and_run(model, x, backend="inductor")
    assert float_first.autograd["autograd_cache_miss"] == 1
    with config.patch(register_passes=True):
        flagged = [compile_and_run(model, x, backend="inductor") for _ in range(2)]
    assert flagged[0].graphs == 1
    assert flagged[1].hit
    again = compile_and_run(model, x, backend="inductor")
    assert again.autograd["autograd_cache_hit"] == 1
    assert torch.equal(again.output, float_first.output)
    assert torch.equal(flagged[1].output, flagged[0].output)


def _left(x: Tensor, w: Tensor) -> Tensor:
    """A product that is left as it was: the weight [K, N] beside a float activation."""
    return x @ (w.float() * 0.5)


@pytest.mark.usefixtures("empty_caches")
def test_strict_raises_though_the_graph_is_in_the_cache(x: Tensor) -> None:
    inputs = x, torch.ones(16, 8, dtype=torch.int8)
    assert [compile_and_run(_left, *inputs).hit for _ in range(2)] == [False, True]
    with config.patch(strict=True), pytest.raises(LeftBehindError):
        compile_and_run(_left, *inputs)


class Named(CustomGraphPass):
    """A pass of the user's with that uuid; without one when it is None."""

    def __init__(self, name: str | None) -> None:
        self.name = name

    def __call__(self, graph: torch.fx.Graph) -> None:
        pass

    def uuid(self) -> Any:
        return self.name


def _bare(graph: torch.fx.Graph) -> None:
    pass


@pytest.mark.usefixtures("empty_caches")
def test_the_users_passes_keep_their_say(model: nn.Module, x: Tensor) -> None:
    """Another uuid is another key; a pass without one turns the cache off, with ours as without."""
    assert not compile_and_run(model, x).hit
    for name, hit in (("a", False), ("a", True), ("b", False)):
        with inductor_config.patch(joint_custom_pre_pass=Named(name)):
            assert compile_and_run(model, x).hit is hit
    for users in (_bare, Named(None)):
        with inductor_config.patch(joint_custom_pre_pass=users):
            for backend, flag in (("int8_inductor", False), ("inductor", True), ("inductor", False)):
                with config.patch(register_passes=flag):
                    outcomes = [compile_and_run(model, x, backend=backend) for _ in range(2)]
                for outcome in outcomes:
                    assert outcome.fx.get("fxgraph_cache_bypass", 0) + outcome.autograd.get("autograd_cache_bypass", 0) > 0
                    assert "autograd_cache_hit" not in outcome.autograd
                    assert "fxgraph_cache_hit" not in outcome.fx
    assert compile_and_run(model, x).hit


# The key --------------------------------------------------------------------------------------------------------------------------


def test_the_uuid_of_a_slot_is_that_of_its_passes() -> None:
    own = Int8Pass()
    both = custom_pass_slot([own, Named("a")])
    assert both.uuid() == (own.uuid(), "a")
    assert custom_pass_slot([own]) is own
    assert unchain(custom_pass_slot([both, Named("b")]))[:2] == unchain(both)
    assert custom_pass_slot([own, Named(None)]).uuid() is None
    assert custom_pass_slot([own, _bare]).uuid() is None


def test_the_uuid_changes_with_every_flag() -> None:
    def uuids() -> Iterator[Any]:
        for preference, strict in itertools.product(("auto", "triton", "torch"), (False, True)):
            with config.patch(kernel_preference=preference, strict=strict):
                yield Int8Pass().uuid()
                assert Int8Pass("torch").uuid() == Int8Pass("TORCH").uuid()

    assert len(set(uuids())) == 6
    with config.patch(kernel_preference="torch"):
        assert Int8Pass().uuid() == Int8Pass("torch").uuid() != Int8Pass("triton").uuid()


def test_the_uuid_changes_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU with AVX2 alone was given calls a kernel that another may not have."""
    uuids = []
    for capability, kernel in (("AVX2", True), ("AVX2", False), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(avx2, "has_kernel", lambda kernel=kernel: kernel)
        uuids.append(Int8Pass().uuid())
    assert len(set(uuids)) == 3


def test_the_uuid_covers_every_source_file(tmp_path: Path) -> None:
    copy = tmp_path / "int8_inductor"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert sources_digest(copy) == sources_digest(PACKAGE)
    assert sources_digest(PACKAGE) in Int8Pass().uuid()
    digests = [sources_digest(copy)]
    for file in sorted(copy.rglob("*.py")):
        file.write_text(file.read_text() + "\n")
        digests.append(sources_digest(copy))
    assert len(digests) > 20
    assert len(set(digests)) == len(digests)


# Across processes -----------------------------------------------------------------------------------------------------------------

PROCESS = """
import json, sys
sys.path.insert(0, TESTS)
import interpreter
interpreter.install()
import torch, int8_inductor
from int8_inductor.explain import recording
from int8_inductor.passes import Int8Pass
from torch._dynamo.utils import counters

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).eval()
int8_inductor.quantize_(model, int8_inductor.Int8StaticActivationInt8WeightConfig())
x = torch.randn(5, 24)
int8_inductor.calibrate(model, [x], progress=False)
results = {"package": int8_inductor.__file__}
for name in ("triton", "cpp"):
    counters.clear()
    with torch._inductor.config.patch(cpu_backend=name), recording() as report, torch.no_grad():
        output = torch.compile(model, backend="int8_inductor")(x)
    torch._dynamo.reset()
    hits = counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"]
    results[name] = {"graphs": report.graphs, "hits": hits, "output": output.tolist(), "error": (output - model(x)).abs().max().item()}
print(json.dumps(results))
"""


DYNAMIC = """
import json, sys
sys.path.insert(0, TESTS)
import interpreter
interpreter.install()
import torch, int8_inductor
from int8_inductor.explain import recording
from torch._dynamo.utils import counters

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU()).eval()
int8_inductor.quantize_(model, int8_inductor.Int8DynamicActivationInt8WeightConfig())
compiled = torch.compile(model, backend="int8_inductor", dynamic=True)
rows, error = [5, 40, 70], 0.0
with recording() as report, torch.no_grad():
    for m in rows:
        x = torch.randn(m, 64)
        error = max(error, (compiled(x) - model(x)).abs().max().item())
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
kernels = [entry.kernel for entry in report.linears]
print(json.dumps({"graphs": report.graphs, "hits": hits, "error": error, "kernels": kernels}))
"""


def test_a_second_process_has_the_kernels_of_all_ranges_of_m(tmp_path: Path) -> None:
    first, second = (run_process(tmp_path, DYNAMIC, PYTHONPATH=str(PACKAGE.parent)) for _ in range(2))
    assert first["kernels"] == ["triton for M <= 16, M <= 64, above"]
    assert (first["graphs"], first["hits"], second["graphs"]) == (1, 0, 0)
    assert second["hits"] > 0
    assert max(first["error"], second["error"]) < 1e-5


def run_process(tmp_path: Path, process: str = PROCESS, **env: str) -> dict[str, Any]:
    code = f"TESTS = {str(Path(__file__).parent)!r}\n{process}"
    result: dict[str, Any] = python_json(code, tmp_path, **env)
    return result


@contextmanager
def edited(file: Path, old: str, new: str) -> Iterator[None]:
    """`file` with its one `old` replaced by `new`."""
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    try:
        yield
    finally:
        file.write_text(text)


@pytest.mark.long
def test_a_second_process_hits_and_an_edited_source_does_not(tmp_path: Path) -> None:
    """Template kernels and C++, saved by one process, run in another; a changed epilogue is compiled anew, and its own result comes out."""
    shutil.copytree(PACKAGE, tmp_path / "copy" / "int8_inductor", ignore=shutil.ignore_patterns("__pycache__"))
    env = {"PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path / "copy"), os.environ.get("PYTHONPATH"))))}
    first, second = run_process(tmp_path, **env), run_process(tmp_path, **env)
    epilogues = tmp_path / "copy" / "int8_inductor" / "epilogues.py"
    with edited(epilogues, "y = tl.where(x < 0.0, 0.0, x)", "y = tl.where(x < 0.0, 40.0, x)"):
        third = run_process(tmp_path, **env)
    assert all(Path(each["package"]).is_relative_to(tmp_path) for each in (first, second, third))
    for name in ("triton", "cpp"):
        assert [each[name]["graphs"] for each in (first, second, third)] == [1, 0, 1]
        assert [sum(each[name]["hits"]) > 0 for each in (first, second, third)] == [False, True, False]
        assert first[name]["output"] == second[name]["output"]
        assert first[name]["error"] < 1e-5
    assert third["cpp"]["output"] == first["cpp"]["output"]
    assert third["triton"]["error"] > 1
