"""Shared by all tests: the hypothesis profiles, the `gpu` mark, and Triton's interpreter in place of a GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("INT8_INDUCTOR_HYPOTHESIS_PROFILE", "ci"))


def on_gpu(config: pytest.Config) -> bool:
    """Whether this is a run of the `gpu` tests. A process has either the interpreter or a GPU: both answer to the name of Triton's driver."""
    return torch.cuda.is_available() and config.option.markexpr.strip() == "gpu"


def _compile_without_looking_on() -> None:
    """What torch does at every compilation for nobody here: a tenth of the suite's time.

    Its trace, which it leaves unwritten where nothing listens: pytest listens to every logger that does not propagate. And how long the guards
    take, measured behind a flush of the caches.
    """
    import torch._dynamo.guards  # after the interpreter is in place

    logging.getLogger("torch.__trace").propagate = True
    torch._dynamo.guards.profile_guard_manager = lambda *args: 0.0


def pytest_configure(config: pytest.Config) -> None:
    """Everything but a `-m gpu` run compiles for the CPU, through Triton's interpreter."""
    if not on_gpu(config):
        import interpreter

        interpreter.install()
    _compile_without_looking_on()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU, unless this is a run of just that. What takes long comes first: at the end one of several processes would be waited
    for.
    """
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if on_gpu(config):
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in gpu]


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a numerics test runs: "cpu" through the interpreter; with `-m gpu`, "cuda"."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """What one test compiled, no other sees."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _a_cpu_with_a_fast_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled does not depend on the machine that tests; test_int_mm.py has the other kind."""
    from int8_inductor import int_mm

    monkeypatch.setattr(int_mm, "is_slow_on_this_cpu", lambda: False)
