"""Residual sums of frozen graphs on a CPU: added by oneDNN's kernel where that overwrites nothing that is read later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prepacked_cases import calls, frozen, prepacks, taken  # noqa: F401 - a fixture that is used by itself
from support import Compiled
from test_prepacked_models import CONFIGS, quantized
from torch import Tensor, nn

from int8_inductor.onednn.forms import FORMS, Form

ADDED = "'sum'"


class Block(nn.Module):
    """Two linears beside a stream: the first stands before the norm, the second after it."""

    def __init__(self, join: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 96, dtype=dtype), nn.Linear(96, 48, dtype=dtype)
        self.norm = nn.LayerNorm(48, dtype=dtype)
        self.join = join

    def branch(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return down

    def forward(self, x: Tensor) -> Any:
        return self.join(self, x * 1.5)


def check(join: Callable[..., Tensor], config: Any = CONFIGS[0], x: Tensor | None = None) -> Compiled:
    """The outputs against eager's, which quantizes the same values, and the input as it was."""
    torch.manual_seed(0)
    x = torch.randn(3, 20, 48) if x is None else x
    before = x.clone()
    model = quantized(Block(join, x.dtype), config, x)
    compiled = frozen(model, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled.output, model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    return compiled


def added(compiled: Compiled) -> int:
    return sum(ADDED in call for call in calls(compiled))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: str(form.dtype))
@pytest.mark.parametrize("config", CONFIGS[:2], ids=["static", "asymmetric"])
def test_sums_are_added(config: Any, form: Form) -> None:
    """One after another into the same buffer; what follows reads it alone."""

    def join(block: Block, x: Tensor) -> Tensor:
        x = block.branch(x) + x
        x = x + block.branch(x)
        return block.norm(x)

    with taken(form):
        compiled = check(join, config)
    assert added(compiled) == 2
    assert str(compiled.report).count("added to the residual") == 2
    assert len(calls(compiled)) == 4


def test_dynamic_scales_are_not_added() -> None:
    """The kernel gives sums alone."""
    assert added(check(lambda block, x: block.norm(x + block.branch(x)), CONFIGS[2])) == 0


LEFT_ALONE: dict[str, Callable[[Block, Tensor], Any]] = {
    "the stream is read later": lambda block, x: block.norm(x + block.branch(x)) * x,
    "a view of it is read later": lambda block, x: (lambda view: block.norm(x + block.branch(x)) + view)(x[:1]),
    "part of it is returned": lambda block, x: (block.norm(x + block.branch(x)), x[:, 3]),
    "the product is read twice": lambda block, x: (lambda y: block.norm(x + y) + y)(block.branch(x)),
    "with a factor": lambda block, x: block.norm(torch.add(x, block.branch(x), alpha=2)),
    "broadcast": lambda block, x: block.norm(x[:1] + block.branch(x)),
    "by itself": lambda block, x: (lambda y: block.norm(y + y))(block.branch(x)),
    "a sum that is returned": lambda block, x: x + block.branch(x),
    "a sum of which a view is returned": lambda block, x: (x + block.branch(x)).reshape(-1, 48),
    "transposed": lambda block, x: block.norm((x.transpose(0, 1) + block.branch(x.transpose(0, 1).contiguous())).transpose(0, 1)),
}


@pytest.mark.parametrize("join", LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_not_added(join: Callable[..., Any]) -> None:
    assert added(check(join)) == 0


def test_a_sum_that_is_written_into_a_buffer_is_not_added() -> None:
    """Inductor would have the stream computed in the buffer's memory."""

    class Stateful(Block):
        def __init__(self) -> None:
            super().__init__(lambda: None)
            self.register_buffer("state", torch.zeros(60, 48))

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.5
            self.state.copy_(x + self.branch(x))
            out: Tensor = self.norm(self.state + 1)
            return out

    torch.manual_seed(0)
    x = torch.randn(60, 48)
    model: Any = quantized(Stateful(), CONFIGS[0], x)
    compiled = frozen(model, x)
    state = model.state.clone()
    with torch.no_grad():
        torch.testing.assert_close(compiled.output, model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, model.state, rtol=1e-4, atol=1e-4)
    assert added(compiled) == 0


def test_an_input_is_not_overwritten() -> None:
    class Direct(Block):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(x + self.branch(x))
            return out

    torch.manual_seed(0)
    x = torch.randn(3, 20, 48)
    before = x.clone()
    compiled = frozen(quantized(Direct(lambda: x), CONFIGS[0], x), x)
    assert torch.equal(x, before)
    assert added(compiled) == 0


def test_a_constant_is_not_overwritten() -> None:
    class Learned(Block):
        def __init__(self) -> None:
            super().__init__(lambda: None)
            self.tokens = nn.Parameter(torch.randn(3, 20, 48))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(self.tokens + self.branch(x))
            return out

    torch.manual_seed(0)
    x = torch.randn(3, 20, 48)
    model = quantized(Learned(), CONFIGS[0], x)
    compiled = frozen(model, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled.output, model(x), rtol=1e-4, atol=1e-4)
    assert added(compiled) == 0


def test_bfloat16_is_not_added() -> None:
    """It would be rounded once where the eager definition rounds twice."""
    torch.manual_seed(0)
    x = torch.randn(3, 20, 48, dtype=torch.bfloat16)
    model = quantized(Block(lambda block, x: block.norm(x + block.branch(x)), torch.bfloat16), CONFIGS[0], x)
    assert added(frozen(model, x)) == 0
