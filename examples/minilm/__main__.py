"""Measure MiniLM in float and in int8 on this machine: a table on stdout, JSON and a PNG chart in a folder."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch._inductor import config as inductor_config

from .chart import write_chart
from .encoder import load_encoder, tokenize
from .measure import prepare, run_rounds
from .report import Row, correctness, make_rows, speed, table, write_json
from .text import samples
from .variants import Variant, cpu_variants, gpu_variants, quantized


@dataclass(frozen=True)
class Settings:
    """How much is measured: of the model's 6 layers, and of the text. A round takes one batch through every variant."""

    layers: int = 6
    batch_size: int = 32
    tokens: int = 128
    paragraphs: int = 512
    calibration: int = 128
    cpu_rounds: int = 24
    gpu_rounds: int = 320


QUICK = Settings(layers=1, batch_size=4, tokens=64, paragraphs=16, calibration=16, cpu_rounds=4, gpu_rounds=8)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.minilm", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one layer and a few small batches: shows that everything runs, its figures say little")
    parser.add_argument("--output", type=Path, default=Path("demo_results"), help="folder for minilm.json and minilm.png (default: %(default)s)")
    parser.add_argument("--device", choices=("all", "cpu", "cuda"), default="all", help="all: the CPU, and the GPU where there is one")
    parsed = parser.parse_args()
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA GPU that torch can use")
    return parsed


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _measure(settings: Settings, device: str) -> list[Row]:
    _say("load MiniLM and tokenize paragraphs of pydoc_data.topics")
    encoder = load_encoder(settings.layers)
    texts, calibration_texts = samples(settings.paragraphs, settings.calibration)
    batches = tokenize(texts, settings.batch_size, settings.tokens)
    int8 = quantized(encoder, tokenize(calibration_texts, settings.batch_size, settings.tokens))
    cpu = cpu_variants(encoder, int8)
    groups: list[tuple[list[Variant], int]] = []
    if device != "cuda":
        groups.append((cpu, settings.cpu_rounds))
    if device != "cpu" and torch.cuda.is_available():
        groups.append((gpu_variants(encoder, int8), settings.gpu_rounds))
    if device == "cuda":
        run_rounds(cpu[:1], batches, len(batches))  # eager float32 is what all embeddings are compared with
    for variants, rounds in groups:
        prepare(variants, batches[0])
        run_rounds(variants, batches, rounds)
    reference = torch.cat(cpu[0].embeddings)
    return [row for variants, _ in groups for row in make_rows(variants, reference)]


def _print(rows: list[Row]) -> bool:
    """Print tables and bars; whether all bars of correctness hold."""
    for device in {row.device: None for row in rows}:
        print("\n" + table([row for row in rows if row.device == device]))
    print()
    outcome = correctness(rows)
    for holds, what in outcome:
        print(f"{'holds' if holds else 'FAILS'}  {what}")
    for line in speed(rows):
        print(f"speed  {line}")
    return all(holds for holds, _ in outcome)


def main() -> int:
    """Exit status: 0 when the bars of correctness hold, 1 when one does not."""
    arguments = _arguments()
    settings = QUICK if arguments.quick else Settings()
    # Inductor's C++ kernels show in a profile, and can be counted, only when they are built for it; it costs about a microsecond a call.
    with inductor_config.patch({"cpp.enable_kernel_profile": True}):
        rows = _measure(settings, arguments.device)
    all_hold = _print(rows)
    arguments.output.mkdir(parents=True, exist_ok=True)
    amounts = f"batch {settings.batch_size} x {settings.tokens} tokens, {settings.paragraphs} paragraphs of pydoc_data.topics"
    subtitle = f"{amounts}, layers: {settings.layers}, torch {torch.__version__}"
    write_json(arguments.output / "minilm.json", rows, asdict(settings))
    write_chart(arguments.output / "minilm.png", rows, subtitle)
    print(f"\nwritten: {arguments.output / 'minilm.json'}, {arguments.output / 'minilm.png'}")
    return 0 if all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
