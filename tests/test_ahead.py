"""Compiling ahead: what is handed to the workers when a graph's first product is lowered is what its products are then lowered to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run
from torch import Tensor, nn
from torch._inductor.virtualized import V

from int8_inductor import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, ahead, autotune, lowering, quantize_, reference


class Workers:
    """Stands for Inductor's compile workers on a machine without a GPU: remembers what it is given, and compiles nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[str] = []
        self.lowered: list[str] = []
        self.waited = 0
        compile_all_ahead, tune = ahead.compile_all_ahead, autotune.autotune

        def as_if_on_a_gpu(device: torch.device) -> None:
            inputs = dict(V.graph.graph_inputs)
            compile_all_ahead(torch.device("cuda"))
            assert V.graph.graph_inputs == inputs, "stand-ins were left behind"

        def tuned(kernel: autotune.Kernel) -> Any:
            self.lowered += [self.source(choice) for part in kernel.parts() for choice in part.choices(part.candidates())]
            return tune(kernel)

        def wait() -> None:
            self.waited += 1

        monkeypatch.setattr(lowering, "compile_all_ahead", as_if_on_a_gpu)
        monkeypatch.setattr(lowering, "autotune", tuned)
        monkeypatch.setattr(autotune, "wait_for_compile_workers", wait)
        monkeypatch.setattr(autotune, "start_compiling", lambda choice: self.given.append(self.source(choice)))

    @staticmethod
    def source(choice: Any) -> str:
        return Path(choice.bmreq.module_path).read_text()


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    return Workers(monkeypatch)


class Model(nn.Module):
    """Five linears of three kinds, one of which stores int8 in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(48, 128), nn.Linear(128, 48), nn.Linear(48, 128)
        self.fourth, self.last = nn.Linear(128, 48, bias=False), nn.Linear(48, 128)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.second(nn.functional.gelu(self.first(x)))
        return reference.quantize_blocks(self.last(self.fourth(self.third(y))), 128)


@pytest.mark.parametrize("dynamic", [False, True])
def test_every_kind_is_handed_over_once_as_it_is_lowered(workers: Workers, dynamic: bool) -> None:
    torch.manual_seed(0)
    model = Model()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with torch.no_grad():
        run(model, torch.randn(6, 48), dynamic=dynamic)
    kernels = 5 * (5 if dynamic else 1)  # a candidate for each range of M
    assert workers.waited == 1
    assert len(workers.lowered) == kernels
    assert len(workers.given) == kernels
    assert set(workers.lowered) == set(workers.given)


def test_templates_for_few_rows_are_handed_over_before_m_is_asked(workers: Workers) -> None:
    """Weight-only linears with a symbolic M: the calls for few rows are lowered in graphs of their own (either.py), which hand nothing over again."""
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).bfloat16()
    quantize_(model, Int4WeightOnlyConfig(group_size=32))
    with torch.no_grad():
        run(model, torch.randn(6, 64).bfloat16(), dynamic=True)
    assert workers.waited == 1
    assert len(workers.given) == len(workers.lowered) == 2 * 3  # for M <= 16, 64 and 191

    def known(sources: list[str]) -> set[str]:
        """Less what is said of alignment: an input of a graph of its own has none that is known, on a CPU."""
        return {re.sub(r"^triton_meta=.+$", "", source, flags=re.M) for source in sources}

    assert known(workers.lowered) == known(workers.given)


def test_a_graph_for_torch_kernels_hands_nothing_over(workers: Workers) -> None:
    model = nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 16))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with torch.no_grad():
        run(model, torch.randn(6, 48), options={"kernel_preference": "torch"})
    assert not workers.given
    assert not workers.waited


def test_a_winner_that_is_known_is_not_handed_over(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_WINNERS", {})
    model = nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 48))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())

    def remember(kernel: autotune.Kernel) -> Any:
        autotune._WINNERS[kernel.kind] = kernel.candidates()[0]
        return autotune.autotune(kernel)

    monkeypatch.setattr(lowering, "autotune", remember)
    with torch.no_grad():
        run(model, torch.randn(6, 48))
        assert len(workers.given) == 2
        run(model, torch.randn(6, 48))
    assert len(workers.given) == 2
