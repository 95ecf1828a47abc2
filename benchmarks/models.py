"""`python -m benchmarks.models`: whole models in bf16, with int8_inductor and with torchao: time, compile time, memory, accuracy, kernels."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import common, plot, tables
from .common import ERROR, OK, UNAVAILABLE, Budget, say
from .model_rows import Setting, compile_cache, measure, setting_of, synchronize
from .second_process import TIMEOUT_S, SecondProcessError, run_again
from .variants import VARIANTS, Variant
from .workloads import TINY, WORKLOADS, Workload

Plan = list[tuple[tuple[int, int], Workload, Variant]]


def plan_of(workloads: list[Workload], variants: list[Variant]) -> Plan:
    """(place, workload, variant) in running order: a rank on all workloads, then the next rank. `place` is where it stands in tables."""
    pairs = [((i, j), workload, variant) for i, workload in enumerate(workloads) for j, variant in enumerate(variants)]
    return sorted(pairs, key=lambda pair: (pair[2].rank, pair[0]))


def workloads_of(workloads: tuple[Workload, ...], models: list[str], endings: str | None) -> list[Workload]:
    """The workloads of `models`, those alone whose names end in one of `endings`."""
    chosen = [each for each in workloads if each.model in models]
    if endings is None:
        return chosen
    for ending in endings.split(","):
        if not any(each.name.endswith(ending) for each in chosen):
            raise SystemExit(f"--workloads: no name ends in {ending!r}; the names are {', '.join(repr(each.name) for each in chosen)}")
    return [each for each in chosen if each.name.endswith(tuple(endings.split(",")))]


def blank_row(workload: Workload, variant: Variant, place: tuple[int, int]) -> dict[str, Any]:
    """A row's names, before anything was measured."""
    return {
        "workload": workload.name, "variant": variant.name, "group": variant.group, "workload_index": place[0], "variant_index": place[1],
        "label": f"{workload.name}, {variant.name}", "mode": variant.mode, "cold": True, "ms": None,
    }  # fmt: skip


def progress(row: dict[str, Any], budget: Budget) -> None:
    """One line for a row."""
    if row["status"] != OK:
        say(f"[{budget.elapsed:5.0f} s] {row['label']}: {row['status']}: {row['reason']}")
        return
    compiled = "eager" if row["compile_s"] is None else f"compiled in {row['compile_s']:.1f} s"
    linears = "" if row["linears"] is None else f", {row['linears']['rewritten']} of {row['linears']['present']} linears rewritten"
    if "second" in row:
        compiled += f", in a second process in {row['second']['compile_s']:.1f} s, {tables.tuned_again(row['second'])} tunings"
    say(f"[{budget.elapsed:5.0f} s] {row['label']}: {row['ms']:.3f} ms (again {row['ms_again']:.3f}), {compiled}{linears}")


