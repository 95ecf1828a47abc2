"""`python -m benchmarks.turns`: variants of a model on a CPU, called by turns in one process.

A host that is shared slows down and speeds up by more than the variants differ: float32 MiniLM took 122 to 285 ms on one kind of machine. By turns
all of them get their part of that; the ratios are of medians over all rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from . import common, plot, tables
from .common import Budget, say
from .model_rows import First, Setting, compile_cache, first_call, linears_of, prepared, setting_of, sqnr_db, verdict
from .models import workloads_of
from .timing import Timing
from .variants import VARIANTS, Variant
from .workloads import TINY, WORKLOADS, Workload

CALLS = 3
"""Calls in a row that are timed; one before them brings the weights back into the caches."""
METHOD = f"wall clock, {CALLS} calls a turn after one that is not timed"
DEVICE = torch.device("cpu")


@contextlib.contextmanager
def compiling(graphs: bool, what: str) -> Iterator[None]:
    """RuntimeError where Dynamo compiles nothing inside the block, or, with graphs=False, anything: another thing is called than is said then."""
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    yield
    if (stats["unique_graphs"] > before) != graphs:
        raise RuntimeError(f"{what}: must compile {'a graph of its own' if graphs else 'nothing'}, got {stats['unique_graphs'] - before} graphs")


def times_of(first: First, variant: Variant) -> list[float]:
    """Milliseconds of CALLS calls in a row, of what the first call has compiled."""
    times = []
    with compiling(False, f"a turn of {variant.name}"):
        first.call()
        for _ in range(CALLS):
            start = time.perf_counter()
            first.call()
            times.append(1e3 * (time.perf_counter() - start))
    return times


def compiled(setting: Setting, variants: list[Variant]) -> dict[Variant, First]:
    """Each variant's first call. All models are prepared before: torch.export, which PT2E needs, makes Dynamo forget what it has compiled."""
    models = {variant: prepared(setting, variant) for variant in variants}
    firsts = {}
    for variant, model in models.items():
        with compiling(variant.mode is not None, variant.name):
            firsts[variant] = first_call(setting, variant, model)
        say(f"{setting.workload.name}, {variant.name}: compiled in {firsts[variant].seconds:.1f} s")
    return firsts


def rows_of(setting: Setting, variants: list[Variant], rounds: int, budget: Budget) -> list[dict[str, Any]]:
    """Compile every variant, then call them by turns, until the budget is spent; one turn each at least."""
    firsts = compiled(setting, variants)
    times: dict[Variant, list[float]] = {variant: [] for variant in variants}
    for i in range(rounds):
        if i and budget.spent():
            say(f"{budget.seconds:.0f} s are spent: {i} of {rounds} turns")
            break
        for variant in variants if i % 2 else reversed(variants):
            times[variant] += times_of(firsts[variant], variant)
    return [_row(setting, variant, firsts[variant], times[variant]) for variant in variants]


def _row(setting: Setting, variant: Variant, first: First, times: list[float]) -> dict[str, Any]:
    """What is written of one variant."""
    name = variant.name
    row: dict[str, Any] = {"workload": setting.workload.name, "variant": name, "label": f"{setting.workload.name}, {name}"}
    row |= Timing.of(times, METHOD).record() | {"ms_least": min(times), "calls": len(times), "compile_s": first.seconds}
    row["linears"] = linears_of(first.report) if variant.group == "ours" else None
    with compiling(False, f"the result of {name}"):
        row["sqnr_float32_db"] = sqnr_db(first.call(), setting.exact)
    return row | verdict(row["sqnr_float32_db"])


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.turns", description=__doc__)
    parser.add_argument("--variants", required=True, help=f"comma-separated, from {', '.join(each.name for each in VARIANTS)}")
    parser.add_argument("--workloads", metavar="ENDINGS", help="comma-separated: the workloads of MiniLM whose names end so")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each variant (default: 30)")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, for tests")
    common.add_arguments(parser, seconds=240)
    options = parser.parse_args(argv)
    if options.device != DEVICE.type:
        raise SystemExit(f"--device must be {DEVICE.type}, got {options.device}")
    if options.rounds < 1:
        raise SystemExit(f"--rounds must be at least 1, got {options.rounds}")
    return options


def chosen(options: argparse.Namespace) -> tuple[list[Workload], list[Variant]]:
    """What is asked for, all of which has to be there: without one of them there is nothing to compare."""
    names = common.choose(options.variants, [each.name for each in VARIANTS], "--variants")
    variants = [each for each in VARIANTS if each.name in names]
    models = ["llama"] if options.tiny else ["minilm"]
    workloads = workloads_of(TINY if options.tiny else WORKLOADS, models, options.workloads)
    for each in (*workloads, *variants):
        if (reason := each.lacks()) is not None:
            raise SystemExit(f"{each.name}: {reason}")
    return workloads, variants


def main(argv: list[str] | None = None) -> int:
    """Run, and write JSON after each workload, and a PNG. 1 when any result was wrong."""
    argv = common.program(argv)
    options = arguments(argv)
    workloads, variants = chosen(options)
    budget = Budget(options.seconds)
    record = common.environment(DEVICE, "benchmarks.turns", argv, options.commit)
    path = common.result_path("turns", record, options.out)
    result: dict[str, Any] = {"kind": "turns", "environment": record, "float": common.dtype_name(DEVICE), "rows": [], "left_out": []}
    # Variants share the model's code: beyond Dynamo's limit one of them would run eagerly.
    with torch.no_grad(), tempfile.TemporaryDirectory() as root, torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for workload in workloads:
            if budget.spent():
                result["left_out"].append(workload.name)
                continue
            model = workload.make(DEVICE, common.float_dtype(DEVICE))
            with compile_cache(root):
                result["rows"] += rows_of(setting_of(workload, model, DEVICE), variants, options.rounds, budget)
            common.write_json(path, result)
    common.write_json(path, result)
    plot.draw(path)
    say("\n" + tables.text(*tables.turns(result)))
    say(f"wrote {path.name} and {path.with_suffix('.png').name} in {budget.elapsed:.0f} s")
    return common.exit_code(result["rows"])


if __name__ == "__main__":
    sys.exit(main())
