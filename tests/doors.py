"""What the tests of the two doors share: a model with one quantized linear, what it must compile to, and a pass that watches."""

from __future__ import annotations

from typing import Any

import torch
from support import Compiled, run
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

from int8_inductor import Int8DynamicActivationInt8WeightConfig, quantize_

ONE_LINEAR = {"linear": {"rewritten": 1}, "quant": {"feeds": 1}, "dequant": {"rewritten": 2}}


def one_linear() -> nn.Module:
    """A model with one dynamic int8 linear, 16 -> 8."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def rows() -> Tensor:
    """An input for it."""
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


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


class Seen(CustomGraphPass):
    """A pass of the user's that notes what holds while it runs: how often, with which operators in the graph, under which options."""

    def __init__(self, *options: str) -> None:
        self.options = options
        self.rewritten: list[bool] = []
        self.values: list[tuple[Any, ...]] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.rewritten.append(any(node.target is torch.ops.int8_inductor.scaled_mm.default for node in graph.nodes))
        self.values.append(tuple(inductor_config.get_config_copy()[name] for name in self.options))

    def uuid(self) -> Any:
        return "seen"


def stock(model: nn.Module, x: Tensor, **kwargs: Any) -> Compiled:
    """`run` with Inductor's own backend."""
    return run(model, x, backend="inductor", **kwargs)
