"""From measured variants to rows, bars and the printed table; the same as JSON."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .measure import KERNELS_ARE
from .variants import Variant

__all__ = ["BARS", "Row", "correctness", "make_rows", "speed", "table", "write_json"]

BARS = {"mean_cosine": 0.997, "worst_cosine": 0.99, "speedup_on_cpu_with_vnni": 2.4}
"""What an int8 row is to reach; the first two, and every linear rewritten, decide the exit status."""


@dataclass
class Row:
    """One line of the table. Milliseconds are of one batch; p10 and p90 are percentiles; speedup is over the fastest stock torch.compile there."""

    name: str
    device: str
    is_int8: bool
    median_ms: float
    p10_ms: float
    p90_ms: float
    speedup: float
    megabytes: float
    mean_cosine: float
    worst_cosine: float
    neighbour_agreement: float
    linears: int
    rewritten: int | None
    kernels: int
    compile_seconds: float
    all_ms: list[float]


def _nearest(embeddings: Tensor) -> Tensor:
    """For each embedding the index of the most similar other one."""
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-2.0).argmax(1)


def _percentiles(milliseconds: list[float]) -> list[float]:
    """10th, 50th and 90th."""
    return torch.quantile(torch.tensor(milliseconds, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()


def make_rows(variants: list[Variant], reference: Tensor) -> list[Row]:
    """Rows of the variants of one device; `reference` is what eager float32 embeds, [paragraphs, 384]."""
    stock = min(_percentiles(variant.milliseconds)[1] for variant in variants if variant.is_stock)
    return [_row(variant, reference, stock) for variant in variants]


def _row(variant: Variant, reference: Tensor, stock_ms: float) -> Row:
    p10, median, p90 = _percentiles(variant.milliseconds)
    embeddings = torch.cat(variant.embeddings)
    cosine = F.cosine_similarity(embeddings.double(), reference.double())
    return Row(
        name=variant.name,
        device=variant.device,
        is_int8=variant.is_int8,
        median_ms=median,
        p10_ms=p10,
        p90_ms=p90,
        speedup=stock_ms / median,
        megabytes=variant.megabytes,
        mean_cosine=cosine.mean().item(),
        worst_cosine=cosine.min().item(),
        neighbour_agreement=(_nearest(embeddings) == _nearest(reference)).double().mean().item(),
        linears=variant.linears,
        rewritten=variant.rewritten,
        kernels=variant.kernels,
        compile_seconds=variant.compile_seconds,
        all_ms=variant.milliseconds,
    )


def table(rows: list[Row]) -> str:
    """The rows of one device as text."""
    header = ("", "ms/batch", "(p10 - p90)", "x stock", "MB", "cosine mean", "worst", "same neighbour", "linears", "kernels")
    cells = [header]
    for row in rows:
        rewritten = "-" if row.rewritten is None else f"{row.rewritten} of {row.linears}"
        cells.append(
            (
                row.name,
                f"{row.median_ms:.2f}",
                f"({row.p10_ms:.2f} - {row.p90_ms:.2f})",
                f"{row.speedup:.2f}",
                f"{row.megabytes:.1f}",
                f"{row.mean_cosine:.5f}",
                f"{row.worst_cosine:.5f}",
                f"{row.neighbour_agreement:.1%}",
                rewritten,
                str(row.kernels),
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in cells]
    rule = "-" * len(lines[0])
    device = rows[0].device
    return "\n".join([f"On {device_name(device)}", rule, lines[0], rule, *lines[1:], rule, f"kernels: {KERNELS_ARE[device]}"])


def correctness(rows: list[Row]) -> list[tuple[bool, str]]:
    """Whether each int8 row holds the bars that decide the exit status, and a sentence that says so."""
    found = []
    for row in rows:
        if not row.is_int8:
            continue
        where = f"{row.name} on {row.device}"
        found.append((row.rewritten == row.linears, f"{where}: {row.rewritten} of {row.linears} linears rewritten"))
        for what in ("mean_cosine", "worst_cosine"):
            value, bar = getattr(row, what), BARS[what]
            found.append((value >= bar, f"{where}: {what.replace('_', ' ')} {value:.5f}, at least {bar} wanted"))
    return found


def speed(rows: list[Row]) -> list[str]:
    """What was reached of the CPU's speed bar; it is a statement about AVX512-VNNI, and no failure elsewhere or on a busy machine."""
    bar = BARS["speedup_on_cpu_with_vnni"]
    lines = []
    for row in rows:
        if row.is_int8 and row.device == "cpu":
            verdict = "reached" if row.speedup >= bar else "not reached"
            cpu = "which this CPU has" if has_vnni() else "which this CPU lacks"
            lines.append(f"{row.name}: {row.speedup:.2f} times stock torch.compile in float32; {bar} {verdict} (wanted with AVX512-VNNI, {cpu})")
    return lines


def _cpu_info(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(key):
            return line.partition(":")[2].strip()
    return ""


def has_vnni() -> bool:
    """Whether the CPU multiplies int8 with AVX512-VNNI."""
    return "avx512_vnni" in _cpu_info("flags").split()


def device_name(device: str) -> str:
    """The device in words: model, and threads or type."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_info('model name') or platform.machine()}, {torch.get_num_threads()} threads, AVX512-VNNI: {'yes' if has_vnni() else 'no'}"


def write_json(path: Path, rows: list[Row], settings: dict[str, Any]) -> None:
    """Rows with every single time, where they were measured, and the bars with their outcome."""
    data = {
        "settings": settings,
        "devices": {device: device_name(device) for device in {row.device: None for row in rows}},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "kernels_are": KERNELS_ARE,
        "bars": BARS,
        "correctness": [{"holds": holds, "what": what} for holds, what in correctness(rows)],
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(data, indent=1) + "\n")
