"""A library's kernels beside the templates: what is timed, when AUTO takes them, and that the result is the same."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import run
from torch import Tensor
from torch._inductor import config as inductor_config

from int8_inductor import autotune, lowering, ops
from int8_inductor.templates import LOWERINGS, rivals
from int8_inductor.templates.problem import Problem

gpu = pytest.mark.gpu
CPU = torch.device("cpu")
SQUARE = Problem(64, 32, 48, 48, tma=True, a_bytes=1, static_m=64)


def test_int_mm_runs_on_operands_that_it_takes() -> None:
    once = rivals.int_mm(SQUARE, torch.int8, torch.bfloat16, CPU)
    assert once is not None
    once()
    for refused in ({"m": 16}, {"n": 33}, {"k": 50}, {"tma": False}):
        assert rivals.int_mm(dataclasses.replace(SQUARE, **refused), torch.int8, torch.bfloat16, CPU) is None


def test_an_expanded_product_runs_from_where_it_can_pay() -> None:
    few, many = (dataclasses.replace(SQUARE, m=m, a_bytes=2) for m in (rivals.EXPANDED_ROWS - 1, rivals.EXPANDED_ROWS))
    assert rivals.expanded_mm(few, torch.bfloat16, torch.bfloat16, CPU) is None
    once = rivals.expanded_mm(many, torch.bfloat16, torch.float16, CPU)
    assert once is not None
    once()


def test_the_generators_are_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    rivals.int_mm(SQUARE, torch.int8, torch.bfloat16, CPU)
    rivals.expanded_mm(dataclasses.replace(SQUARE, m=200), torch.bfloat16, torch.bfloat16, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_which_products_have_one() -> None:
    have = {name: each.rival for name, each in LOWERINGS.items() if each.rival is not None}
    assert have == {"scaled_mm": rivals.int_mm, "weight_int8_mm": rivals.expanded_mm}


def kernel(**fields: Any) -> Any:
    """What is_beaten asks of a Kernel."""
    box = SimpleNamespace(get_dtype=lambda: torch.int8)
    layout = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda", 0))
    given = {"name": "a product", "kind": ("a kind",), "layout": layout, "problem": SQUARE, "inputs": [box]}
    return SimpleNamespace(**given | fields)


@pytest.mark.parametrize(
    ("winner_ms", "rival_ms", "want"), [(1.0, 0.9, True), (1.0, 0.96, False), (1.0, 1.1, False), (None, 0.1, False), (1.0, None, False)]
)
def test_the_faster_by_the_handicap_is_taken(winner_ms: float | None, rival_ms: float | None, want: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """None: nothing was timed, or the library refuses. What was found stands for the next of the kind."""
    calls: list[Any] = []
    for name in ("_WINNERS", "_TIMES", "_BEATEN"):
        monkeypatch.setattr(autotune, name, {})
    if winner_ms is not None:
        autotune._TIMES["a kind",] = winner_ms
    monkeypatch.setattr(autotune, "_winner", lambda kernel: None)
    monkeypatch.setattr(autotune, "_clock_recorded", lambda run: calls.append(run) or rival_ms)

    def rival(*given: Any) -> Any:
        assert given == (SQUARE, torch.int8, torch.bfloat16, torch.device("cuda", 0))
        return None if rival_ms is None else lambda: None

    assert [autotune.is_beaten(kernel(), rival) for _ in range(2)] == [want] * 2
    assert len(calls) == (winner_ms is not None and rival_ms is not None)
    assert not autotune.is_beaten(kernel(problem=dataclasses.replace(SQUARE, static_m=None), kind="other"), rival)
    on_cpu = SimpleNamespace(dtype=torch.bfloat16, device=CPU)
    assert not autotune.is_beaten(kernel(layout=on_cpu, kind="other"), rival)


def test_one_that_does_not_fit_into_memory_is_not_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("_WINNERS", "_BEATEN"):
        monkeypatch.setattr(autotune, name, {})
    monkeypatch.setattr(autotune, "_TIMES", {("a kind",): 1.0})
    monkeypatch.setattr(autotune, "_winner", lambda kernel: None)

    def too_large(*given: Any) -> Any:
        raise torch.OutOfMemoryError

    with caplog.at_level("INFO", "int8_inductor"):
        assert not autotune.is_beaten(kernel(), too_large)
    assert "a product: no memory to time too_large beside the templates" in caplog.text


def operands(device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-127, 128, (rows, 64), dtype=torch.int8, generator=generator) for rows in (40, 48))
    return tuple(each.to(device) for each in (a, b, torch.rand(40, 1, generator=generator), torch.rand(48, generator=generator)))


@pytest.mark.parametrize(("preference", "taken"), [("auto", True), ("triton", False)])
def test_auto_alone_takes_it(preference: str, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "is_beaten", lambda *given: True)

    def fn(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return ops.scaled_mm(a, b, x, y, activation="relu", kernel_preference=preference)

    given = operands("cpu")
    compiled = run(fn, *given)
    assert compiled.has("_int_mm(") is taken
    assert compiled.has("triton_tem_") is not taken
    torch.testing.assert_close(compiled.output, fn(*given), rtol=1e-6, atol=0)


@gpu
@pytest.mark.parametrize(("handicap", "taken"), [(0.0, True), (1e9, False)])
@pytest.mark.parametrize("graphs", [False, True])
def test_what_is_faster_runs(handicap: float, taken: bool, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both products, where the library's kernels count as nothing, and as no match."""
    monkeypatch.setattr(autotune, "LIBRARY_HANDICAP", handicap)
    for name in ("_WINNERS", "_TIMES", "_BEATEN"):
        monkeypatch.setattr(autotune, name, {})
    a, b, x, y = operands("cuda")
    wide = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16)

    def fn(a: Tensor, b: Tensor, x: Tensor, y: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        return ops.scaled_mm(a, b, x, y, activation="relu"), torch.ops.int8_inductor.weight_int8_mm(wide, b, y, out_dtype=torch.bfloat16)

    compiled = run(fn, a, b, x, y, wide, options={"triton.cudagraphs": graphs})
    assert compiled.has("extern_kernels._int_mm(") is taken
    assert compiled.has("extern_kernels.mm(") is taken
    assert any(each.startswith("triton_tem_") for each in compiled.kernels) is not taken
    for got, want in zip(compiled.output, fn(a, b, x, y, wide), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2 if got.dtype == torch.bfloat16 else 1e-5, atol=1e-1 if got.dtype == torch.bfloat16 else 0)


# Clocks ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", [False, True])
def test_what_cuda_graphs_will_launch_is_timed_so(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once to load it, once to record it; what is timed is the replay."""
    steps: list[str] = []

    class Graph:
        def replay(self) -> None:
            steps.append("replay")

        def reset(self) -> None:
            steps.append("reset")

    @contextlib.contextmanager
    def recording(graph: Graph, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert (stream.name, capture_error_mode) == ("recorded", "thread_local")
        steps.append("record")
        yield

    @contextlib.contextmanager
    def on(stream: Any) -> Iterator[None]:
        steps.append(stream.name)
        yield

    def make() -> Any:
        steps.append("make")
        return lambda: steps.append("run")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(name="recorded", wait_stream=lambda stream: steps.append(f"after {stream}")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the one before")
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(autotune, "_clock", lambda run: run() or 0.25)
    with inductor_config.patch({"triton.cudagraphs": graphs}):
        assert autotune._clock_recorded(make) == 0.25
    in_graph = ["after the one before", "recorded", "make", "run", "record", "run", "replay", "reset"]
    assert steps == (in_graph if graphs else ["make", "run"])


@gpu
def test_a_recorded_launch_takes_as_long() -> None:
    """A graph that recorded nothing would be over in a microsecond."""
    source = torch.randn(2**26, device="cuda")
    target = torch.empty_like(source)
    direct = autotune._clock(lambda: target.copy_(source))
    with inductor_config.patch({"triton.cudagraphs": True}):
        assert 0.5 * direct < autotune._clock_recorded(lambda: lambda: target.copy_(source)) < 2 * direct


@gpu
def test_kernels_of_inductor_are_recorded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """All candidates of a product take in a graph what they take launched one by one."""
    pairs: list[tuple[float, float]] = []
    recorded = autotune._clock_recorded

    def both(make: Any) -> float:
        pairs.append((recorded(make), autotune._clock(make())))
        return pairs[-1][0]

    monkeypatch.setattr(autotune, "_clock_recorded", both)
    a, b = (torch.randint(-128, 128, (4096 + 128, 4096), dtype=torch.int8, device="cuda") for _ in range(2))
    one = torch.ones(1, device="cuda")
    compiled = run(lambda a, b: ops.scaled_mm(a, b, one, one, kernel_preference="triton"), a, b, mode="reduce-overhead")
    assert torch.equal(compiled.output, torch._int_mm(a, b.t()).float())
    assert len(pairs) >= 4
    for graph_ms, direct_ms in pairs:
        assert 0.7 * direct_ms < graph_ms < 1.3 * direct_ms
