"""The passes, in the order in which they run over a joint graph, and the one Inductor pass that runs them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

from .. import config, ops
from ..explain import TAG, publish
from ..int_mm import of_this_cpu
from ..kernels import KernelPreference, parse
from ..onednn.prepacked import keep_from_cache
from .base import argument, aten, val
from .context import Context, current, running
from .dialects import find_dequant
from .epilogue import BIAS, OUT_DTYPE, fold_activations
from .experts import note_experts, rewrite_grouped
from .instructions import use_fewer_instructions
from .linear import LINEAR
from .patches import embed_patches
from .requantize import fold_quants
from .shared import merge_quants
from .side_by_side import lay_side_by_side

__all__ = ["PASSES", "Int8Pass"]


def _note_dequants(graph: Graph) -> None:
    """Enter every dequant in the ledger, and the order of the nodes, before anything changes."""
    for position, node in enumerate(graph.nodes):
        current().ledger.order[node.name] = position
        if node.target in ops.OPERATORS:
            node.meta[TAG] = node.name  # an operator that the model calls by its name
        if (dequant := find_dequant(node)) is not None:
            current().ledger.found_dequant(node, dequant.problem)


def _remove_noops(graph: Graph) -> None:
    from torch._inductor.fx_passes.post_grad import remove_noop_ops

    remove_noop_ops(graph)


def _remove_asserts(graph: Graph) -> None:
    """Erase what torch.export asserts of a computed value and the graph itself settles: dtype, device and layout. It would count as a user."""
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        source = node.args[0]
        computed = isinstance(source, Node) and source.op == "call_function"
        if not computed or argument(node, "size") is not None or argument(node, "stride") is not None:
            continue
        if all(argument(node, name) in (None, getattr(val(source), name)) for name in ("dtype", "device", "layout")):
            graph.erase_node(node)


PASSES: tuple[Callable[[Graph], Any], ...] = (
    _remove_noops,  # views to the same shape, as torchao's affine ops leave them; Inductor itself removes them right after
    _remove_asserts,
    merge_quants,
    _note_dequants,
    LINEAR.apply,
    rewrite_grouped,
    note_experts,
    BIAS.apply,
    fold_activations,
    fold_quants,
    OUT_DTYPE.apply,
    lay_side_by_side,
)


def sources_digest(package: Path) -> str:
    """A hash of every file of a package: compiled graphs are cached under ours."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


# Now, not when a graph is cached: a file that is edited after its import is not the code that runs.
SOURCES = sources_digest(Path(__file__).resolve().parent.parent)


class Int8Pass(CustomGraphPass):
    """Runs PASSES over a joint graph and publishes the report. `kernel_preference`: for the nodes that it makes; None: config's."""

    def __init__(self, kernel_preference: str | KernelPreference | None = None) -> None:
        self._preference = None if kernel_preference is None else parse(kernel_preference)

    @property
    def preference(self) -> KernelPreference:
        """The kernel preference in force."""
        return parse(config.kernel_preference) if self._preference is None else self._preference

    def __call__(self, graph: Graph) -> None:
        from .. import lowering_side_by_side  # noqa: F401 - registers the lowerings of what the passes write
        from ..experts import lowering  # noqa: F401

        with running(Context(self.preference)) as context:
            for each in PASSES:
                each(graph)
            graph.eliminate_dead_code()
            report = context.ledger.settle(graph)
            use_fewer_instructions(graph)  # replaces quants that the ledger knows by their nodes
            report.entries.extend(embed_patches(graph))
            graph.eliminate_dead_code()
            keep_from_cache(graph)
            publish(report)

    def uuid(self) -> Any:
        """What compiled graphs are cached under: our sources, flags, and the versions and the CPU that the result depends on."""
        from .._compat import triton_version

        return ("int8_inductor", SOURCES, torch.__version__, triton_version(), *of_this_cpu(), self.preference.value, config.strict)
