"""What a product is to the framework, and the checks that products share.

A product is y = a @ b.T of a quantized weight b, with its scales: a schema, checks, and an eager definition. Bias, activation and the way the result
is stored are the framework's (ops.py), the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

__all__ = ["Product", "agree", "check_vector"]


@dataclass(frozen=True)
class Product:
    """name: of its operator in torch.ops.int8_inductor. operands: its own tensors and numbers, as schema text; "Tensor a, Tensor b" come first.

    check(**operands) -> (M, N), the sizes of the result; TypeError or ValueError, naming the argument, what came and what is allowed.
    eager(**operands) -> float32 [M, N]: all scales applied, no bias. It defines the product; the operands have been checked.
    """

    name: str
    operands: str
    check: Callable[..., tuple[Any, Any]]
    eager: Callable[..., Tensor]

    @property
    def operator(self) -> torch._ops.OpOverload:
        """The operator that stores floats, or int8 with scales that are given."""
        return getattr(torch.ops.int8_inductor, self.name).default  # type: ignore[no-any-return]

    @property
    def block_quant(self) -> torch._ops.OpOverload:
        """The operator that stores int8 with a scale that it chooses for each row and block of columns."""
        return getattr(torch.ops.int8_inductor, f"{self.name}_block_quant").default  # type: ignore[no-any-return]


def agree(name: str, actual: Any, wanted: Any) -> bool:
    """Whether two sizes of product `name` agree. Where one depends on data and nothing tells yet, they have to: the compiled code asserts it."""
    if guard_or_false(actual == wanted):
        return True
    if not guard_or_true(actual == wanted):
        return False
    torch._check(actual == wanted, lambda: f"{name}: sizes {actual} and {wanted} must agree")
    return True


def check_vector(
    product: str, name: str, t: Tensor | None, size: Any, *, column: bool, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise unless `t` is None, one element, [size] or, where `column`, [size, 1], of one of `dtypes` and on `device`."""
    if t is None:
        return
    if t.dtype not in dtypes:
        raise TypeError(f"{product}: {name} must be one of {', '.join(map(str, dtypes))}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{product}: {name} must be on {device}, the device of a, got {t.device}")
    if t.ndim <= 2 and guard_or_false(t.numel() == 1):
        return
    vector = (t.ndim == 1 or (t.ndim == 2 and column and agree(product, t.shape[1], 1))) and agree(product, t.shape[0], size)
    if not vector:
        raise ValueError(f"{product}: {name} must have 1 element or shape [{size}]{f' or [{size}, 1]' if column else ''}, got {list(t.shape)}")
