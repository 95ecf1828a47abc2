"""`python -m benchmarks.turns`: variants of a model on a CPU, called by turns in one process.

A host that is shared slows down and speeds up by more than the variants differ: float32 MiniLM took 122 to 285 ms on one kind of machine. By turns
all of them get their part of that; the ratios are of medians over all rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from typing import Any

import torch

from . import common
from .common import OK, WRONG, Budget, say
from .model_rows import LEAST_SQNR, First, Setting, compile_cache, first_call, setting_of, sqnr_db
from .models import workloads_of
from .variants import VARIANTS
from .workloads import TINY, WORKLOADS, Workload

CALLS = 3
"""Calls in a row that are timed; one before them brings the weights back into the caches."""
DEVICE = torch.device("cpu")


def times_of(first: First) -> list[float]:
    """Milliseconds of CALLS calls."""
    first.call()
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        first.call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def rows_of(setting: Setting, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Compile every variant, then call them by turns."""
    made: dict[str, First] = {}
    for variant in VARIANTS:
        if variant.name in names:
            made[variant.name] = first_call(setting, variant)
            say(f"{setting.workload.name}, {variant.name}: compiled in {made[variant.name].seconds:.1f} s")
    times: dict[str, list[float]] = {name: [] for name in made}
    for i in range(rounds):
        for name in list(made) if i % 2 else reversed(made):
            times[name] += times_of(made[name])
    return [_row(setting, name, first, times[name]) for name, first in made.items()]


def _row(setting: Setting, name: str, first: First, times: list[float]) -> dict[str, Any]:
    """What is written of one variant."""
    low, *_, high = statistics.quantiles(times, n=5)
    sqnr = sqnr_db(first.call(), setting.exact)
    wrong = None if sqnr is None or sqnr >= LEAST_SQNR else f"SQNR to float32 is {sqnr:.1f} dB, under {LEAST_SQNR}"
    row = {"workload": setting.workload.name, "variant": name, "label": f"{setting.workload.name}, {name}"}
    row |= {"ms": statistics.median(times), "ms_p20": low, "ms_p80": high, "ms_least": min(times), "calls": len(times)}
    row |= {"compile_s": first.seconds, "sqnr_float32_db": sqnr, "status": OK if wrong is None else WRONG, "reason": wrong}
    say(f"{row['label']}: {row['ms']:.3f} ms (p20 {low:.3f}, p80 {high:.3f}, least {row['ms_least']:.3f}), {row['status']}")
    return row


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.turns", description=__doc__)
    parser.add_argument("--variants", required=True, help=f"comma-separated, from {', '.join(each.name for each in VARIANTS)}")
    parser.add_argument("--workloads", metavar="ENDINGS", help="comma-separated: the workloads of MiniLM whose names end so")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each variant (default: 30)")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, for tests")
    common.add_arguments(parser, seconds=240)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run, and write JSON after each workload. 1 when any result was wrong."""
    argv = common.program(argv)
    options = arguments(argv)
    if options.device != DEVICE.type:
        raise SystemExit(f"--device must be {DEVICE.type}, got {options.device}")
    names = common.choose(options.variants, [each.name for each in VARIANTS], "--variants")
    tiny = [each for each in TINY if each.lacks() is None][:1]
    workloads: list[Workload] = tiny if options.tiny else workloads_of(WORKLOADS, ["minilm"], options.workloads)
    budget = Budget(options.seconds)
    record = common.environment(DEVICE, "benchmarks.turns", argv, options.commit)
    path = common.result_path("turns", record, options.out)
    result: dict[str, Any] = {"kind": "turns", "environment": record, "float": common.dtype_name(DEVICE), "rows": [], "left_out": []}
    with torch.no_grad(), tempfile.TemporaryDirectory() as root, compile_cache(root):
        for workload in workloads:
            if budget.spent():
                result["left_out"].append(workload.name)
                continue
            model = workload.make(DEVICE, common.float_dtype(DEVICE))
            result["rows"] += rows_of(setting_of(workload, model, DEVICE), names, options.rounds)
            common.write_json(path, result)
    say(f"wrote {path.name} in {budget.elapsed:.0f} s")
    return common.exit_code(result["rows"])


if __name__ == "__main__":
    sys.exit(main())
