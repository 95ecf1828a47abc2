"""Tables of result files, for the terminal and for markdown: times, ratios, share of the roofline."""

from __future__ import annotations

import math
from typing import Any

from .cases import GROUPS, TAILS, Case
from .common import OK, REFUSED, UNAVAILABLE

Table = tuple[list[str], list[list[str]]]
BASELINE, OURS = "stock", "ours"
RIVALS = ("stock", "fp8", "torchao", "int_mm")


def text(header: list[str], rows: list[list[str]]) -> str:
    """A table in aligned columns: the first left, the others right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = []
    for line in (header, *rows):
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """The same as a markdown table."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def by_case(result: dict[str, Any]) -> dict[Case, dict[str, list[dict[str, Any]]]]:
    """The rows of a GEMM result, by case and group; cases outside GROUPS first, then group by group with growing M, then those with a tail."""
    grouped: dict[Case, dict[str, list[dict[str, Any]]]] = {}
    for row in result["rows"]:
        case = Case(row["m"], row["n"], row["k"], TAILS[row["tail"]])
        grouped.setdefault(case, {}).setdefault(row["group"], []).append(row)
    return dict(sorted(grouped.items(), key=lambda item: _order(item[0])))


def _order(case: Case) -> tuple[int, int, int, int]:
    place = next((index for index, belongs in enumerate(GROUPS.values()) if belongs(case)), -1 if case.tail.name == "plain" else len(GROUPS))
    return place, case.m, case.n, case.k


def best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest right row, or None."""
    right = [row for row in rows if row["status"] == OK]
    return min(right, key=lambda row: row["ms"]) if right else None


def ratio(groups: dict[str, list[dict[str, Any]]], rival: str, ours: str = OURS) -> float | None:
    """How many times as fast as a rival group's best we are, or None where one of the two has no right result."""
    mine, theirs = best(groups.get(ours, [])), best(groups.get(rival, []))
    return theirs["ms"] / mine["ms"] if mine and theirs else None


def cell(rows: list[dict[str, Any]], scale: float, digits: int) -> str:
    """A group's time, or what kept it from having one; a failure stands in capitals."""
    if (row := best(rows)) is not None:
        return f"{row['ms'] * scale:.{digits}f}"
    statuses = {row["status"] for row in rows}
    if not statuses or statuses == {UNAVAILABLE}:
        return "-"
    return "refused" if statuses <= {REFUSED, UNAVAILABLE} else "FAILED"


def times(value: float | None) -> str:
    """A ratio as it stands in a table."""
    return "-" if value is None else f"{value:.2f}x"


def _present(result: dict[str, Any]) -> list[str]:
    """Groups with at least one row that could run, in the order of the run."""
    return list(dict.fromkeys(row["group"] for row in result["rows"] if row["status"] != UNAVAILABLE))


def gemm(result: dict[str, Any], brief: bool = False) -> Table:
    """Microseconds of every group's fastest peer, our ratio to the rivals, our share of the roofline; `brief` leaves our other kernels out."""
    present = [name for name in _present(result) if not brief or name in (OURS, *RIVALS)]
    rivals = [name for name in RIVALS if name in present]
    names = {"stock": f"best {result['float']}"}
    header = ["M x N x K, us", *(names.get(name, name) for name in present), *(f"vs {names.get(name, name)}" for name in rivals), "of roofline"]
    rows = []
    for case, groups in by_case(result).items():
        mine = best(groups.get(OURS, []))
        share = mine["roofline_share"] if mine else None
        rows.append([
            case.label, *(cell(groups.get(name, []), 1e3, 1) for name in present), *(times(ratio(groups, name)) for name in rivals),
            "-" if share is None else f"{share:.0%}",
        ])  # fmt: skip
    return header, rows


def gemm_means(result: dict[str, Any]) -> list[tuple[str, str, float, float, int]]:
    """(cases, rival, geometric mean of our ratio, smallest, number of cases) for each group of cases and rival that has any."""
    found = []
    for name, belongs in GROUPS.items():
        for rival in RIVALS:
            ratios = [ratio(groups, rival) for case, groups in by_case(result).items() if belongs(case)]
            known = [each for each in ratios if each is not None]
            if known:
                found.append((name, rival, math.exp(sum(map(math.log, known)) / len(known)), min(known), len(known)))
    return found


