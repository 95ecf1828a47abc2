"""Kernels of weight-only and int4 products as machine code: shared memory, spills, and the instructions that convert and multiply."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from machine_code import ARCHITECTURES, Job, MachineCode, compile_all, generated_kernel, with_constants
from support import run
from test_machine_code import DEVICES
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from weight_cases import NAMES, PRODUCTS_BY_NAME, in_triton

from int8_inductor import lowering
from int8_inductor.templates import LOWERINGS
from int8_inductor.templates.problem import Problem
from int8_inductor.templates.tail import COLUMN, Tail
from int8_inductor.templates.weight_split import WeightSplit
from int8_inductor.templates.weight_stream import WeightStream
from int8_inductor.templates.weight_vector import WeightVector

N, K, GROUP = 4096, 4096, 128


@dataclasses.dataclass(frozen=True)
class Case:
    """A config of a template of a product, and the activation's dtype."""

    name: str
    template: Any
    config: Any
    dtype: torch.dtype

    @property
    def problem(self) -> Problem:
        m = {WeightVector: 1, WeightSplit: 16, WeightStream: 16}.get(type(self.template), 4096)
        groups = () if self.name == "weight_int8_mm" else (GROUP,)
        return Problem(m, N, K, K, tma=True, one_row=m == 1, groups=groups, a_bytes=self.dtype.itemsize)

    @property
    def kernel(self) -> tuple[Any, ...]:
        """What is generated once; configs differ from each other in constants alone, those of streams in their text."""
        return self.name, self.template, self.dtype, self.config if isinstance(self.template, WeightStream) else None

    @property
    def constants(self) -> dict[str, Any]:
        constants: dict[str, Any] = self.template.constants(self.config, self.problem, DEVICES[90], self.tail)
        return constants

    @property
    def tail(self) -> Tail:
        return Tail(bias=COLUMN, activation="gelu", fast=True, ptx=True)

    def is_legal(self, capability: int) -> bool:
        return bool(self.template.is_legal(self.config, self.problem, DEVICES[capability], self.tail))


def cases(capability: int) -> Iterator[Case]:
    """Every config on Hopper, in bfloat16; the first of each template in float16, and before Hopper."""
    for name in NAMES:
        dtypes = (torch.int8,) if name.startswith("int8") else (torch.bfloat16, torch.float16) if capability == 90 else (torch.bfloat16,)
        if name == "weight_int8_group_mm" and capability != 90:
            continue
        for template in in_triton(name):
            for i, config in enumerate(template.configs):
                for dtype in dtypes if i == 0 else dtypes[:1]:
                    case = Case(name, template, config, dtype)
                    if case.is_legal(capability) and (i == 0 or capability == 90):
                        yield case


def render(case: Case, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel that Inductor generates for a case, on a machine without a GPU."""
    rows = 1 if case.problem.one_row else 7
    scales = {"a_scale": torch.ones(rows, K // GROUP if case.name == "int8_int4_group_mm" else 1)} if case.name.startswith("int8") else {}
    packed = "int4" in case.name
    given = {
        "a": torch.zeros(rows, K, dtype=case.dtype),
        "b": torch.zeros(N, K // 2, dtype=torch.uint8) if packed else torch.zeros(N, K, dtype=torch.int8),
        **scales,
        "b_scale": torch.ones(N, K // GROUP) if case.problem.groups else torch.ones(N),
        "bias": torch.zeros(N),
    }
    names, numbers = list(given), {"group_size": GROUP} if case.problem.groups else {}
    operator = PRODUCTS_BY_NAME[case.name].operator

    def fn(*tensors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = operator(**dict(zip(names, tensors, strict=True)), **numbers, activation="gelu", out_dtype=torch.bfloat16)
        return result

    with monkeypatch.context() as patch:
        patch.setitem(LOWERINGS, case.name, dataclasses.replace(LOWERINGS[case.name], templates=(case.template,)))
        patch.setattr(case.template, "candidates", lambda *args, **kwargs: [case.config])
        patch.setattr(lowering, "has_ptx", lambda device: True)
        patch.setattr(CachingAutotuner, "run", lambda *args, **kwargs: None)  # a kernel for a GPU: it is looked at, not run
        return generated_kernel(run(fn, *given.values()).code[0])


def problems(case: Case, capability: int, code: MachineCode) -> Iterator[str]:
    """What is wrong with a kernel's machine code."""
    if code.shared > ARCHITECTURES[capability]:
        yield f"shared memory {code.shared} exceeds {ARCHITECTURES[capability]}"
    if isinstance(case.template, WeightStream) and code.shared > case.config.shared_memory:
        yield f"shared memory {code.shared} exceeds the sums' {case.config.shared_memory}: operands go through it"
    if code.loop_spills or code.stack > 64:
        yield f"{code.stack} bytes of registers spilled, {code.loop_spills} accesses to them in the main loop"
    kind = r"s32\.s8\.s8" if case.dtype == torch.int8 else "f32.bf16.bf16" if case.dtype == torch.bfloat16 else "f32.f16.f16"
    wanted = rf"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b.*{kind}.*|tcgen05\.mma.*"
    vector = isinstance(case.template, WeightVector)
    if bool(code.mma) is vector or not all(re.fullmatch(wanted, each) for each in code.mma):
        yield f"tensor-core instructions {code.mma}, not {wanted}"


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = list(cases(capability))
    assert len({case.name for case in chosen}) >= len(NAMES) - 1
    rendered = {key: render(case, monkeypatch) for key, case in {case.kernel: case for case in chosen}.items()}
    jobs = []
    for case in chosen:
        # What the text has no name for, a jinja branch took: the same one for all configs here.
        named = {name: value for name, value in case.constants.items() if f"    {name} : tl.constexpr" in rendered[case.kernel]}
        jobs.append(Job(with_constants(rendered[case.kernel], **named), case.config.num_warps, case.constants["num_stages"], capability))
    found = [f"{case}: {each}" for case, code in zip(chosen, compile_all(jobs), strict=True) for each in problems(case, capability, code)]
    assert not found, "\n".join(found)
