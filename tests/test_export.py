"""torch.export of quantized models, and AOTInductor packages of them that run where this library is not."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python_json
from support import fresh_compile, run
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from int8_inductor import Int8DynamicActivationInt8WeightConfig, Int8StaticActivationInt8WeightConfig, MappingType, calibrate, quantize_
from int8_inductor.explain import recording
from int8_inductor.passes import _remove_asserts

STATIC = Int8StaticActivationInt8WeightConfig
DYNAMIC = Int8DynamicActivationInt8WeightConfig
CONFIGS = [STATIC(), STATIC(act_mapping_type=MappingType.ASYMMETRIC), DYNAMIC(), DYNAMIC(act_mapping_type=MappingType.ASYMMETRIC)]


def quantized(config: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    x = torch.randn(5, 24)
    quantize_(model, config)
    if isinstance(config, STATIC):
        calibrate(model, [x], progress=False)
    return model, x


def export(model: nn.Module, x: Tensor, dynamic: bool) -> ExportedProgram:
    shapes = {"input": {0: Dim("batch", min=1, max=4096)}} if dynamic else None
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=shapes)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static shapes", "dynamic shapes"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_an_exported_program_compiles_as_the_model_does(config: Any, dynamic: bool) -> None:
    """Plain aten and plain tensors in the program; and, compiled, the same linears rewritten, quants fused and kernels as without export."""
    model, x = quantized(config)
    program = export(model, x, dynamic)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in targets if name.startswith("int8_inductor")]
    assert {name: type(tensor) for name, tensor in program.state_dict.items()} == dict.fromkeys(model.state_dict(), Tensor)
    fused = int(isinstance(config, STATIC))
    direct, exported = run(model, x), run(program.module(), x)
    for compiled in (direct, exported):
        compiled.check_report(linear={"rewritten": 2}, quant={"feeds": 2 - fused, "rewritten": fused}, dequant={"rewritten": 4})
        torch.testing.assert_close(compiled.output, model(x), rtol=1e-5, atol=1e-6)
    assert len(exported.kernels) == len(direct.kernels)
    assert [entry.epilogue for entry in exported.report.linears] == [entry.epilogue for entry in direct.report.linears]


def test_a_dynamic_batch_survives_export_and_compilation() -> None:
    model, x = quantized(STATIC())
    module = export(model, x, dynamic=True).module()
    with fresh_compile(), recording() as report, torch.no_grad():
        compiled = torch.compile(module, backend="int8_inductor", dynamic=True)
        for batch in (5, 2, 33):
            y = torch.randn(batch, 24)
            torch.testing.assert_close(compiled(y), model(y), rtol=1e-5, atol=1e-6)
    assert report.graphs == 1
    assert report.counts()["linear"]["rewritten"] == 2


PACKAGE = """
import json, torch, int8_inductor
from int8_inductor import Int8DynamicActivationInt8WeightConfig, Int8StaticActivationInt8WeightConfig, calibrate, config, quantize_
from int8_inductor.explain import recording
from int8_inductor.passes import _remove_asserts
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 40), nn.SiLU(), nn.Linear(40, 8)).eval()
x = torch.randn(5, 24)
quantize_(model, Int8StaticActivationInt8WeightConfig(), lambda module, name: name in ("0", "2"))
calibrate(model, [x], progress=False)
quantize_(model, Int8DynamicActivationInt8WeightConfig(), lambda module, name: name == "4")
with torch.no_grad(), config.patch(register_passes=True), recording() as report:
    program = torch.export.export(model, (x,), dynamic_shapes={"input": {0: torch.export.Dim("batch", min=1, max=4096)}})
    torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")
    torch.export.save(program, "program.pt2")
    inputs = [torch.randn(batch, 24) for batch in (1, 2, 5, 37)]
    torch.save([(each, model(each)) for each in inputs], "cases.pt")
print(json.dumps(report.counts()))
"""

RUN = """
import json, sys, torch
package = torch._inductor.aoti_load_package("model.pt2")
program = torch.export.load("program.pt2").module()
cases = torch.load("cases.pt", weights_only=True)
errors = [[(run(x) - want).abs().max().item() for x, want in cases] for run in (package, program)]
print(json.dumps([errors, [name for name in sys.modules if name.split(".")[0] == "int8_inductor"]]))
"""


@pytest.mark.long
def test_an_aotinductor_package_runs_without_this_library(tmp_path: Path) -> None:
    """Made with config.register_passes in plain C++, with a dynamic batch; loaded and run by a process that has never imported int8_inductor."""
    counts = python_json(PACKAGE, tmp_path)
    assert counts["linear"] == {"rewritten": 3, "feeds": 0, "float": 0, "left": 0}
    assert counts["quant"] == {"rewritten": 1, "feeds": 2, "float": 0, "left": 0}
    with zipfile.ZipFile(tmp_path / "model.pt2") as package:
        sources = [package.read(name).decode() for name in package.namelist() if name.endswith(".cpp")]
    lines = [line for source in sources for line in source.splitlines() if not line.lstrip().startswith("//")]
    # What is faster on the machine that tests.
    assert len(re.findall(r"aoti_torch_cpu_(?:_int_)?mm_out\(", "\n".join(lines))) == 3
    assert not [line for line in lines if "int8_inductor" in line]
    (package_errors, program_errors), imported = python_json(RUN, tmp_path)
    assert imported == []
    assert len(package_errors) == 4
    assert max(package_errors) < 1e-6
    assert max(program_errors) == 0


def test_only_asserts_that_the_graph_settles_are_erased() -> None:
    """An assert that a value of the graph's own makes true would count as a user of that value; one of an input, or one that fails, stays."""
    graph = torch.fx.Graph()
    given = graph.placeholder("x")
    computed = graph.call_function(torch.ops.aten.neg.default, (given,))
    given.meta["val"] = computed.meta["val"] = torch.ones(2)
    claims: list[tuple[Any, ...]] = [
        (given, None, None, torch.float32),
        (computed, None, None, torch.float32),
        (computed, None, None, torch.int8),
        (computed, [2], None, torch.float32),
        (computed, None, [1]),
        (computed, None, None),
    ]
    asserts = [graph.call_function(torch.ops.aten._assert_tensor_metadata.default, claim) for claim in claims]
    graph.output(computed)
    _remove_asserts(graph)
    assert [node in list(graph.nodes) for node in asserts] == [True, False, True, True, True, False]
