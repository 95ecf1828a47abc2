"""What every pass needs: reading nodes, making nodes with a value, transparent paths, and the ledger of what was found and declined."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._inductor.pattern_matcher import Match
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import ops, reference
from ..explain import FEEDS, FLOAT, LEFT, REWRITTEN, TAG, Entry, Report

aten, prims = torch.ops.aten, torch.ops.prims

VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


class Declined(Exception):
    """A pattern was found but cannot be rewritten safely; the message is the reason. Raised before the graph is touched."""


def val(node: Node) -> Tensor:
    """The fake tensor that `node` computes."""
    value: Tensor = node.meta["val"]
    return value


def same(x: Any, y: Any) -> bool:
    """Whether two sizes are known to be equal, without a guard."""
    return bool(statically_known_true(x == y))


def same_shape(x: Sequence[Any], y: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal, without a guard."""
    return len(x) == len(y) and all(same(i, j) for i, j in zip(x, y, strict=True))


def argument(node: Node, name: str) -> Any:
    """The argument `name` of an operator call, passed by position, by keyword, or left to its default."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, each in enumerate(node.target._schema.arguments):
        if each.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[position] if position < len(node.args) else each.default_value
    raise KeyError(name)


def is_exact(match: Match) -> bool:
    """Whether the nodes of a match compute what its pattern says: Inductor's matcher skips keywords that a pattern lacks, as alpha of add and sub."""
    return all(node.kwargs.get("alpha", 1) == 1 for node in match.nodes)


