"""NVIDIA machine code without an NVIDIA GPU: from the Triton text that Inductor generated to a cubin, and what the cubin takes.

Run as a program it is the compiling half, in a process of its own that is free of Triton's interpreter: `python machine_code.py JOBS RESULTS`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Compute capability -> bytes of shared memory that one block can have."""


@dataclass(frozen=True)
class Job:
    """A generated kernel to compile: its Triton module, launch constants, and compute capability."""

    text: str
    num_warps: int
    num_stages: int
    capability: int


@dataclass(frozen=True)
class MachineCode:
    """shared: bytes a block. registers, stack: registers and bytes of local memory a thread. mma: instructions that multiply int8, as PTX names them.
    loop_spills: loads and stores of local memory inside a loop that multiplies. from_registers: products whose left operand is in registers.
    divisions: those of float32, as PTX names them. order: what waits for other kernels or lets them start, as PTX names it, and `memory` for the
    first access to memory that holds tensors, in order.
    """

    shared: int
    registers: int
    stack: int
    mma: list[str]
    loop_spills: int
    from_registers: int = 0
    divisions: tuple[str, ...] = ()
    order: Sequence[str] = ()


def generated_kernel(code: str) -> str:
    """The Triton module of the one template kernel in a module that Inductor generated."""
    modules = re.findall(r"async_compile\.triton\('triton_tem_\w+', '''(.*?)''', device_str", code, re.S)
    assert len(modules) == 1, f"{len(modules)} template kernels"
    return str(modules[0])


def with_constants(text: str, **constants: int) -> str:
    """A template kernel with other values for its compile-time constants, as another config sets them."""
    for name, value in constants.items():
        text, count = re.subn(rf"(\n    {name} : tl\.constexpr = )\w+", rf"\g<1>{value}", text)
        assert count == 1, f"{name} is set {count} times"
    return text


def compile_all(jobs: Sequence[Job]) -> list[MachineCode]:
    """Compile `jobs` in one process without the interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "jobs.json"), Path(folder, "results.json")
        inputs.write_text(json.dumps([asdict(job) for job in jobs]))
        command = [sys.executable, __file__, str(inputs), str(outputs)]
        env |= {"TRITON_CACHE_DIR": folder, "TRITON_DISABLE_LINE_INFO": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return [MachineCode(**each) for each in json.loads(outputs.read_text())]


# The compiling half ---------------------------------------------------------------------------------------------------------------


def _load(text: str, folder: str, number: int) -> tuple[Any, dict[str, str]]:
    """The kernel as a triton.jit function, without Inductor's launcher around it, and its signature."""
    signature = re.search(r"triton_meta=\{.*?'signature': (\{.*?\})", text)
    assert signature is not None
    plain, count = re.subn(r"@triton_heuristics\.template\(.*?\n\)\n(?=@triton\.jit)", "", text, flags=re.S)
    assert count == 1
    file = Path(folder, f"kernel_{number}.py")
    file.write_text(plain)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = next(value for name, value in vars(module).items() if name.startswith("triton_tem_"))
    return kernel, dict(json.loads(signature.group(1).replace("'", '"')))


def _compile(job: Job, folder: str, number: int) -> MachineCode:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature = _load(job.text, folder, number)
    # Tensors begin at multiples of 16 bytes, which Inductor tells Triton on a GPU.
    pointers = [i for i, dtype in enumerate(signature.values()) if dtype.startswith("*")]
    source = ASTSource(fn=kernel, signature=signature, constexprs={}, attrs={(i,): [["tt.divisibility", 16]] for i in pointers})
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages}
    return measure(triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=options), folder, number)


def measure(compiled: Any, folder: str, number: int) -> MachineCode:
    """What a kernel that Triton compiled takes."""
    cubin = Path(folder, f"kernel_{number}.cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "--dump-resource-usage", str(cubin))))
    stack = int(usage["STACK"]) + int(usage["LOCAL"])
    spills = sum(_loop_spills(_tool("nvdisasm", "-c", str(cubin)))) if stack else 0
    mma = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|dp4a)[\w.:]*", compiled.asm["ptx"])
    from_registers = re.findall(r"wgmma\.mma_async[\w.:]*\s*\{[^}]*\},\s*\{", compiled.asm["ptx"])
    divisions = tuple(sorted(set(re.findall(r"\b(?:div|rcp)\.[\w.]*f32", compiled.asm["ptx"]))))
    ptx = compiled.asm["ptx"]
    order = access_order(ptx)
    return MachineCode(compiled.metadata.shared, int(usage["REG"]), stack, sorted(set(mma)), spills, len(from_registers), divisions, order)


def access_order(ptx: str) -> tuple[str, ...]:
    """MachineCode.order."""
    names = re.findall(r"\b(griddepcontrol\.\w+|(?:ld|st|red|atom)\.(?:\w+\.)*global|cp\.async|tensormap)", ptx)
    return tuple(dict.fromkeys(name if name.startswith("griddep") else "memory" for name in names))


def _tool(name: str, *arguments: str) -> str:
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _loop_spills(sass: str) -> Iterator[int]:
    """For each loop that multiplies (from a label to a branch back to it), how often it touches local memory."""
    lines = sass.splitlines()
    labels = {match.group(1): i for i, line in enumerate(lines) if (match := re.match(r"(\.L_\w+):", line))}
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if branch is None or labels[branch.group(1)] >= i:
            continue
        body = lines[labels[branch.group(1)] : i]
        if any("MMA" in each for each in body):
            yield sum(bool(re.search(r"\b(LDL|STL)\b", each)) for each in body)


def main(inputs: str, outputs: str) -> None:
    """Compile the jobs in the file `inputs` and write what came out to `outputs`."""
    jobs = [Job(**each) for each in json.loads(Path(inputs).read_text())]
    folder = str(Path(inputs).parent)
    Path(outputs).write_text(json.dumps([asdict(_compile(job, folder, i)) for i, job in enumerate(jobs)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
