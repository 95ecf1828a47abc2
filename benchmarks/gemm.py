"""`python -m benchmarks.gemm`: the scaled INT8 product against its peers, shape by shape, each result checked against float64 beside its time."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from int8_inductor import launching

from . import common, plot, tables
from .cases import HELD_OUT_SEED, SHAPE_SETS, Case, held_out, parse_case
from .common import ERROR, OK, REFUSED, UNAVAILABLE, WRONG, Budget, say
from .operands import Operands, check
from .peers import PEERS, Peer
from .roofline import floor_ms
from .timing import rotation, time_call, time_graph

GRAPH_BELOW = 2**37
"""Below this many operations (0.14 ms and less on an H200 in INT8) a case is timed by graph replay: launch gaps would hide the kernels."""

HELD_OUT = "held-out"
"""The name of the set that is drawn, in --shapes."""

Sets = dict[str, list[tuple[Tensor, ...]]]


def uses_graph(case: Case, device: torch.device) -> bool:
    """Whether a case's `ms` is taken by CUDA-graph replay; the same for every peer of the case."""
    return device.type == "cuda" and case.operations < GRAPH_BELOW


def operand_sets(form: Operands, case: Case, device: torch.device, sets: Sets) -> list[tuple[Tensor, ...]]:
    """The inputs that a format's peers are timed on, drawn once for a case; `sets` keeps them."""
    if form.name not in sets:
        count = rotation(form.bytes_of_one(case, device), device) if uses_graph(case, device) else 1
        sets[form.name] = [form.draw(case, device) for _ in range(count)]
    return sets[form.name]


def launched_by_graphs(replayed: bool) -> contextlib.AbstractContextManager[Any]:
    """What this package compiles inside the block is chosen and launched as in a mode with CUDA graphs, where a graph that we record launches it."""
    return mock.patch.object(launching, "by_cuda_graphs", return_value=True) if replayed else contextlib.nullcontext()


def measure(peer: Peer, case: Case, device: torch.device, sets: Sets) -> dict[str, Any]:
    """Build, check, time: the measured part of a row."""
    inputs = operand_sets(peer.form, case, device, sets)
    start = time.monotonic()
    call = peer.build(case, device)
    with launched_by_graphs(uses_graph(case, device)):
        call(*inputs[0])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    row: dict[str, Any] = {"first_call_s": time.monotonic() - start}
    checked = check(case, peer.form, call, inputs[0], device)
    row |= {"check": checked.record(), "status": OK if checked.wrong is None else WRONG, "reason": checked.wrong}
    if checked.wrong is not None:
        return row
    timing = time_call(lambda: call(*inputs[0]), device)
    row["single_call"] = timing.record()
    if uses_graph(case, device):
        timing = time_graph(call, inputs, timing.ms)
    row |= timing.record()
    row["tops"] = case.operations / timing.ms / 1e9
    return row


def run_peer(peer: Peer, case: Case, device: torch.device, sets: Sets) -> dict[str, Any]:
    """One row: what a peer did with a case, whatever it was. Dynamo starts afresh, or its recompile limit would end a long run in eager."""
    row: dict[str, Any] = {
        "m": case.m, "n": case.n, "k": case.k, "tail": case.tail.name, "label": f"{case.label} {peer.name}", "peer": peer.name,
        "group": peer.group, "form": peer.form.name, "ms": None,
    }  # fmt: skip
    floor = floor_ms(_device_name(device), case.operations, case.bytes_moved(case.tail.out_bytes(common.float_dtype(device).itemsize)))
    row["floor_ms"] = floor
    if (reason := peer.lacks(device)) is not None:
        return row | {"status": UNAVAILABLE, "reason": reason}
    if (reason := peer.refuses(case, device)) is not None:
        return row | {"status": REFUSED, "reason": reason}
    torch._dynamo.reset()
    try:
        row |= measure(peer, case, device, sets)
    except common.peer_errors() as error:
        if device.type == "cuda":
            # An illegal access spoils every later launch: then this raises, and the run ends here with what it has.
            torch.cuda.synchronize(device)
        return row | {"status": ERROR, "reason": common.one_line(error)}
    row["roofline_share"] = floor / row["ms"] if floor is not None and row["ms"] is not None else None
    return row


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def progress(case: Case, rows: list[dict[str, Any]], budget: Budget) -> None:
    """One line for a case: every peer's microseconds, or its status."""
    cells = [f"{row['peer']} {row['ms'] * 1e3:.1f}" if row["ms"] is not None else f"{row['peer']} {row['status']}" for row in rows]
    seconds = sum(row.get("first_call_s", 0.0) for row in rows)
    say(f"[{budget.elapsed:5.0f} s] {case.label} us: {', '.join(cells)} (first calls {seconds:.1f} s)")


def run(cases: list[Case], peers: list[Peer], device: torch.device, budget: Budget, path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """All peers on all cases, until the budget is spent; the result is written after every case."""
    result: dict[str, Any] = {"kind": "gemm", "environment": record, "float": common.dtype_name(device), "rows": [], "left_out": []}
    with torch.no_grad():
        for index, case in enumerate(cases):
            if budget.spent():
                result["left_out"] = [each.label for each in cases[index:]]
                say(f"{budget.seconds:.0f} s are spent: {len(result['left_out'])} shapes left out")
                break
            sets: Sets = {}
            rows = [run_peer(peer, case, device, sets) for peer in peers]
            result["rows"] += rows
            progress(case, rows, budget)
            common.write_json(path, result)
    result["seconds"] = budget.elapsed
    common.write_json(path, result)
    return result


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemm", description=__doc__)
    parser.add_argument("--shapes", choices=[*SHAPE_SETS, HELD_OUT],
                        help="a set of shapes (default: table on a GPU, small on the CPU); held-out: random ones that no other set has")  # fmt: skip
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED, help="of the held-out shapes (default: %(default)s)")
    parser.add_argument("--shape", action="append", default=[], metavar="M,N,K[,tail]", help="one shape; may be repeated; instead of --shapes")
    parser.add_argument("--peers", help=f"comma-separated, from {', '.join(peer.name for peer in PEERS)} (default: all)")
    common.add_arguments(parser, seconds=240)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, peers: tuple[Peer, ...] = PEERS, name: str = "gemm", own: tuple[str, ...] = ()) -> int:
    """Run, print the table, write JSON and PNG. 1 when any result was wrong or failed. name: of the program in this package, and of its files.
    own: options of that program beside these, for the record.
    """
    argv = common.program(argv)
    options = arguments(argv)
    device = torch.device(options.device)
    shapes = options.shapes or ("table" if device.type == "cuda" else "small")
    cases = [parse_case(text) for text in options.shape] or list(held_out(options.seed) if shapes == HELD_OUT else SHAPE_SETS[shapes])
    names = common.choose(options.peers, [peer.name for peer in peers], "--peers")
    budget = Budget(options.seconds)
    common.prepare(device)
    record = common.environment(device, f"benchmarks.{name}", [*own, *argv], options.commit)
    path = common.result_path(name, record, options.out)
    result = run(cases, [peer for peer in peers if peer.name in names], device, budget, path, record)
    plot.draw(path)
    say(tables.text(*tables.gemm(result)))
    if (means := tables.means(result))[1]:
        say("\n" + tables.text(*means) + "\n")
    say("\n".join(tables.notes(result)))
    say(f"wrote {path.name} and {path.with_suffix('.png').name} in {budget.elapsed:.0f} s")
    return common.exit_code(result["rows"])


if __name__ == "__main__":
    sys.exit(main())