def make(graph: Graph, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call at the graph's insertion point, with its fake value, attributed to the source line of `like`."""
    node = graph.call_function(target, args, kwargs)
    fake_args, fake_kwargs = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    mode = detect_fake_mode([t for t in torch.utils._pytree.tree_leaves((fake_args, fake_kwargs, val(like))) if isinstance(t, Tensor)])
    assert mode is not None
    with mode:
        node.meta["val"] = target(*fake_args, **fake_kwargs)
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    if isinstance(target, torch._ops.OpOverload):
        node.meta["original_aten"] = target
    return node


def is_float_cast(node: Node) -> bool:
    """Whether `node` casts between the float dtypes that a linear may have."""
    if node.target is not prims.convert_element_type.default:
        return False
    source = node.args[0]
    return isinstance(source, Node) and val(source).dtype in reference.OUT_DTYPES and node.args[1] in reference.OUT_DTYPES


def keeps_last(node: Node) -> bool | None:
    """None when `node` is not a transparent op; else whether it leaves the last dimension where and as it is."""
    if is_float_cast(node):
        return True
    if node.target is aten.clone.default:
        return True
    source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if source is None:
        return None
    if node.target in VIEWS or node.target is aten.expand.default:
        return bool(val(source).ndim and val(node).ndim and same(val(source).shape[-1], val(node).shape[-1]))
    args: Any = node.args
    if node.target is aten.permute.default:
        dims: list[int] = list(args[1])
        return dims[-1] % len(dims) == len(dims) - 1
    if node.target is aten.transpose.int:
        last = val(source).ndim - 1
        return last not in (args[1] % val(source).ndim, args[2] % val(source).ndim)
    if node.target is aten.unsqueeze.default:
        return bool(args[1] % val(node).ndim != val(node).ndim - 1)
    return None


@dataclass
class Path:
    """Transparent ops (views, permutes, float casts) between two nodes, first op first."""

    nodes: list[Node] = field(default_factory=list)
    keeps_last: bool = True

    def shapes_only(self) -> list[Node]:
        """The ops that move data about, casts and clones left out."""
        return [n for n in self.nodes if not is_float_cast(n) and n.target is not aten.clone.default]

    def replay(self, graph: Graph, value: Node, *, width: int | None = None) -> Node:
        """The same data movement on another value; `width`: what stands for the last dimension there (1 for a per-row scale)."""
        for node in self.shapes_only():
            rest: list[Any] = list(node.args[1:])
            target = node.target
            if node.target in VIEWS or node.target is aten.expand.default:
                shape = list(rest[0])
                rest = [shape if width is None else [*shape[:-1], width]]
                target = target if target is aten.expand.default else aten.reshape.default
            value = make(graph, node, target, value, *rest)
        return value


def walk_back(node: Node) -> tuple[Node, Path]:
    """From `node` back over transparent ops to the value that they move."""
    path = Path()
    while (keeps := keeps_last(node)) is not None:
        source = node.args[0]
        assert isinstance(source, Node)
        path.nodes.insert(0, node)
        path.keeps_last &= keeps
        node = source
    return node, path


def shared(producer: Node, path: Path) -> Node | None:
    """The first node from `producer` along `path`, its end left out, that something off the path uses too."""
    for node in [producer, *path.nodes][: len(path.nodes)]:
        if len(node.users) > 1:
            return node
    return None


def used_only_by(node: Node, allowed: Iterable[Node]) -> bool:
    """Whether all users of `node` are among `allowed`."""
    return set(node.users) <= set(allowed)


@dataclass
class Ledger:
    """What one graph holds and what was decided: filled by the passes, turned into a Report at the end."""

    order: dict[str, int] = field(default_factory=dict)
    linears: dict[str, Entry] = field(default_factory=dict)
    quants: dict[Node, Entry] = field(default_factory=dict)
    dequants: dict[Node, Entry] = field(default_factory=dict)

    def linear(self, node: Node, status: str, reason: str = "") -> None:
        """Record a matrix product."""
        self.linears[node.name] = Entry("linear", node.name, status, reason, source=source_of(node))

    def found_quant(self, node: Node, reason: str) -> None:
        """Record a float -> int8 conversion; `reason` stands if nothing takes it up."""
        self.quants[node] = Entry("quant", node.name, LEFT, reason, source=source_of(node))

    def found_dequant(self, node: Node, reason: str) -> None:
        """Record an int8 -> float conversion; `reason` stands if it survives."""
        self.dequants[node] = Entry("dequant", node.name, LEFT, reason, source=source_of(node))

    def settle(self, graph: Graph) -> Report:
        """The report, once all passes ran and dead code is gone."""
        alive = set(graph.nodes)
        for node, entry in self.dequants.items():
            if node not in alive:
                entry.status, entry.reason = REWRITTEN, ""
            elif not entry.reason:
                entry.reason = self._why_alive(node)
        for node, entry in self.quants.items():
            if node not in alive:
                entry.status, entry.reason = REWRITTEN, ""
            elif _feeds_product(node):
                entry.status = FEEDS
        entries = [*self.linears.values(), *self.quants.values(), *self.dequants.values()]
        return Report(sorted(entries, key=lambda entry: self.order[entry.name]))

    def _why_alive(self, dequant: Node) -> str:
        ends = _ends(dequant)
        for end in ends:
            if (linear := self.linears.get(end.name)) is not None and linear.status == LEFT:
                return f"{end.name}, which reads it, was left"
        return f"its float value has another user: {ends[0].name}"


def _ends(node: Node) -> list[Node]:
    """The nodes in which uses of `node`, through transparent ops and slices, end."""
    pending, ends = list(node.users), []
    while pending:
        user = pending.pop(0)
        if keeps_last(user) is None and user.target is not aten.slice.Tensor:
            ends.append(user)
        else:
            pending.extend(user.users)
    return ends


def _feeds_product(quant: Node) -> bool:
    """Whether every use of an int8 value, through views, ends as an operand of one of our operators."""
    ends = _ends(quant)
    return bool(ends) and all(end.target in ops.OPERATORS for end in ends)


_FRAME_LOCAL = re.compile(r"^[LG]\['\w+'\]\.?")
"""How Dynamo writes the variable that holds the model, before the path of a module in it."""


def source_of(node: Node) -> str:
    """Where the model has it: the module's path, or else the line of code."""
    modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    if modules:
        return _FRAME_LOCAL.sub("", str(modules[-1]))
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    return lines[-1].split(", in ")[0].removeprefix("File ") if lines else ""


def emit(graph: Graph, like: Node, name: str, target: Any, arguments: dict[str, Any]) -> Node:
    """A call of one of our operators with `arguments` by name, tagged with the linear that it computes."""
    schema = target._schema.arguments
    positional = [arguments.get(each.name) for each in schema if not each.kwarg_only]
    keywords = {each.name: arguments[each.name] for each in schema if each.kwarg_only and arguments.get(each.name) is not None}
    node = make(graph, like, target, *positional, **keywords)
    node.meta[TAG] = name
    return node


def arguments_of(node: Node) -> dict[str, Any]:
    """All arguments of a call of one of our operators, by name."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return {each.name: argument(node, each.name) for each in node.target._schema.arguments}


def widened(node: Node) -> Node:
    """What a cast to float32 of a narrower float widens: kernels that compute in float32 read it as it is."""
    while is_float_cast(node) and val(node).dtype == torch.float32 and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def float_linear(ledger: Ledger, node: Node) -> None:
    """Record a linear that has no dequantized operand."""
    ledger.linear(node, FLOAT)


def getitem(graph: Graph, node: Node, index: int) -> Node:
    """Output `index` of a node with several."""
    item = graph.call_function(operator.getitem, (node, index))
    item.meta["val"] = node.meta["val"][index]
    return item
