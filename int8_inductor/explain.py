"""What was rewritten, into which kernel, and why the rest was not: `explain(model, *inputs)` and the ledger that the passes write.

Every quant, dequant and linear of a graph has one `Entry`, and every convolution over patches that was rewritten. Its status is one of STATUSES.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import config
from ._compat import CompileError, graph_breaks, run_apart

__all__ = ["Entry", "LeftBehindError", "Report", "explain"]

log = logging.getLogger("int8_inductor")

REWRITTEN = "rewritten"
FEEDS = "feeds"
FLOAT = "float"
LEFT = "left"
STATUSES = {
    REWRITTEN: "part of a kernel of ours, such as scaled_mm",
    FEEDS: "a quant that computes the int8 input of such a kernel, in a kernel of its own that Inductor fuses with what precedes it",
    FLOAT: "a linear that nobody quantized",
    LEFT: "left as it was; the reason says why",
}
KINDS = ("linear", "quant", "dequant")
PATCHES = "patches"
"""The kind of a convolution over patches that became a product in its own dtype: no part of what was quantized."""
TAG = "int8_inductor_linear"
"""Key of a product node's meta: the name of the linear that it came from."""


_KERNEL = "int8_inductor_kernel"
"""Key of a product node's meta: what it lowered to."""


class LeftBehindError(CompileError):
    """config.strict is on and a pass left a quant, dequant or quantized linear as it was."""


@dataclass
class Entry:
    """One quant, dequant or linear of a graph, or a convolution that became a product."""

    kind: str
    name: str
    status: str
    reason: str = ""
    kernel: str = ""
    epilogue: str = ""
    source: str = ""


@dataclass
class Report:
    """All entries of all graphs that one model compiled to. `str(report)` is a table, `report.to_dict()` plain data.

    graphs: how many graphs there were. graph_breaks: Dynamo's reasons, each once, to leave code between them to run eagerly; of that code the
    report knows nothing. sqnr: dB by name of each quantized layer that ran, where `explain` was asked for it.
    """

    entries: list[Entry] = field(default_factory=list)
    graphs: int = 0
    graph_breaks: list[str] = field(default_factory=list)
    sqnr: dict[str, float] = field(default_factory=dict)

    def _of(self, kind: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind == kind]

    @property
    def linears(self) -> list[Entry]:
        """Entries of the matrix products."""
        return self._of("linear")

    @property
    def quants(self) -> list[Entry]:
        """Entries of the float -> int8 conversions."""
        return self._of("quant")

    @property
    def dequants(self) -> list[Entry]:
        """Entries of the int8 -> float conversions."""
        return self._of("dequant")

    @property
    def patches(self) -> list[Entry]:
        """Entries of the convolutions over patches that became products (passes/patches.py)."""
        return self._of(PATCHES)

    def left(self) -> list[Entry]:
        """What was left as it was."""
        return [entry for entry in self.entries if entry.status == LEFT]

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of linears, quants and dequants by status; every status is there."""
        table = {kind: dict.fromkeys(STATUSES, 0) for kind in KINDS}
        for entry in self.entries:
            if entry.kind in table:
                table[entry.kind][entry.status] += 1
        return table

    def to_dict(self) -> dict[str, Any]:
        """Counts and entries as plain dicts, numbers and strings."""
        return {"counts": self.counts(), **asdict(self)}

    def __str__(self) -> str:
        header = ("kind", "name", "status", "kernel", "epilogue", "reason", "source")
        rows = [header, *(tuple(str(getattr(entry, column)) for column in header) for entry in self.entries)]
        if self.sqnr:
            rows = [(*row[:4], cell, *row[4:]) for row, cell in zip(rows, ["SQNR dB", *map(self._sqnr_of, self.entries)], strict=True)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        breaks = [f"graph break: {reason}" for reason in self.graph_breaks]
        seen = {entry.source for entry in self.linears}
        apart = [f"{name}, in no graph: SQNR {value:.1f} dB" for name, value in self.sqnr.items() if name not in seen]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:], *apart, *breaks, self.summary()])

    def _sqnr_of(self, entry: Entry) -> str:
        return f"{self.sqnr[entry.source]:.1f}" if entry.kind == "linear" and entry.source in self.sqnr else ""

    def summary(self) -> str:
        """One line: how many linears, quants and dequants were rewritten, of how many."""
        counts = self.counts()
        quantized = sum(counts["linear"].values()) - counts["linear"][FLOAT]
        done = counts["quant"][REWRITTEN]
        return (
            f"{counts['linear'][REWRITTEN]} of {quantized} int8 linears rewritten ({counts['linear'][FLOAT]} float linears); "
            f"quants: {done} fused, {counts['quant'][FEEDS]} feeding, {counts['quant'][LEFT]} left; "
            f"dequants: {counts['dequant'][REWRITTEN]} fused, {counts['dequant'][LEFT]} left"
            + (f"; {self.graphs} graphs, and what ran eagerly between them is not in this report" if self.graph_breaks else "")
        )


_recording: ContextVar[Report | None] = ContextVar("int8_inductor_report", default=None)


@contextmanager
def recording() -> Iterator[Report]:
    """Collect what the passes and lowerings do inside the block into one Report."""
    report = Report()
    token = _recording.set(report)
    try:
        yield report
    finally:
        _recording.reset(token)


def publish(report: Report) -> None:
    """Log one graph's report, hand it to `recording`, and, when config.strict is on, raise on what was left."""
    left = report.left()
    if any(entry.status != FLOAT for entry in report.entries):
        log.info(report.summary())
    else:
        log.info("nothing quantized in this graph (%d float linears): it compiles as with inductor", len(report.linears))
    for entry in left:
        log.warning("%s %s left as it was: %s%s", entry.kind, entry.name, entry.reason, f" ({entry.source})" if entry.source else "")
    if (collected := _recording.get()) is not None:
        collected.entries.extend(report.entries)
        collected.graphs += 1
    if config.strict and left:
        # A dequant is left because its linear is: the linear says why.
        first = next((entry for entry in left if entry.kind == "linear"), left[0])
        raise LeftBehindError(f"{first.kind} {first.name} was left as it was: {first.reason}{f' ({first.source})' if first.source else ''}")


