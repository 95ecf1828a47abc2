"""`python -m benchmarks.plot RESULT.json ...`: the PNG of a result file, beside it. Speed against peers, and the roofline, or the models' times."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import tables
from .common import FLOAT_BYTES, OK, program, read_json, say
from .roofline import CEILINGS

COLORS = {
    "ours": "#1259b0", "ours triton": "#5b9bd5", "ours torch": "#a9c9ea",
    "stock": "#6b6b6b", "fp8": "#d9801e", "int_mm": "#8a5aa8", "torchao": "#2a9d6f", "pt2e": "#c1443c",
}  # fmt: skip
MARKERS = {"ours": "o", "ours triton": "^", "ours torch": "v", "stock": "s", "fp8": "D", "int_mm": "P", "torchao": "X"}
ROOFLINE_GROUPS = ("stock", "fp8", "ours")


def label(group: str, result: dict[str, Any]) -> str:
    """A group's name in a legend."""
    stock = f"{result['float']}, fastest stock mode"
    names = {"stock": stock, "fp8": "fp8 rowwise", "int_mm": "torch._int_mm, stock", "torchao": "torchao Triton int8"}
    return names.get(group, group)


def title(result: dict[str, Any]) -> str:
    """What was measured on, for a figure's head."""
    record = result["environment"]
    versions = ", ".join(f"{name} {record[name]}" for name in ("torch", "triton") if record[name])
    return f"{record['device']['name']}, {versions}, {record['date'][:10]}"


def groups_of(result: dict[str, Any]) -> list[str]:
    """Groups with a right result, those with a colour of their own first and in its order."""
    present = {row["group"] for row in result["rows"] if row["status"] == OK}
    return [name for name in COLORS if name in present] + sorted(present - COLORS.keys())


def draw_speed(axes: Axes, result: dict[str, Any]) -> None:
    """One line a case: every group's speed as a multiple of the fastest stock float's."""
    cases = list(tables.by_case(result).items())
    for group in (name for name in groups_of(result) if name != tables.BASELINE):
        points = [(tables.ratio(groups, tables.BASELINE, group), y) for y, (_, groups) in enumerate(cases)]
        known = [(x, y) for x, y in points if x is not None]
        if known:
            axes.scatter(*zip(*known, strict=True), s=58 if group == "ours" else 36, color=COLORS.get(group), marker=MARKERS.get(group, "o"),
                         label=label(group, result), zorder=4 if group == "ours" else 3)  # fmt: skip
    axes.axvline(1.0, color=COLORS["stock"], linewidth=1.5, label=label("stock", result))
    axes.set_yticks(range(len(cases)), [case.label for case, _ in cases], fontsize=8)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_xlabel(f"speed, multiple of {label('stock', result)}")
    axes.set_xlim(left=0)
    axes.grid(axis="both", alpha=0.3)


def draw_roofline(axes: Axes, result: dict[str, Any]) -> None:
    """TOP/s over operations per byte, under the device's INT8 roofline where it is known. Every group stands at the INT8 case's intensity."""
    out = FLOAT_BYTES[result["float"]]
    cases = list(tables.by_case(result).items())
    for place, group in enumerate(name for name in ROOFLINE_GROUPS if name in groups_of(result)):
        # Side by side, or the groups of one case would hide each other.
        shift = 1.16 ** (place - 1)
        points = []
        for case, groups in cases:
            if (row := tables.best(groups.get(group, []))) is not None:
                points.append((case.operations / case.bytes_moved(case.tail.out_bytes(out)) * shift, row["tops"]))
        axes.scatter(*zip(*points, strict=True), s=34 if group == "ours" else 20, color=COLORS[group], marker=MARKERS[group], zorder=3)
    ceiling = CEILINGS.get(result["environment"]["device"]["name"])
    if ceiling is not None:
        low, high = axes.get_xlim()
        knee = ceiling.int8_ops / ceiling.bandwidth
        xs = [max(low, 1.0), knee, max(high, 2 * knee)]
        axes.plot(xs, [min(ceiling.int8_ops, x * ceiling.bandwidth) / 1e12 for x in xs], color="black", linewidth=1.2)
        axes.annotate("INT8 roofline (datasheet)", (knee, ceiling.int8_ops / 1e12), (-8, 2), "data", "offset points", ha="right", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte of the INT8 case")
    axes.set_ylabel("TOP/s")
    axes.set_title(", ".join(label(name, result) for name in ROOFLINE_GROUPS if name in groups_of(result)), fontsize=9)
    axes.grid(which="both", alpha=0.25)
    axes.set_box_aspect(1)
    axes.set_anchor("N")


def gemm_figure(result: dict[str, Any]) -> Figure:
    """Speed against every peer on the left, the roofline on the right."""
    count = len(tables.by_case(result))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, max(4.8, 1.9 + 0.26 * count)), width_ratios=(3, 2), layout="constrained")
    draw_speed(left, result)
    draw_roofline(right, result)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(f"Scaled INT8 product, M x N x K: {title(result)}")
    return figure