def means(result: dict[str, Any]) -> Table:
    """Our speed as a multiple of each rival's over a range of M: geometric mean, smallest, and of how many cases."""
    found = gemm_means(result)
    rivals = [rival for rival in RIVALS if any(each[1] == rival for each in found)]
    cells = {(name, rival): f"{mean:.2f}x, least {least:.2f}x of {count}" for name, rival, mean, least, count in found}
    names = {"stock": f"best {result['float']}"}
    header = ["geometric mean", *(f"vs {names.get(rival, rival)}" for rival in rivals)]
    return header, [[name, *(cells.get((name, rival), "-") for rival in rivals)] for name in dict.fromkeys(each[0] for each in found)]


def notes(result: dict[str, Any]) -> list[str]:
    """What a GEMM table does not show: who was left out and why, how times were taken."""
    return left_out(result, "peer")


def left_out(result: dict[str, Any], name: str) -> list[str]:
    """Lines that say who could not run and why, what the budget left out, and how times were taken."""
    absent: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["status"] == UNAVAILABLE and row[name] not in absent.setdefault(row["reason"], []):
            absent[row["reason"]].append(row[name])
    lines = [f"left out: {', '.join(names)}: {reason}" for reason, names in absent.items()]
    if result["left_out"]:
        lines.append(f"not reached: {', '.join(result['left_out'])}")
    return lines + [f"timed: {method}" for method in dict.fromkeys(row["method"] for row in result["rows"] if row["status"] == OK)]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _beside(row: dict[str, Any], stock: list[dict[str, Any]], name: str) -> str:
    """A value, and for others than stock rows how many times the least that a stock row has it is."""
    least = min((each[name] for each in stock if each[name] is not None), default=None)
    if row[name] is None or least is None or row["group"] == BASELINE:
        return _number(row[name], 1)
    return f"{row[name]:.1f} ({times(row[name] / least)})"


def _compiled(row: dict[str, Any], stock: list[dict[str, Any]]) -> str:
    if row["compile_s"] is None or not row["cold"]:
        return _number(row["compile_s"], 1) + ("" if row["compile_s"] is None else " warm")
    return _beside(row, [each for each in stock if each["cold"] and each["mode"] == "default"], "compile_s")


def _second(row: dict[str, Any]) -> str:
    """Seconds of a second process, and how often it tuned a product or another kernel."""
    return "-" if "second" not in row else f"{row['second']['compile_s']:.1f}, {tuned_again(row['second'])} tuned"


def tuned_again(second: dict[str, Any]) -> int:
    """How often a second process tuned a product or another kernel. A graph from the cache counts the products that its compilation tuned."""
    tuned = second["tuned"]
    return int(tuned["others"]) + (int(tuned["products"]) if second["graphs_compiled"] else 0)


def models(result: dict[str, Any]) -> Table:
    """One line for each workload and variant; the ratio is to the workload's fastest stock variant.

    In brackets: seconds of a cold compilation as a multiple of stock-default's cold ones, memory as one of the least that a stock variant takes.
    """
    again = any("second" in row for row in result["rows"])
    measures = ["compile s", *["2nd process s"] * again, "peak MB", "weights MB", "SQNR dB", "kernels", "linears"]
    header = ["workload, variant", "ms", "p20..p80", f"vs best {result['float']}", *measures]
    rows = []
    for row in sorted(result["rows"], key=lambda each: (each["workload_index"], each["variant_index"])):
        first = f"{row['workload']}, {row['variant']}"
        if row["status"] != OK:
            rows.append([first, row["status"] if row["status"] == UNAVAILABLE else "FAILED", *["-"] * (len(header) - 2)])
            continue
        stock = [each for each in result["rows"] if each["workload"] == row["workload"] and each["group"] == BASELINE and each["status"] == OK]
        base = best(stock)
        linears = "-" if row["linears"] is None else f"{row['linears']['rewritten']}/{row['linears']['present']}"
        rows.append([
            first, f"{row['ms']:.3f}", f"{row['ms_p20']:.3f}..{row['ms_p80']:.3f}", times(base["ms"] / row["ms"] if base else None),
            _compiled(row, stock), *[_second(row)] * again, _beside(row, stock, "peak_mb"), _beside(row, stock, "weights_mb"),
            _number(row["sqnr_db"], 1), "-" if row["kernels"] is None else str(row["kernels"]), linears,
        ])  # fmt: skip
    return header, rows


