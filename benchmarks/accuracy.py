"""`python -m benchmarks.accuracy`: what INT8 costs: perplexity and output noise of whole models, and the noise of every layer, with a chart.

Each scheme quantizes a copy of the float32 model; a layer is judged by itself, on the input that it has in the float model (`explain`'s sqnr).
Models run eagerly, which defines their result; `--compile` runs what the backend makes of them.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8_inductor.accuracy import layer_sqnr

from . import common, plot, tables
from .common import ERROR, OK, UNAVAILABLE, WRONG, Budget, say
from .model_rows import MEGA, release, sqnr_db, stored_bytes
from .subjects import DEFAULT_KEYS, SCHEMES, SUBJECTS, TINY, Batches, Scheme, Subject


class Bench:
    """A subject made ready on a device: the float32 model, its batches, and what it gives for them."""

    def __init__(self, subject: Subject, device: torch.device, compiled: bool) -> None:
        self.subject, self.device, self.compiled = subject, device, compiled
        self.model = subject.make(device)
        self.calibration = self._moved(subject.batches(subject.calibration, 0))
        self.evaluation = self._moved(subject.batches(subject.evaluation, 1))
        self.exact = [self.model(*batch).clone() for batch in self.evaluation]
        self.perplexity = subject.perplexity(self.exact, self.exact)

    def _moved(self, batches: Batches) -> Batches:
        return [tuple(t.to(self.device) for t in batch) for batch in batches]

    def _outputs(self, model: nn.Module, is_int8: bool) -> list[Tensor]:
        if self.compiled:
            torch._dynamo.reset()
            model = torch.compile(model, backend="int8_inductor" if is_int8 else "inductor", dynamic=False)
        return [model(*batch).float().clone() for batch in self.evaluation]

    def measure(self, scheme: Scheme) -> dict[str, Any]:
        """The measured part of a row."""
        start = time.monotonic()
        model, reference = scheme.prepare(copy.deepcopy(self.model), self.calibration)
        layers = {} if scheme.config is None else layer_sqnr(model, self.evaluation[0], {}, reference)
        del reference
        outputs = self._outputs(model, scheme.config is not None)
        perplexity = self.subject.perplexity(outputs, self.exact)
        row = {
            "perplexity": perplexity, "perplexity_float32": self.perplexity,
            "sqnr_db": sqnr_db(torch.cat(outputs), torch.cat(self.exact)), "layers": {k: v if math.isfinite(v) else None for k, v in layers.items()},
            "weights_mb": sum(map(stored_bytes, [*model.parameters(), *model.buffers()])) / MEGA, "seconds": time.monotonic() - start,
        }  # fmt: skip
        if not math.isfinite(perplexity):
            return row | {"status": WRONG, "reason": "the output is not finite", "perplexity": None, "sqnr_db": None}
        return row | {"status": OK, "reason": None}


def run_scheme(bench: Bench, scheme: Scheme, place: tuple[int, int]) -> dict[str, Any]:
    """One row: what a scheme did to a subject, whatever it was."""
    row = blank_row(bench.subject, scheme, place)
    try:
        return row | bench.measure(scheme)
    except common.peer_errors() as error:
        return row | {"status": ERROR, "reason": common.one_line(error)}
    finally:
        release(bench.device)


def blank_row(subject: Subject, scheme: Scheme, place: tuple[int, int]) -> dict[str, Any]:
    """A row's names, before anything was measured."""
    return {
        "subject": subject.name, "scheme": scheme.name, "label": f"{subject.name}, {scheme.name}", "subject_index": place[0],
        "scheme_index": place[1], "perplexity": None, "sqnr_db": None, "layers": {},
    }  # fmt: skip


def progress(row: dict[str, Any], budget: Budget) -> None:
    """One line for a row."""
    if row["status"] != OK:
        say(f"[{budget.elapsed:5.0f} s] {row['label']}: {row['status']}: {row['reason']}")
        return
    noise = "" if row["sqnr_db"] is None else f", SQNR {row['sqnr_db']:.1f} dB"
    least = min((value for value in row["layers"].values() if value is not None), default=None)
    layers = "" if least is None else f", its {len(row['layers'])} layers from {least:.1f} dB"
    say(f"[{budget.elapsed:5.0f} s] {row['label']}: perplexity {row['perplexity']:.4f}{noise}{layers}")


def run(
    subjects: list[Subject], schemes: list[Scheme], device: torch.device, compiled: bool, budget: Budget, path: Path, record: dict[str, Any]
) -> dict[str, Any]:
    """Every scheme on every subject, until the budget is spent; the result is written after every row."""
    result: dict[str, Any] = {"kind": "accuracy", "environment": record, "compiled": compiled, "rows": [], "left_out": []}
    with torch.no_grad():
        for i, subject in enumerate(subjects):
            if (reason := subject.lacks()) is not None:
                result["rows"] += [blank_row(subject, scheme, (i, j)) | {"status": UNAVAILABLE, "reason": reason} for j, scheme in enumerate(schemes)]
                continue
            if budget.spent():
                result["left_out"] += [f"{subject.name}, {scheme.name}" for scheme in schemes]
                continue
            bench = Bench(subject, device, compiled)
            for j, scheme in enumerate(schemes):
                if budget.spent():
                    result["left_out"].append(f"{subject.name}, {scheme.name}")
                    continue
                row = run_scheme(bench, scheme, (i, j))
                result["rows"].append(row)
                progress(row, budget)
                common.write_json(path, result)
    result["seconds"] = budget.elapsed
    common.write_json(path, result)
    return result


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    keys = ", ".join(subject.key for subject in SUBJECTS)
    parser.add_argument("--subjects", help=f"comma-separated, from {keys} (default: minilm and llama1, on a GPU minilm and llama4)")
    parser.add_argument("--schemes", help=f"comma-separated, from {', '.join(scheme.name for scheme in SCHEMES)} (default: all)")
    parser.add_argument("--tiny", action="store_true", help="small models, for tests on any machine")
    parser.add_argument("--compile", action="store_true", help="run the compiled models; by default they run eagerly, which defines their result")
    common.add_arguments(parser, seconds=600)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run, print the table, write JSON and PNG. 1 when any result was wrong or failed."""
    argv = common.program(argv)
    options = arguments(argv)
    device = torch.device(options.device)
    subjects = TINY if options.tiny else SUBJECTS
    keys = [subject.key for subject in subjects]
    default = keys if options.tiny else DEFAULT_KEYS[device.type]
    chosen = default if options.subjects is None else common.choose(options.subjects, keys, "--subjects")
    names = common.choose(options.schemes, [scheme.name for scheme in SCHEMES], "--schemes")
    budget = Budget(options.seconds)
    if options.compile:
        common.prepare(device)
    record = common.environment(device, "benchmarks.accuracy", argv, options.commit)
    path = common.result_path("accuracy", record, options.out)
    schemes = [each for each in SCHEMES if each.name in names]
    result = run([each for each in subjects if each.key in chosen], schemes, device, options.compile, budget, path, record)
    plot.draw(path)
    say(tables.text(*tables.accuracy(result)))
    say("\n".join(tables.accuracy_notes(result)))
    say(f"wrote {path.name} and {path.with_suffix('.png').name} in {budget.elapsed:.0f} s")
    return common.exit_code(result["rows"])


if __name__ == "__main__":
    sys.exit(main())
