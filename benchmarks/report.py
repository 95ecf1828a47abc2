"""`python -m benchmarks.report --readme`: write the newest committed result of each command into README.md, between two markers. `--check` fails when
stale."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import tables
from .common import ROOT, program, read_json, say
from .tables import Table

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


@dataclass(frozen=True)
class Section:
    """A section of the README: the results of one kind, measured on one of `devices` by one of `programs` in this package (any where none is named),
    and what makes their tables and notes. A table without rows is left out.
    """

    head: str
    kind: str
    devices: tuple[str, ...]
    tables: tuple[Callable[[dict[str, Any]], Table], ...]
    notes: Callable[[dict[str, Any]], list[str]]
    programs: tuple[str, ...] = ()

    def shows(self, result: dict[str, Any]) -> bool:
        """Whether a result belongs here."""
        environment = result["environment"]
        ours = not self.programs or any(f" benchmarks.{program} " in f"{environment['command']} " for program in self.programs)
        return ours and result["kind"] == self.kind and environment["device"]["type"] in self.devices


def _left_out(result: dict[str, Any]) -> list[str]:
    return tables.left_out(result, "label")


_PRODUCTS = (lambda result: tables.gemm(result, brief=True), tables.means)
SECTIONS = (
    Section("Scaled INT8 products", "gemm", ("cuda",), _PRODUCTS, tables.notes, ("gemm",)),
    Section("Block-scaled INT8 products", "gemm", ("cuda",), _PRODUCTS, tables.notes, ("blocks",)),
    Section("INT8 and INT4 weights beside other activations", "gemm", ("cuda",), _PRODUCTS, tables.notes, ("weights",)),
    Section("Whole models", "models", ("cuda",), (tables.models,), _left_out),
    Section("Layers of experts", "experts", ("cuda",), (tables.experts,), _left_out),
    Section("Scaled INT8 products on a CPU", "gemm", ("cpu",), (tables.means,), tables.notes),
    Section("Whole models on a CPU", "models", ("cpu",), (tables.models,), _left_out),
    Section("Whole models on a CPU, called by turns", "turns", ("cpu",), (tables.turns,), _left_out),
    Section("Accuracy", "accuracy", ("cuda", "cpu"), (tables.accuracy,), tables.accuracy_notes),
)


class ReportError(RuntimeError):
    """README.md cannot be written or checked; the message says what is missing."""


def committed_results(root: Path) -> list[Path]:
    """Result files under benchmarks/results that git tracks, and whose PNG it tracks too."""
    listed = subprocess.run(["git", "ls-files", "benchmarks/results"], cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        raise ReportError(f"{root.name} must be a git checkout, so that it is known which results are committed: {listed.stderr.strip()}")
    names = set(listed.stdout.split())
    return [root / name for name in sorted(names) if name.endswith(".json") and name.removesuffix(".json") + ".png" in names]


def newest(paths: list[Path]) -> dict[Section, list[Path]]:
    """The results of each section, oldest first: of each command the last one by the date inside it."""
    found = [(read_json(path), path) for path in paths]
    chosen: dict[Section, list[Path]] = {}
    for section in SECTIONS:
        results = [(result["environment"]["date"], path, result["environment"]["command"]) for result, path in found if section.shows(result)]
        results.sort(key=lambda each: each[:2])
        last = {command: path for _, path, command in results}
        if last:
            chosen[section] = sorted(last.values(), key=[path for _, path, _ in results].index)
    return chosen


def source(result: dict[str, Any], name: str) -> str:
    """Where a table comes from, in one sentence."""
    record = result["environment"]
    versions = ", ".join(f"{each} {record[each]}" for each in ("torch", "triton", "torchao") if record[each])
    commit = f"commit {record['commit'][:12]}{' with local changes' if record['dirty'] else ''}" if record["commit"] else "commit not recorded"
    driver = f", driver {record['device']['driver']}" if record["device"].get("driver") else ""
    where = f"{record['device']['name']}{driver}, {versions}, {record['date'][:10]}, {commit}"
    return f"{where}: `{record['command']}`, [{name}](benchmarks/results/{name})."


def one(section: Section, path: Path) -> str:
    """The markdown of one result: chart, table, notes, and where they come from."""
    result = read_json(path)
    chart = f"![{section.head}](benchmarks/results/{path.with_suffix('.png').name})"
    listed = "\n".join(f"- {note}" for note in section.notes(result))
    shown = [table for make in section.tables if (table := make(result))[1]]
    return "\n\n".join([source(result, path.name), chart, *(tables.markdown(*table) for table in shown), listed])


def block(root: Path) -> str:
    """All that stands between the markers; ReportError when no result that a section shows is committed."""
    chosen = newest(committed_results(root))
    if not chosen:
        raise ReportError("benchmarks/results must hold a committed result with its PNG, got none")
    return "\n\n".join(f"### {section.head}\n\n" + "\n\n".join(one(section, path) for path in paths) for section, paths in chosen.items())


def with_block(readme: str, text: str) -> str:
    """`readme` with `text` between its markers; ReportError unless it has each marker once, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ReportError(f"README.md must have {BEGIN} and then {END}, each once")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """--readme rewrites the block, --check compares it: 1 when it is stale. 2 when there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--readme", action="store_true", help="rewrite the block in README.md")
    what.add_argument("--check", action="store_true", help="exit with 1 when the block is not what --readme would write")
    options = parser.parse_args(program(argv))
    path = root / "README.md"
    try:
        if not path.exists():
            raise ReportError("README.md is missing")
        present = path.read_text()
        wanted = with_block(present, block(root))
    except ReportError as error:
        say(f"benchmarks.report: {error}")
        return 2
    if options.check:
        say("README.md is up to date" if present == wanted else "README.md is stale: run python -m benchmarks.report --readme")
        return int(present != wanted)
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