def record_kernel(node: torch.fx.Node, kernel: str, epilogue: str, name: str | None = None) -> None:
    """Note which kernel the product `node` lowered to. name: of the linear, where the product computes several; else the node's tag."""
    log.debug("%s -> %s, epilogue %s", node.name, kernel, epilogue)
    node.meta[_KERNEL] = kernel, epilogue
    report, name = _recording.get(), name or node.meta.get(TAG)
    if report is None or name is None:
        return
    for entry in reversed(report.linears):
        if entry.name == name and not entry.kernel:
            entry.kernel, entry.epilogue = kernel, epilogue
            return


def recorded(node: torch.fx.Node) -> tuple[str, str]:
    """The kernel and the epilogue that the product `node` lowered to."""
    kernel, epilogue = node.meta[_KERNEL]
    return kernel, epilogue


def explain(model: Any, *inputs: Any, sqnr: bool | torch.nn.Module = False, **kwargs: Any) -> Report:
    """Compile `model` for these inputs and report every quant, dequant and linear: rewritten to which kernel, or left and why.

    `model` is a module or function, compiled or not; it is compiled anew with backend="int8_inductor" and run once on the inputs, without
    gradients. What torch.compile has compiled for it before stays valid, and no cache is read or written. Options given to torch.compile are not
    known here; those of `config` and torch._inductor.config are in force.

    sqnr: also measure the signal to quantization noise ratio of every quantized layer, in dB, each by itself, in one more, eager, run. True: against
    the same layer with its activation unquantized (the cost of quantizing that), or the float model that `model` was made of, with the same
    names of layers (the cost of both quantizations; after `smooth_quant`: a copy made after it, as that moves factors between layers). 20 dB
    is noise of a tenth of the signal's amplitude; int8 with a scale per row stands near 40.

        >>> import torch
        >>> from int8_inductor import Int8DynamicActivationInt8WeightConfig, explain, quantize_
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
        >>> quantize_(model, Int8DynamicActivationInt8WeightConfig())
        >>> report = explain(model, torch.randn(4, 64))
        >>> [(entry.source, entry.status, entry.epilogue) for entry in report.linears]
        [('0', 'rewritten', 'scales + bias + relu'), ('2', 'rewritten', 'scales + bias')]
        >>> print(report.summary())
        2 of 2 int8 linears rewritten (0 float linears); quants: 0 fused, 2 feeding, 0 left; dequants: 4 fused, 0 left
    """
    from .accuracy import layer_sqnr
    from .backend import int8_inductor

    target = getattr(model, "_orig_mod", model)
    target = getattr(target, "_torchdynamo_orig_callable", target)
    if sqnr is not False and not isinstance(target, torch.nn.Module):
        raise TypeError(f"sqnr needs a model that is a torch.nn.Module, got {type(target).__name__}")
    if not isinstance(sqnr, (bool, torch.nn.Module)):
        raise TypeError(f"sqnr must be True, False or the float model, a torch.nn.Module, got {type(sqnr).__name__}")

    ratios = {} if sqnr is False else layer_sqnr(target, inputs, kwargs, None if sqnr is True else sqnr)

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        return int8_inductor(gm, example_inputs)

    before = graph_breaks()
    with recording() as report, config.patch(strict=False), torch.no_grad(), _as_written(target):
        run_apart(target, backend, inputs, kwargs)
    report.graph_breaks = sorted(graph_breaks() - before)
    report.sqnr = ratios
    return report


@contextmanager
def _as_written(model: Any) -> Iterator[None]:
    """Inside the block, modules that were compiled in place (module.compile()) run as they are written."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    compiled = {module: call for module in modules if (call := module._compiled_call_impl) is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