def of_turns(result: dict[str, Any]) -> dict[str, Any]:
    """A result of benchmarks.turns with what those of benchmarks.models have besides: groups, and the order of the run."""
    workloads = list(dict.fromkeys(row["workload"] for row in result["rows"]))
    places = [
        {"group": row["variant"].partition("-")[0], "workload_index": workloads.index(row["workload"]), "variant_index": i}
        for i, row in enumerate(result["rows"])
    ]
    return result | {"rows": [row | place for row, place in zip(result["rows"], places, strict=True)]}


def turns(result: dict[str, Any]) -> Table:
    """One line for each workload and variant; the ratio is to the workload's fastest stock variant."""
    header = ["workload, variant", "ms", "p20..p80", f"vs best {result['float']}", "compile s", "SQNR dB"]
    rows, known = [], of_turns(result)["rows"]
    for row in known:
        base = best([each for each in known if each["workload"] == row["workload"] and each["group"] == BASELINE])
        if row["status"] != OK:
            rows.append([row["label"], "FAILED", *["-"] * (len(header) - 2)])
            continue
        rows.append([
            row["label"], f"{row['ms']:.3f}", f"{row['ms_p20']:.3f}..{row['ms_p80']:.3f}", times(base["ms"] / row["ms"] if base else None),
            f"{row['compile_s']:.1f}", _number(row["sqnr_float32_db"], 1),
        ])  # fmt: skip
    return header, rows


def accuracy(result: dict[str, Any]) -> Table:
    """One line for each subject and scheme: perplexity and what it costs, noise of the output, and the noisiest and the median layer."""
    header = ["subject, scheme", "perplexity", "vs float32", "output SQNR dB", "median layer dB", "worst layer dB", "worst layer", "weights MB"]
    rows = []
    for row in sorted(result["rows"], key=lambda each: (each["subject_index"], each["scheme_index"])):
        first = f"{row['subject']}, {row['scheme']}"
        if row["status"] != OK:
            rows.append([first, row["status"] if row["status"] == UNAVAILABLE else "FAILED", *["-"] * (len(header) - 2)])
            continue
        layers = sorted((value, name) for name, value in row["layers"].items() if value is not None)
        worst, name = layers[0] if layers else (None, "-")
        rows.append([
            first, f"{row['perplexity']:.4f}", f"{row['perplexity'] / row['perplexity_float32'] - 1:+.2%}", _number(row["sqnr_db"], 1),
            _number(layers[len(layers) // 2][0] if layers else None, 1), _number(worst, 1), name, _number(row["weights_mb"], 1),
        ])  # fmt: skip
    return header, rows


def accuracy_notes(result: dict[str, Any]) -> list[str]:
    """What perplexity stands for, who could not run, and what the budget left out."""
    lines = [
        "MiniLM's perplexity: exp of the loss that it was trained on, which of all second halves of paragraphs goes with a first half",
        "random models' perplexity: exp of the cross-entropy to the float32 model's own next-token distribution; "
        "a few channels of their activations are planted 30 times larger",
        "a layer's SQNR: its output on its input in the float model, against the float layer's; the output's: against float32, all layers together",
    ]
    absent = {row["reason"]: row["subject"] for row in result["rows"] if row["status"] == UNAVAILABLE}
    lines += [f"left out: {subject}: {reason}" for reason, subject in absent.items()]
    return lines + ([f"not reached: {', '.join(result['left_out'])}"] if result["left_out"] else [])


def experts(result: dict[str, Any]) -> Table:
    """One line for each case and variant of a layer of experts; the ratio is to the case's fastest stock variant."""
    header = ["layer of experts, variant", "us", "p20..p80", f"vs best {result['float']}", "of roofline", "cosine"]
    rows = []
    for row in sorted(result["rows"], key=lambda each: (each["workload_index"], each["variant_index"])):
        first = f"{row['workload']}, {row['variant']}"
        if row["status"] != OK:
            rows.append([first, row["status"] if row["status"] == REFUSED else "FAILED", *["-"] * (len(header) - 2)])
            continue
        base = best([each for each in result["rows"] if each["workload"] == row["workload"] and each["group"] == BASELINE])
        share = row["roofline_share"]
        rows.append([
            first, f"{row['ms'] * 1e3:.1f}", f"{row['ms_p20'] * 1e3:.1f}..{row['ms_p80'] * 1e3:.1f}", times(base["ms"] / row["ms"] if base else None),
            "-" if share is None else f"{share:.0%}", f"{row['cosine']:.6f}",
        ])  # fmt: skip
    return header, rows
