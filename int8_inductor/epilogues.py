"""What happens to the accumulator after scales and bias, before the store: one object each.

An `Epilogue` is a name, an eager function and a Triton expression. The eager function is the definition; it is also what the matcher looks
for (traced and decomposed as Inductor does it) and what the CPU path compiles. The expression is what a template's tail computes in float32.
To add one, write one object and list it in EPILOGUES: operator, passes, templates, explain and tests loop over that list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EPILOGUES", "Epilogue"]


@dataclass(frozen=True)
class Epilogue:
    """A pointwise activation that a scaled_mm kernel applies to its float32 result.

    name: the operator's `activation` argument.
    eager: Tensor -> Tensor of the same shape and dtype; the definition.
    triton: a Triton expression of the float32 tile `x`.
    spellings: other eager functions that compute the same and that models write by hand; matched, never called.
    """

    name: str
    eager: Callable[[Tensor], Tensor]
    triton: str
    spellings: tuple[Callable[[Tensor], Tensor], ...] = ()


def _gelu_new(x: Tensor) -> Tensor:
    """The tanh GELU as transformers' NewGELUActivation writes it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_erf_by_hand(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _silu_by_hand(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _identity(x: Tensor) -> Tensor:
    return x


_SQRT_HALF = math.sqrt(0.5)
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)

NONE = Epilogue("none", _identity, "x")
GELU = Epilogue(
    "gelu",
    F.gelu,
    f"0.5 * x * (1.0 + libdevice.erf(x * {_SQRT_HALF!r}))",
    spellings=(_gelu_erf_by_hand,),
)
GELU_TANH = Epilogue(
    "gelu_tanh",
    lambda x: F.gelu(x, approximate="tanh"),
    f"0.5 * x * (1.0 + libdevice.tanh({_SQRT_2_OVER_PI!r} * (x + 0.044715 * x * x * x)))",
    spellings=(_gelu_new,),
)
# NaN compares false, so it passes through, as in eager.
RELU = Epilogue("relu", F.relu, "tl.where(x < 0.0, 0.0, x)")
SILU = Epilogue("silu", F.silu, "x / (1.0 + tl.exp(-x))", spellings=(_silu_by_hand,))

EPILOGUES: dict[str, Epilogue] = {e.name: e for e in (NONE, GELU, GELU_TANH, RELU, SILU)}
