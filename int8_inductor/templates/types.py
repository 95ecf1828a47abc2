"""How a product lowers: its main loops, which of its operands they read, and what is compiled where no template runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..onednn.prepacked import Prepacked
from ..products import Product
from .problem import Device, Problem
from .rivals import Rival

__all__ = ["Lowering"]


def no_groups(operands: Mapping[str, Any]) -> tuple[int, ...]:
    """`Lowering.groups` of a product without any."""
    return ()


def never(problem: Problem, device: Device) -> bool:
    """`Lowering.expands` of a product whose templates are always faster."""
    return False


def not_prepacked(node: Node, a: Any, rows: int | None) -> None:
    """`Lowering.prepacked` of a product for which no library has a kernel."""


@dataclass(frozen=True)
class Lowering:
    """What lowering.py needs to know of a product.

    templates: modules, each a main loop. loop: names of the operands, besides a and b, that the main loops read: whole, in this order, after A and B.
    The others are named as operands of the Tail are, which applies them. eager: the product's eager definition on what eager_kernel(problem, device)
    names, compiled for KernelPreference.TORCH, and for AUTO where expands(problem, device) says so. groups(operands): Problem.groups, from the
    product's operands by name, as Inductor's boxes and numbers. rival: the library's kernels that AUTO times against the templates, and runs where
    they are faster; see rivals.py. prepacked(node, a, rows): what a library computes of a frozen weight and the box a, instead of `eager` or before
    what is left of it.
    """

    product: Product
    templates: tuple[Any, ...]
    eager: Callable[..., Tensor]
    eager_kernel: Callable[[Problem, torch.device], str]
    loop: tuple[str, ...] = ()
    groups: Callable[[Mapping[str, Any]], tuple[int, ...]] = no_groups
    expands: Callable[[Problem, Device], bool] = never
    rival: Rival | None = None
    prepacked: Callable[[Node, Any, int | None], Prepacked | None] = not_prepacked
