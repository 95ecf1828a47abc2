"""What a scheme makes of a matrix product in a graph: `Operand`s go in, a `Reading` comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from ...products import Product
from ..base import Path
from ..dialects import Dequant

__all__ = ["Operand", "Reading", "Scheme"]


@dataclass(frozen=True)
class Operand:
    """One side of a matrix product: `node` is [..., K] on the left, [K, N] on the right.

    dequant: what `node` shows through `path`, transparent ops; None: it is computed in floats, and `path` is empty.
    """

    node: Node
    dequant: Dequant | None
    path: Path


@dataclass(frozen=True)
class Reading:
    """A matrix product as one of PRODUCTS.

    weights: the nodes of the right operand; where a training graph needs a gradient of one of them, the product is left. emit(graph, like): the
    product's operands by name, made at the graph's insertion point; `a` may have any rank, its leading dimensions are the result's.
    """

    product: Product
    weights: tuple[Node, ...]
    emit: Callable[[Graph, Node], dict[str, Any]]


@dataclass(frozen=True)
class Scheme:
    """A name, and a reader: (left, right) -> a Reading, or None where this is another scheme's.

    Declined where it is this scheme's and cannot be rewritten. A reader makes all its checks and leaves the graph as it is.
    """

    name: str
    read: Callable[[Operand, Operand], Reading | None]
