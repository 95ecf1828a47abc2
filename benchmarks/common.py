"""What both benchmarks share: the record of the environment, the time budget, failures, progress lines and result files."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"

FLOAT_BYTES = {"bf16": 2, "fp32": 4}
"""Bytes of an element, by the names that `dtype_name` gives."""
OK, WRONG, REFUSED, UNAVAILABLE, ERROR = "ok", "wrong", "refused", "unavailable", "error"
FAILURES = (WRONG, ERROR)


def peer_errors() -> tuple[type[BaseException], ...]:
    """What a peer may raise and be recorded as an error for, while the others go on: torch's own errors, wrong arguments, Triton's compiler."""
    errors: tuple[type[BaseException], ...] = (RuntimeError, ValueError, TypeError, AssertionError, ImportError)
    if importlib.util.find_spec("triton") is not None:
        from triton.errors import TritonError

        errors = (*errors, TritonError)
    return errors


def one_line(error: BaseException) -> str:
    """The type and the first line of an error's message, at most 200 characters, without directories."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return re.sub(r"(/[\w.+-]+)+/", "", f"{type(error).__name__}: {first.strip()}")[:200]


def float_dtype(device: torch.device) -> torch.dtype:
    """The float dtype that models run in: bfloat16 on a GPU, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def dtype_name(device: torch.device) -> str:
    """bf16 or fp32: the float rows' name in tables."""
    return "bf16" if device.type == "cuda" else "fp32"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """A command's output, or None where the command is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _device_record(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
        name = found.group(1) if found else platform.processor() or platform.machine()
        return {"type": "cpu", "name": name}
    properties = torch.cuda.get_device_properties(device)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}")
    return {
        "type": "cuda", "name": properties.name, "driver": driver, "cuda": torch.version.cuda, "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size, "memory_bytes": properties.total_memory,
    }  # fmt: skip


def _source_digest() -> str:
    """SHA-256 over the sources of int8_inductor and benchmarks: names the measured code where git is absent or the tree dirty."""
    digest = hashlib.sha256()
    for folder in ("int8_inductor", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def environment(device: torch.device, module: str, argv: list[str], commit: str | None = None) -> dict[str, Any]:
    """Where and with what a result was measured. `commit` is of a tree that came without its own .git; then nobody can say whether it is dirty."""
    head = _output("git", "rev-parse", "HEAD")
    status = _output("git", "status", "--porcelain")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": " ".join([*_switches(), shlex.join(["python", "-m", module, *_without_places(argv)])]),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "triton", "torchao", "timm", "transformers")},
        "device": _device_record(device), "threads": torch.get_num_threads(),
        "commit": commit or head, "dirty": bool(status) if head and not commit else None, "source_sha256": _source_digest(),
    }  # fmt: skip


def _switches() -> list[str]:
    """What holds kernels on a CPU to fewer instructions than it has, as it stands before a command."""
    return [f"{name}={shlex.quote(os.environ[name])}" for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA") if name in os.environ]


def _without_places(argv: list[str]) -> list[str]:
    """The arguments without --out DIR and --commit COMMIT: where a file was put is no part of a result, and the commit is recorded beside it."""
    left_out = ("--out", "--commit")
    kept: list[str] = []
    skip = False
    for each in argv:
        if not skip and not each.startswith(left_out):
            kept.append(each)
        skip = not skip and each in left_out
    return kept


class Budget:
    """Wall-clock seconds that a run may use. Asked between shapes: what was started is finished."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._start = seconds, time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def spent(self) -> bool:
        return self.elapsed >= self.seconds


def say(text: str) -> None:
    """A progress line, written at once."""
    print(text, flush=True)


def add_arguments(parser: argparse.ArgumentParser, seconds: float) -> None:
    """The options that both benchmarks take."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--seconds", type=float, default=seconds, help="start nothing new after this long (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the JSON and the PNG (default: benchmarks/results)")
    parser.add_argument("--commit", help="git commit of the tree, where it has no .git of its own")


def prepare(device: torch.device) -> None:
    """Start the pool of compile workers, so that the first shape does not pay for it, and keep autotuning's tables out of the output."""
    from torch._inductor import config as inductor_config
    from torch._inductor.async_compile import AsyncCompile

    inductor_config.autotune_num_choices_displayed = 0
    if device.type == "cuda":
        AsyncCompile.warm_pool()
        AsyncCompile.wait_pool_ready()


def choose(names: str | None, allowed: list[str], option: str) -> list[str]:
    """The comma-separated names of an option, checked; None stands for all."""
    if names is None:
        return allowed
    chosen = names.split(",")
    if unknown := [name for name in chosen if name not in allowed]:
        raise SystemExit(f"{option} must be from {', '.join(allowed)}, got {', '.join(unknown)}")
    return chosen


def result_path(kind: str, record: dict[str, Any], out: Path) -> Path:
    """<out>/<kind>-<device>-<date>.json"""
    device = re.sub(r"[^a-z0-9]+", "-", record["device"]["name"].lower()).strip("-")
    return out / f"{kind}-{device}-{re.sub('[^0-9TZ]', '', record['date'])}.json"


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result whole: a run that is killed while it writes leaves the last complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A result file as `write_json` left it; ValueError when it is not one."""
    result = json.loads(path.read_text())
    if not isinstance(result, dict) or not {"kind", "environment", "rows"} <= result.keys():
        raise ValueError(f"{path.name} must be a result of benchmarks.gemm, .models, .experts or .accuracy")
    return result


def exit_code(rows: list[dict[str, Any]]) -> int:
    """1 when any row is wrong or failed, else 0; the failures are said once more."""
    failed = [row for row in rows if row["status"] in FAILURES]
    for row in failed:
        say(f"FAILED {row['label']}: {row['status']}: {row['reason']}")
    return 1 if failed else 0


def program(argv: list[str] | None) -> list[str]:
    """The arguments given, or the process's own."""
    return sys.argv[1:] if argv is None else argv