def draw_workload(axes: Axes, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """One bar a variant: milliseconds, and the speed as a multiple of the fastest stock variant's."""
    rows = sorted(rows, key=lambda row: row["variant_index"])
    base = tables.best([row for row in rows if row["group"] == tables.BASELINE])
    longest = max(row["ms"] for row in rows)
    for y, row in enumerate(rows):
        spread = [[row["ms"] - row["ms_p20"]], [row["ms_p80"] - row["ms"]]]
        axes.barh(y, row["ms"], color=COLORS.get(row["group"]), xerr=spread, error_kw={"linewidth": 1})
        share = f" ({base['ms'] / row['ms']:.2f}x)" if base else ""
        axes.annotate(f"{row['ms']:.3f} ms{share}", (row["ms_p80"], y), (5, 0), "data", "offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.32)
    axes.set_title(rows[0]["workload"], fontsize=10)
    axes.set_xlabel(f"ms a forward, median (in brackets: times the speed of the fastest stock {result['float']} variant)", fontsize=8)
    axes.grid(axis="x", alpha=0.3)


def models_figure(result: dict[str, Any], head: str = "Models end to end") -> Figure:
    """One panel a workload."""
    rows = [row for row in result["rows"] if row["status"] == OK]
    workloads = list(dict.fromkeys(row["workload"] for row in sorted(rows, key=lambda row: row["workload_index"])))
    columns = min(2, len(workloads))
    lines = -(-len(workloads) // columns)
    most = max(sum(row["workload"] == name for row in rows) for name in workloads)
    figure, axes = plt.subplots(lines, columns, figsize=(7.2 * columns, lines * (1.4 + 0.3 * most) + 0.5), squeeze=False, layout="constrained")
    for place, name in zip(axes.flat, workloads, strict=False):
        draw_workload(place, [row for row in rows if row["workload"] == name], result)
    for place in axes.flat[len(workloads):]:  # fmt: skip
        place.set_axis_off()
    figure.suptitle(f"{head}: {title(result)}")
    return figure


def draw_layers(axes: Axes, rows: list[dict[str, Any]], colors: dict[str, Any]) -> None:
    """SQNR of every layer, in the order of the model, one line a scheme."""
    for row in rows:
        known = [(x, value) for x, value in enumerate(row["layers"].values()) if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", markersize=3, linewidth=1, color=colors[row["scheme"]])
    axes.set_ylabel("SQNR of a layer, dB", fontsize=8)
    axes.set_xlabel("quantized linear, in the order of the model", fontsize=8)
    axes.grid(alpha=0.3)


def draw_perplexity(axes: Axes, rows: list[dict[str, Any]], colors: dict[str, Any]) -> None:
    """What each scheme adds to the perplexity, in percent."""
    shares = [(row["perplexity"] / row["perplexity_float32"] - 1) * 100 for row in rows]
    axes.barh(range(len(rows)), shares, color=[colors[row["scheme"]] for row in rows])
    for y, (row, share) in enumerate(zip(rows, shares, strict=True)):
        axes.annotate(f"{row['perplexity']:.4g} ({share:+.2f}%)", (max(share, 0.0), y), (4, 0), "data", "offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["scheme"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    low, high = min([0.0, *shares]), max([1e-3, *shares])
    axes.set_xlim(low, high + 0.45 * (high - low))
    axes.set_xlabel("perplexity, and what is added to float32's, %", fontsize=8)
    axes.grid(axis="x", alpha=0.3)


def accuracy_figure(result: dict[str, Any]) -> Figure:
    """A line of two panels a subject: perplexity with the schemes' names in the layers' colours, and the layers."""
    rows = sorted((row for row in result["rows"] if row["status"] == OK), key=lambda row: (row["subject_index"], row["scheme_index"]))
    subjects, schemes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("subject", "scheme"))
    palette = plt.get_cmap("tab10")
    colors = {scheme: palette(i % 10) for i, scheme in enumerate(schemes)}
    figure, axes = plt.subplots(len(subjects), 2, figsize=(13, 0.6 + 3.4 * len(subjects)), squeeze=False, layout="constrained")
    for (left, right), subject in zip(axes, subjects, strict=True):
        own = [row for row in rows if row["subject"] == subject]
        draw_perplexity(left, own, colors)
        draw_layers(right, own, colors)
        left.set_title(subject, fontsize=10)
    figure.suptitle(f"Accuracy: {title(result)}")
    return figure


def experts_figure(result: dict[str, Any]) -> Figure:
    """One panel a layer of experts and number of tokens."""
    return models_figure(result, "Layers of experts")


def turns_figure(result: dict[str, Any]) -> Figure:
    """One panel a workload."""
    return models_figure(tables.of_turns(result), "Models by turns")


FIGURES = {"gemm": gemm_figure, "models": models_figure, "turns": turns_figure, "accuracy": accuracy_figure, "experts": experts_figure}


def draw(path: Path) -> Path | None:
    """Write the PNG of a result file beside it and return its path; None, said aloud, when no row of the result is right."""
    result = read_json(path)
    if not any(row["status"] == OK for row in result["rows"]):
        say(f"no right result in {path.name}: nothing to draw")
        return None
    figure = FIGURES[result["kind"]](result)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


def main(argv: list[str] | None = None) -> int:
    """Draw every result file that is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    drawn = [draw(path) for path in parser.parse_args(program(argv)).results]
    return 0 if all(drawn) else 1


if __name__ == "__main__":
    sys.exit(main())
