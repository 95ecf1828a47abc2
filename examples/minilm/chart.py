"""The table as a picture: time, distance from float32 and size, one row of panels for each device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .report import BARS, Row, device_name

__all__ = ["draw", "write_chart"]

FLOAT, INT8, LIGHT_FLOAT, LIGHT_INT8, BAR = "#7a8793", "#d9622b", "#c9d0d6", "#f0b899", "#2b2b2b"
ROOM_FOR_LABELS = 1.45


def write_chart(path: Path, rows: list[Row], subtitle: str) -> None:
    """Write the chart of `rows` as a PNG."""
    draw(rows, subtitle).savefig(path)


def draw(rows: list[Row], subtitle: str) -> Figure:
    """A figure with three panels for each device among `rows`."""
    devices = list({row.device: None for row in rows})
    heights = [1.6 + 0.5 * sum(row.device == device for row in rows) for device in devices]
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(16, sum(heights) + 0.8), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(f"MiniLM sentence encoder, INT8 against float\n{subtitle}", fontsize=12)
        parts = figure.subfigures(len(devices), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, device in zip(parts, devices, strict=True):
            _device(part, [row for row in rows if row.device == device])
    return figure


def _device(part: Any, rows: list[Row]) -> None:
    part.suptitle(device_name(rows[0].device), fontsize=10, color=BAR)
    time, distance, size = part.subplots(1, 3, sharey=True)
    _time(time, rows)
    _distance(distance, rows)
    _size(size, rows)
    time.set_yticks(range(len(rows)), [row.name for row in rows])
    time.set_ylim(len(rows) - 0.4, -0.6)
    for axes in (time, distance, size):
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=6)


def _colors(rows: list[Row]) -> list[str]:
    return [INT8 if row.is_int8 else FLOAT for row in rows]


def _time(axes: Any, rows: list[Row]) -> None:
    values = [row.median_ms for row in rows]
    spread = [[row.median_ms - row.p10_ms for row in rows], [row.p90_ms - row.median_ms for row in rows]]
    axes.barh(range(len(rows)), values, 0.6, color=_colors(rows), xerr=spread, ecolor=BAR, capsize=3)
    end = max(row.p90_ms for row in rows)
    for y, row in enumerate(rows):
        axes.text(row.p90_ms + 0.02 * end, y, f"{row.median_ms:.4g} ms, {row.speedup:.2f}x", va="center")
    axes.set_xlim(0, end * ROOM_FOR_LABELS)
    axes.set_title("ms a batch (median, p10 to p90), speed-up over stock", fontsize=10)


def _distance(axes: Any, rows: list[Row]) -> None:
    places = range(len(rows))
    worst = [1 - row.worst_cosine for row in rows]
    axes.barh(places, worst, 0.6, color=[LIGHT_INT8 if row.is_int8 else LIGHT_FLOAT for row in rows], label="worst paragraph")
    axes.barh(places, [1 - row.mean_cosine for row in rows], 0.3, color=_colors(rows), label="mean")
    end = max(1 - BARS["worst_cosine"], *worst)
    # On white, as the lines of the bars run behind the words.
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    for y, row in enumerate(rows):
        words = f"cosine {row.mean_cosine:.4f}, worst {row.worst_cosine:.4f}"
        axes.text(max(1 - row.worst_cosine, 0) + 0.03 * end, y, words, va="center", fontsize=9, bbox=paper)
    for name, style in (("mean_cosine", ":"), ("worst_cosine", "--")):
        label = f"bar: {name.replace('_', ' ')} {BARS[name]}"
        axes.axvline(1 - BARS[name], color=BAR, lw=1, ls=style, zorder=0, label=label)
    axes.set_xlim(0, end * 1.9)
    axes.set_title("1 - cosine similarity to eager float32 (less is better)", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=8, frameon=False)


def _size(axes: Any, rows: list[Row]) -> None:
    values = [row.megabytes for row in rows]
    axes.barh(range(len(rows)), values, 0.6, color=_colors(rows))
    for y, value in enumerate(values):
        axes.text(value + 0.02 * max(values), y, f"{value:.1f} MB", va="center")
    axes.set_xlim(0, max(values) * 1.3)
    axes.set_title("parameters and buffers, MB", fontsize=10)