class Run:
    """Runs a plan on a device. Models and settings are made when they are first needed and kept; every variant works on a copy."""

    def __init__(self, device: torch.device, warm_modes: bool, again: tuple[str, ...] = ()) -> None:
        self.device, self.warm_modes, self.again = device, warm_modes, again
        self._models: dict[str, nn.Module] = {}
        self._settings: dict[str, Setting] = {}
        self._first: dict[str, str] = {}

    def setting(self, workload: Workload) -> Setting:
        if workload.model not in self._models:
            self._models[workload.model] = workload.make(self.device, common.float_dtype(self.device))
        self._first.setdefault(workload.model, workload.name)
        if workload.name not in self._settings:
            self._settings[workload.name] = setting_of(workload, self._models[workload.model], self.device)
        return self._settings[workload.name]

    def cache_directory(self, root: str, place: tuple[int, int], variant: Variant) -> str:
        """Where a variant's compile caches lie: a directory of its own, or with `warm_modes` that of its family on this workload."""
        part = variant.family.replace(" ", "_") if self.warm_modes else str(place[1])
        directory = os.path.join(root, f"{place[0]}-{part}")
        os.makedirs(directory, exist_ok=True)
        return directory

    def row(self, root: str, place: tuple[int, int], workload: Workload, variant: Variant) -> dict[str, Any]:
        """What a variant did on a workload, whatever it was."""
        row = blank_row(workload, variant, place)
        if (reason := workload.lacks() or variant.lacks()) is not None:
            return row | {"status": UNAVAILABLE, "reason": reason}
        directory = self.cache_directory(root, place, variant)
        row["cold"] = not os.listdir(directory)
        try:
            with compile_cache(directory):
                row |= measure(self.setting(workload), variant)
                again = variant.name in self.again and self._first[workload.model] == workload.name
                return row | (self._second(workload, variant) if row["status"] == OK and again else {})
        except common.peer_errors() as error:
            # An illegal access spoils every later launch: then this raises, and the run ends here with what it has.
            synchronize(self.device)
            return row | {"status": ERROR, "reason": common.one_line(error)}

    def _second(self, workload: Workload, variant: Variant) -> dict[str, Any]:
        """What a second process took, with the caches that are in force."""
        try:
            return {"second": run_again(workload.name, variant.name, self.device)}
        except (SecondProcessError, subprocess.TimeoutExpired) as error:
            reason = common.one_line(error) if isinstance(error, SecondProcessError) else f"the second process took more than {TIMEOUT_S} s"
            return {"status": ERROR, "reason": reason}

    def plan(self, plan: Plan, budget: Budget, path: Path, record: dict[str, Any]) -> dict[str, Any]:
        """The whole plan, until the budget is spent; the result is written after every row."""
        result: dict[str, Any] = {"kind": "models", "environment": record, "float": common.dtype_name(self.device), "rows": [], "left_out": []}
        with torch.no_grad(), tempfile.TemporaryDirectory() as root:
            for index, (place, workload, variant) in enumerate(plan):
                if budget.spent():
                    result["left_out"] = [f"{each.name}, {what.name}" for _, each, what in plan[index:]]
                    say(f"{budget.seconds:.0f} s are spent: {len(result['left_out'])} variants left out")
                    break
                row = self.row(root, place, workload, variant)
                result["rows"].append(row)
                progress(row, budget)
                common.write_json(path, result)
        result["seconds"] = budget.elapsed
        common.write_json(path, result)
        return result


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    models = list(dict.fromkeys(each.model for each in WORKLOADS))
    parser.add_argument("--models", help=f"comma-separated, from {', '.join(models)} (default: all but minilm; on a CPU minilm)")
    parser.add_argument("--workloads", metavar="ENDINGS",
                        help="comma-separated: of a model's workloads those alone whose names end so, as '1 x 128,32 x 1'")  # fmt: skip
    parser.add_argument("--variants", help=f"comma-separated, from {', '.join(each.name for each in VARIANTS)} (default: all)")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand weights, for tests on any machine")
    parser.add_argument("--warm-modes", action="store_true",
                        help="modes of a variant share compile caches: all its compile times but the first are warm")  # fmt: skip
    parser.add_argument("--second-process", metavar="VARIANTS",
                        help="comma-separated: variants compiled once more in a fresh process with the caches that the first has left, on the first "
                        "workload of each model")  # fmt: skip
    common.add_arguments(parser, seconds=240)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, variants: tuple[Variant, ...] = VARIANTS) -> int:
    """Run, print the table, write JSON and PNG. 1 when any result was wrong or failed."""
    argv = common.program(argv)
    options = arguments(argv)
    device = torch.device(options.device)
    workloads = TINY if options.tiny else WORKLOADS
    models = common.choose(options.models, list(dict.fromkeys(each.model for each in workloads)), "--models")
    if options.models is None and not options.tiny:
        models = [each.model for each in workloads if each.default_on == device.type]
    names = common.choose(options.variants, [each.name for each in variants], "--variants")
    plan = plan_of(workloads_of(workloads, models, options.workloads), [each for each in variants if each.name in names])
    budget = Budget(options.seconds)
    common.prepare(device)
    record = common.environment(device, "benchmarks.models", argv, options.commit)
    path = common.result_path("models", record, options.out)
    again = () if options.second_process is None else tuple(common.choose(options.second_process, names, "--second-process"))
    result = Run(device, options.warm_modes, again).plan(plan, budget, path, record)
    plot.draw(path)
    say(tables.text(*tables.models(result)))
    say("\n".join(tables.left_out(result, "label")))
    say(f"wrote {path.name} and {path.with_suffix('.png').name} in {budget.elapsed:.0f} s")
    return common.exit_code(result["rows"])


if __name__ == "__main__":
    sys.exit(main())
