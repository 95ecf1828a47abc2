"""What happens to the accumulator after scales and bias, before the store: one object each.

An `Epilogue` is a name, an eager function and Triton text. The eager function is the definition; it is also what the matcher looks for (traced
and decomposed as Inductor does it) and what the CPU path compiles. The text is what a template's tail computes in float32.
To add one, write one object and list it in EPILOGUES: operator, passes, templates, explain and tests loop over that list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EPILOGUES", "Epilogue", "PostOp"]


@dataclass(frozen=True)
class PostOp:
    """What oneDNN's linear on a CPU calls an activation: name and algorithm. error: the most by which its float32 result is off, where relative
    precision does not bound that. least: the least value of its results.
    """

    name: str
    algorithm: str = "none"
    error: float = 0.0
    least: float = -math.inf


@dataclass(frozen=True)
class Epilogue:
    """A pointwise activation that a kernel applies to its float32 result.

    name: the operator's `activation` argument.
    eager: Tensor -> Tensor of the same shape and dtype; the definition.
    triton: Triton statements that set the float32 tile `y` from the float32 tile `x`.
    triton_fast: the same for a result that is stored with less precision than float32, where something cheaper is exact enough; or ''.
    spellings: other eager functions that compute the same and that models write by hand; matched, never called.
    onednn: the same as a part of oneDNN's linear, or None.
    """

    name: str
    eager: Callable[[Tensor], Tensor]
    triton: str
    triton_fast: str = ""
    spellings: tuple[Callable[[Tensor], Tensor], ...] = ()
    onednn: PostOp | None = None


def _gelu_new(x: Tensor) -> Tensor:
    """The tanh GELU as transformers' NewGELUActivation writes it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_erf_by_hand(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _silu_by_hand(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _identity(x: Tensor) -> Tensor:
    return x


def _horner(coefficients: tuple[float, ...], variable: str) -> str:
    text = repr(coefficients[-1])
    for each in coefficients[-2::-1]:
        text = f"({text}) * {variable} + {each!r}"
    return text


# fast_dividef (2 ulp, where the divisor is below 2^126) is a reciprocal and a product; Triton's `/` guards its range with three instructions more.
_SQRT_HALF = math.sqrt(0.5)
_LOG2_E = math.log2(math.e)

# gelu(x) = x / (1 + 2^(-x Q(|x|))): coefficients and error from benchmarks/fit_gelu.py; within 1.6e-5 everywhere, and relatively within 1.3e-4 down
# to |gelu| = 1e-6: a fifteenth of bfloat16's rounding, half of float16's, a thousandth of an int8 step where 127 steps span 2. No erf, no
# cancellation on the negative side, and the exponential and the division run on the special-function unit. Degree 6, not more: at K = 768 the GELU
# is a quarter of the kernel's time, and every degree is an instruction an element.
GELU_FIT = (
    2.2991229205003796, 0.016863820139353967, 0.07446517006339234, 0.024465150191671205, -0.009266385942183512, 0.0011809176164352339,
    -5.473799714782752e-05,
)  # fmt: skip
GELU_FIT_LIMIT = 5.5

NONE = Epilogue("none", _identity, "y = x", onednn=PostOp("none"))
GELU = Epilogue(
    "gelu",
    F.gelu,
    f"y = 0.5 * x * (1.0 + libdevice.erf(x * {_SQRT_HALF!r}))",
    f"""u = tl.minimum(tl.abs(x), {GELU_FIT_LIMIT})
y = libdevice.fast_dividef(x, 1.0 + tl.exp2(-x * ({_horner(GELU_FIT, "u")})))""",
    spellings=(_gelu_erf_by_hand,),
    onednn=PostOp("gelu", error=1e-6, least=-0.17),
)
# 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u)), exactly, and without cancellation for negative u.
GELU_TANH = Epilogue(
    "gelu_tanh",
    lambda x: F.gelu(x, approximate="tanh"),
    f"y = libdevice.fast_dividef(x, 1.0 + tl.exp2({-2.0 * _LOG2_E * math.sqrt(2.0 / math.pi)!r} * (x + 0.044715 * x * x * x)))",
    spellings=(_gelu_new,),
    onednn=PostOp("gelu", "tanh", error=1e-6, least=-0.1701),
)
# NaN compares false, so it passes through, as in eager.
RELU = Epilogue("relu", F.relu, "y = tl.where(x < 0.0, 0.0, x)", onednn=PostOp("relu", least=0.0))
SILU = Epilogue(
    "silu",
    F.silu,
    f"y = libdevice.fast_dividef(x, 1.0 + tl.exp2({-_LOG2_E!r} * x))",
    spellings=(_silu_by_hand,),
    onednn=PostOp("swish", least=-0.2785),
)

EPILOGUES: dict[str, Epilogue] = {e.name: e for e in (NONE, GELU, GELU_TANH, RELU, SILU)}
