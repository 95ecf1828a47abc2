"""Kernels in Gluon for the tests of their machine code: rendered for operands that are sizes alone, and compiled in a process of their own.

Run as a program it is the compiling half, free of Triton's interpreter: `python hopper_cases.py JOBS RESULTS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from int8_inductor.templates import hopper, hopper_blocks, hopper_scaled_mm, hopper_weights
from int8_inductor.templates.hopper_int4 import INT4_MM
from int8_inductor.templates.problem import Device, Problem
from int8_inductor.templates.tail import COLUMN, CONSTANT, OF_EACH_WEIGHT, ROW, SCALAR, Indexing, Tail

H200 = Device(227 * 1024, 132, tma=True, warpgroups=True)
FAST = dataclasses.replace(Tail.of({"a_scale": ROW, "b_scale": COLUMN}), fast=True, ptx=True)
LONGEST = dataclasses.replace(FAST, bias=COLUMN, activation="gelu", out_scale=SCALAR, out_zero_point=CONSTANT)
SIDE_BY_SIDE = dataclasses.replace(FAST, b_scale=OF_EACH_WEIGHT, bias=OF_EACH_WEIGHT, activations=("silu", "none", "gelu_tanh"))
M, N, K = 4096, 1024, 4096
WEIGHT_CONFIGS = (
    *hopper_weights.TILES,
    dataclasses.replace(hopper_weights.TILES[0], splits=4),
    dataclasses.replace(hopper_weights.TILES[-1], splits=2),
)
INT4_CONFIGS = (
    *(tile for each in INT4_MM for tile in each.tiles),
    dataclasses.replace(INT4_MM[0].of_parts[0], splits=4),
    dataclasses.replace(INT4_MM[0].of_parts[-1], splits=4),
    dataclasses.replace(INT4_MM[1].of_parts[0], splits=2),
)
"""Those that run on a GPU: every tile, and some that are split."""


@dataclass(frozen=True)
class Job:
    """A template's module or object, a config of it, a tail, the activation's dtype, and K."""

    template: Any
    config: hopper.HopperConfig
    tail: Tail
    dtype: torch.dtype = torch.int8
    k: int = K

    @property
    def loop(self) -> hopper.Loop:
        return getattr(self.template, "LOOP", None) or self.template.loop  # type: ignore[no-any-return]

    @property
    def in_words(self) -> bool:
        """Whether the kernel reads a packed weight as it is."""
        return self.loop.left.dtype == "int32"

    def program(self, **more: Any) -> tuple[str, str]:
        """The kernel's text and its launch. more: constants besides the config's."""
        count = self.tail.weights.count
        groups = (128,) if self.loop.operands else ()
        problem = Problem(M, N * count, self.k, self.k, tma=True, groups=groups, a_bytes=self.dtype.itemsize, static_m=M)
        assert self.template.is_legal(self.config, problem, H200, self.tail), self
        template = self.template.template(self.tail)
        boxes = [_box(name, self) for name in template.names]
        constants = self.template.constants(self.config, problem, H200, self.tail) | more
        constants |= {name.upper(): "3.0" for name, indexing in self.tail.operands().items() if indexing is CONSTANT}
        out = SimpleNamespace(dtype=torch.int8 if self.tail.out_scale else torch.bfloat16, size=[M, N * count])
        return template.render(boxes, constants), template.launch(boxes, out, constants).to_json()


def _box(name: str, job: Job) -> Any:
    """What the template asks of an operand's layout."""
    dtype, loop, tail = job.dtype, job.loop, job.tail
    plain = name.rstrip("_0123456789")
    in_loop = {"A_SCALE": [M, job.k // 128], "B_SCALE": [N, job.k // 128]}
    rows = {ROW: [M], COLUMN: [N], SCALAR: [1], OF_EACH_WEIGHT: [N]}
    if plain in ("A", "B"):
        packed = loop.unpack or job.in_words
        size = [M, job.k] if plain == "A" else [N, job.k // (1 + packed)]
        dtype = dtype if plain == "A" else torch.uint8 if packed else torch.int8
    else:
        indexing: Indexing | None = tail.operands().get(plain.lower())
        size, dtype = in_loop[plain] if plain in loop.operands else rows[indexing], torch.float32  # type: ignore[index]
    stride = [size[1], 1] if len(size) == 2 else [1]
    return SimpleNamespace(get_size=lambda: size, get_stride=lambda: stride, get_dtype=lambda: dtype)


def _tail(config: hopper.HopperConfig, **fields: Any) -> Tail:
    """The longest; of products whose K is split in four a shorter one, as the kernel that has it is that of K in two but for a number."""
    return dataclasses.replace(FAST if config.splits > 2 else LONGEST, **fields)


JOBS = [
    *(Job(hopper_scaled_mm, config, LONGEST) for config in hopper_scaled_mm.CONFIGS),
    Job(hopper_scaled_mm, hopper_scaled_mm.CONFIGS[0], SIDE_BY_SIDE),
    *(Job(hopper_blocks.BLOCK_SCALED_MM, config, dataclasses.replace(LONGEST, a_scale=None, b_scale=None)) for config in hopper_blocks.CONFIGS),
    Job(hopper_blocks.BLOCK_SCALED_MM, hopper_blocks.CONFIGS[0], dataclasses.replace(LONGEST, a_scale=None, b_scale=None), k=K - 128),
    *(Job(hopper_blocks.INT8_INT4_MM, config, dataclasses.replace(LONGEST, b_scale=None)) for config in hopper_blocks.CONFIGS),
    *(Job(hopper_weights, config, _tail(config, a_scale=None), torch.bfloat16) for config in hopper_weights.CONFIGS),
    Job(hopper_weights, hopper_weights.CONFIGS[0], dataclasses.replace(LONGEST, a_scale=None), torch.float16),
    *(Job(each, config, _tail(config, a_scale=None, b_scale=None), torch.bfloat16) for each in INT4_MM for config in each.configs),
    Job(INT4_MM[0], INT4_MM[0].configs[0], dataclasses.replace(LONGEST, a_scale=None, b_scale=None), torch.float16),
]


@dataclass(frozen=True)
class Code:
    """mma: its instructions, as PTX names them. waits: how many products may be in flight after each wait, as they stand. serialized: whether the
    assembler says that it made products wait for one another. registers, stack: of a split product's two kernels the most, and both.
    """

    shared: int
    registers: int
    stack: int
    mma: list[str]
    waits: list[int]
    serialized: bool


def compile_jobs(jobs: Sequence[Job]) -> list[Code]:
    """Compile `jobs` in one process without the interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "jobs.json"), Path(folder, "results.json")
        inputs.write_text(json.dumps([job.program() for job in jobs]))
        command = [sys.executable, __file__, str(inputs), str(outputs)]
        env |= {"TRITON_CACHE_DIR": folder, "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DISABLE_LINE_INFO": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return [Code(**each) for each in json.loads(outputs.read_text())]


def _measure(source: str, launch: str) -> Code:
    from int8_inductor.gluon import program

    # What the assembler says of each kernel, Triton prints.
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        kernels = program.compile_program(source, launch)
    said = printed.getvalue()
    used, stacks = (list(map(int, re.findall(pattern, said))) for pattern in (r"Used (\d+) registers", r"(\d+) bytes stack frame"))
    # A second kernel may be another config's too, compiled before.
    assert 0 < len(used) == len(stacks) <= len(kernels), said
    main = kernels[0]
    mma = sorted(set(re.findall(r"\bwgmma\.mma_async[\w.]*", main.asm["ptx"])))
    waits = [int(each) for each in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", main.asm["ptx"])]
    return Code(main.metadata.shared, max(used), sum(stacks), mma, waits, "serialized" in said)


def main(inputs: str, outputs: str) -> None:
    """Compile the jobs in the file `inputs` and write what came out to `outputs`."""
    Path(outputs).write_text(json.dumps([dataclasses.asdict(_measure(*each)) for each in json.loads(Path(inputs).read_text())]))


if __name__ == "__main__":
    main(*sys.argv[1:])
