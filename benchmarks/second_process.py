"""`python -m benchmarks.second_process --workload NAME --variant NAME`: what a later process pays, with the compile caches that another one left.

benchmarks.models starts it, for `--second-process`, with the caches' directories in the environment. The last line of its output is JSON: seconds
of the first call (`compile_s`) and of everything before it (`start_s`: imports, building the model, quantizing), graphs that were compiled anew,
cache hits, and how many kernels were timed again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch

from . import common
from .model_rows import first_call, prepared, setting_of
from .variants import VARIANTS
from .workloads import TINY, WORKLOADS

TIMEOUT_S = 300


class SecondProcessError(RuntimeError):
    """The second process failed; the message is the last line that it wrote."""


def run_again(workload: str, variant: str, device: torch.device) -> dict[str, Any]:
    """The record of a process started here, with this process's environment, and the `compile_s` of one before it, which is not counted.

    What a process finds out once (the CPU's instruction sets, Triton's driver stub) it stores in the caches that it has then: a benchmark that goes
    from one empty directory to the next has it in memory, and the first process after it must find it out anew.
    """
    first, last = (_run(workload, variant, device) for _ in range(2))
    return last | {"before": first}


def _run(workload: str, variant: str, device: torch.device) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.second_process", "--workload", workload, "--variant", variant, "--device", str(device)]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise SecondProcessError(f"second process: {lines[-1]}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def measure(workload: str, variant: str, device: torch.device, started: float) -> dict[str, Any]:
    """Build, prepare and call once; what it took, from `started` on."""
    from torch._dynamo.utils import counters

    chosen = next(each for each in (*WORKLOADS, *TINY) if each.name == workload)
    way = next(each for each in VARIANTS if each.name == variant)
    with torch.no_grad():
        setting = setting_of(chosen, chosen.make(device, common.float_dtype(device)), device)
        first = first_call(setting, way, prepared(setting, way))
    hits = {"graphs": counters["inductor"]["fxgraph_cache_hit"], "autograd": counters["aot_autograd"]["autograd_cache_hit"]}
    return {
        "compile_s": first.seconds, "start_s": time.monotonic() - started - first.seconds, "graphs_compiled": first.report.graphs, "hits": hits,
        "tuned": first.tuned,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure and print the record as JSON."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.second_process", description=__doc__)
    parser.add_argument("--workload", required=True, choices=[each.name for each in (*WORKLOADS, *TINY)])
    parser.add_argument("--variant", required=True, choices=[each.name for each in VARIANTS])
    parser.add_argument("--device", required=True)
    options = parser.parse_args(common.program(argv))
    device = torch.device(options.device)
    common.prepare(device)
    print(json.dumps(measure(options.workload, options.variant, device, started)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
