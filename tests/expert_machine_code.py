"""The expert kernels as machine code: launches recorded as they would be on a GPU, and compiled without one.

Run as a program it is the compiling half, in a process of its own that is free of Triton's interpreter: `python expert_machine_code.py JOBS RESULTS`.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from machine_code import ARCHITECTURES, MachineCode, measure
from torch import Tensor

_TYPES = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}


@dataclass(frozen=True)
class ExpertJob:
    """One launch of a kernel of int8_inductor.experts.kernels. functions: constants that are device functions, by name."""

    kernel: str
    signature: dict[str, str]
    constants: dict[str, int | bool]
    functions: dict[str, str]
    num_warps: int
    num_stages: int
    maxnreg: int | None
    capability: int


def record(call: Callable[..., Any], capability: int, *args: Any, **kwargs: Any) -> list[ExpertJob]:
    """The launches of a function of int8_inductor.experts.launch for tensors on the meta device, on a GPU of `capability`."""
    from int8_inductor.experts import launch

    jobs: list[ExpertJob] = []

    def recorded(
        kernel: Any,
        grid: tuple[int, ...],
        args: Sequence[Any],
        *,
        num_warps: int = 4,
        num_stages: int = 3,
        maxnreg: int | None = None,
        **constants: Any,
    ) -> None:
        names = list(inspect.signature(kernel.fn).parameters)
        assert names[len(args) :] == list(constants), "constants come in the kernel's order"
        signature = {name: _TYPES[each.dtype] if isinstance(each, Tensor) else "i32" for name, each in zip(names, args, strict=False)}
        constants |= {"PTX": True} if "PTX" in constants else {}
        functions = {name: each.__name__ for name, each in constants.items() if hasattr(each, "fn")}
        numbers = {name: each for name, each in constants.items() if name not in functions}
        signature |= dict.fromkeys(constants, "constexpr")
        jobs.append(ExpertJob(kernel.__name__, signature, numbers, functions, num_warps, num_stages, maxnreg, capability))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_launch", recorded)
        patch.setattr(launch, "_shared_memory", lambda device: ARCHITECTURES[capability])
        patch.setattr(launch, "_hopper", lambda device: capability == 90)
        call(*args, **kwargs)
    return jobs


def compile_all(jobs: Sequence[ExpertJob]) -> list[MachineCode]:
    """Compile `jobs` in one process without the interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "jobs.json"), Path(folder, "results.json")
        inputs.write_text(json.dumps([asdict(job) for job in jobs]))
        command = [sys.executable, __file__, str(inputs), str(outputs)]
        env |= {"TRITON_CACHE_DIR": folder, "TRITON_DISABLE_LINE_INFO": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return [MachineCode(**each) for each in json.loads(outputs.read_text())]


# The compiling half ---------------------------------------------------------------------------------------------------------------


def _compile(job: ExpertJob, folder: str, number: int) -> MachineCode:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from int8_inductor.experts import kernels

    kernel = getattr(kernels, job.kernel)
    names = kernel.arg_names
    values = job.constants | {name: getattr(kernels, function) for name, function in job.functions.items()}
    pointers = [names.index(name) for name, kind in job.signature.items() if kind.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature={name: job.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in values.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages, "maxnreg": job.maxnreg}
    return measure(triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=options), folder, number)


def main(inputs: str, outputs: str) -> None:
    """Compile the jobs in the file `inputs` and write what came out to `outputs`."""
    jobs = [ExpertJob(**each) for each in json.loads(Path(inputs).read_text())]
    folder = str(Path(inputs).parent)
    Path(outputs).write_text(json.dumps([asdict(_compile(job, folder, i)) for i, job in enumerate(jobs)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
