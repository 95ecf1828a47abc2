"""The generated kernels as machine code for every architecture that they are meant for: shared memory, registers, spills, tensor cores."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from machine_code import ARCHITECTURES, Job, MachineCode, compile_all, generated_kernel, with_constants
from support import run
from torch import Tensor
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from int8_inductor import lowering, lowering_side_by_side, ops
from int8_inductor._compat import triton_version
from int8_inductor.side_by_side import scaled_mm_side_by_side
from int8_inductor.templates import LOWERINGS, persistent, tiled, vector
from int8_inductor.templates.persistent import PersistentConfig
from int8_inductor.templates.problem import Device, Problem
from int8_inductor.templates.tail import COLUMN, OF_EACH_WEIGHT, ROW, SCALAR, Tail
from int8_inductor.templates.tiled import CONFIGS, TiledConfig
from int8_inductor.templates.vector import VectorConfig

ESTIMATED = tuple(map(int, triton_version().split(".")[:2])) < (3, 8)
"""Whether TiledConfig.registers was made for this Triton. 3.9 takes more registers before Hopper; there, autotuning leaves out what spills."""
THOROUGH = os.environ.get("INT8_INDUCTOR_HYPOTHESIS_PROFILE", "ci") == "thorough"
RENDERED = {
    tiled: TiledConfig(16, 128, 128, 3, 4),
    persistent: PersistentConfig(16, 128, 128, 3, 4, programs=1, flatten=False),
    vector: vector.CONFIGS[0],
}
"""The config with which a template's kernels are generated; the others differ from it in constants alone."""
DEVICES = {capability: Device(limit, 132, tma=capability >= 90) for capability, limit in ARCHITECTURES.items()}
N = 256
LENGTHS = {16: 4096, 8: 4104, 4: 4100, 2: 4098, 1: 4093}
"""K for each alignment of the rows, in bytes."""


def _gelu(a: Tensor, b: Tensor, a_scale: Tensor, row: Tensor, one: Tensor, zero_point: Tensor) -> Tensor:
    return ops.scaled_mm(a, b, a_scale, row, bias=row, activation="gelu", out_scale=one, out_quant_min=-127)


def _zero_point(a: Tensor, b: Tensor, a_scale: Tensor, row: Tensor, one: Tensor, zero_point: Tensor) -> Tensor:
    return ops.scaled_mm(a, b, a_scale, row, zero_point, bias=row, activation="silu", out_dtype=torch.bfloat16)


def _blocks(a: Tensor, b: Tensor, a_scale: Tensor, row: Tensor, one: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    return ops.scaled_mm_block_quant(a, b, a_scale, row, bias=row, activation="gelu_tanh")


def _single(a: Tensor, b: Tensor, a_scale: Tensor, row: Tensor, one: Tensor, zero_point: Tensor) -> Tensor:
    return ops.scaled_mm(a, b, a_scale, row, bias=row)


def _half(a: Tensor, b: Tensor, a_scale: Tensor, row: Tensor, one: Tensor, zero_point: Tensor) -> Tensor:
    return ops.scaled_mm(a, b, a_scale, row, bias=row, out_dtype=torch.float16)


def _gate_and_up(a: Tensor, b: Tensor, a_scale: Tensor, row: Tensor, one: Tensor, zero_point: Tensor) -> Tensor:
    activations = ["silu", "none", "none"]
    return scaled_mm_side_by_side(a, [b] * 3, a_scale, [row] * 3, [row] * 3, activations=activations, out_dtype=torch.bfloat16)


TAILS = {
    "bias, gelu and static int8": (_gelu, Tail(ROW, COLUMN, bias=COLUMN, out_scale=SCALAR, activation="gelu", out_quant_min=-127, fast=True)),
    "zero point, bias, silu and bfloat16": (_zero_point, Tail(ROW, COLUMN, a_zero_point=ROW, bias=COLUMN, activation="silu", fast=True)),
    "bias, gelu_tanh and int8 in blocks": (_blocks, Tail(ROW, COLUMN, bias=COLUMN, activation="gelu_tanh", block_size=128, fast=True)),
    "bias and float32": (_single, Tail(ROW, COLUMN, bias=COLUMN)),
    "bias and float16": (_half, Tail(ROW, COLUMN, bias=COLUMN, fast=True)),
    "three weights side by side": (
        _gate_and_up,
        Tail(ROW, OF_EACH_WEIGHT, bias=OF_EACH_WEIGHT, activations=("silu", "none", "none"), fast=True),
    ),
}
GELU, ZERO_POINT, BLOCKS, SINGLE, HALF, THREE = TAILS
FEW = (TiledConfig(64, 128, 128, 3, 4), TiledConfig(128, 128, 64, 4, 8), TiledConfig(16, 64, 256, 4, 4))


def problem(copy_bytes: int) -> Problem:
    """A product whose rows begin at multiples of copy_bytes."""
    k = LENGTHS[copy_bytes]
    return Problem(8192, N, k, k, tma=copy_bytes == 16, one_row=True)


@dataclass(frozen=True)
class Case:
    """A kernel: what follows the product, the alignment of its rows, and the config of a template."""

    tail: str
    copy_bytes: int
    config: TiledConfig | PersistentConfig | VectorConfig
    template: ModuleType = tiled

    def is_legal(self, capability: int) -> bool:
        legal: bool = self.template.is_legal(self.config, problem(self.copy_bytes), DEVICES[capability], TAILS[self.tail][1])
        return legal


def cases(capability: int) -> Iterator[Case]:
    """The kernels to build for an architecture: all, or, in CI, each config at least for one before Hopper and for Hopper."""
    if THOROUGH:
        templates = LOWERINGS["scaled_mm"].templates
        yield from (Case(tail, width, config, each) for tail in TAILS for width in LENGTHS for each in templates for config in each.CONFIGS)
        return
    main = {80: (ZERO_POINT, CONFIGS), 90: (GELU, CONFIGS)}.get(capability, (GELU, FEW))
    yield from (Case(main[0], 16, config) for config in main[1])
    if capability in (80, 90):
        yield from (Case(BLOCKS, 16, config) for config in (FEW[0], CONFIGS[0]))
    # float32 has a config that no other result has.
    yield from (Case(tail, 16, config, template) for template in (persistent, vector) for tail in (GELU, SINGLE) for config in template.CONFIGS)
    if capability in (80, 90):
        yield from (Case(HALF, 16, config, persistent) for config in persistent.CONFIGS[:1])
        yield from (Case(THREE, 16, config, template) for template in (persistent, vector) for config in template.CONFIGS[:1])
    yield from (Case(THREE, 16, config) for config in (CONFIGS[0], *FEW))
    if capability == 80:
        yield from (Case(ZERO_POINT, width, config) for width in (8, 4, 2, 1) for config in tightest(width))


def tightest(copy_bytes: int) -> list[TiledConfig]:
    """The two legal configs that the estimate gives most registers."""
    tail = TAILS[ZERO_POINT][1]
    legal = [config for config in CONFIGS if tiled.is_legal(config, problem(copy_bytes), DEVICES[80], tail)]
    return sorted(legal, key=lambda config: config.registers(tail, copy_bytes))[-2:]


def render(tail: str, copy_bytes: int, config: TiledConfig | PersistentConfig | VectorConfig, template: ModuleType) -> str:
    """The kernel that Inductor generates with `config` of `template`, for any M, on a machine without a GPU."""
    k = LENGTHS[copy_bytes]
    a, b = torch.zeros(2, k, dtype=torch.int8), torch.zeros(N, k, dtype=torch.int8)
    rows = 1 if template is vector else 2
    inputs = (a[:rows], b, torch.ones(rows, 1), torch.ones(N), torch.ones(1), torch.zeros(rows, 1, dtype=torch.int8))
    for each in (inputs[0], inputs[2], inputs[5]) if rows > 1 else ():
        torch._dynamo.mark_dynamic(each, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOWERINGS, "scaled_mm", dataclasses.replace(LOWERINGS["scaled_mm"], templates=(template,)))
        patch.setattr(template, "candidates", lambda *args, **kwargs: [config])
        for module in (lowering, lowering_side_by_side):
            patch.setattr(module, "has_ptx", lambda device: True)
        patch.setattr(CachingAutotuner, "run", lambda *args, **kwargs: None)  # a kernel for a GPU: it is looked at, not run
        return generated_kernel(run(TAILS[tail][0], *inputs).code[0])


@pytest.fixture(scope="session")
def rendered() -> dict[tuple[str, int, ModuleType], str]:
    """Kernels generated so far, by tail, alignment and template."""
    return {}


def text(case: Case, rendered: dict[tuple[str, int, ModuleType], str]) -> str:
    """The kernel of `case`."""
    key = case.tail, case.copy_bytes, case.template
    if key not in rendered:
        rendered[key] = render(case.tail, case.copy_bytes, RENDERED[case.template], case.template)
    constants = case.template.constants(case.config, problem(case.copy_bytes), DEVICES[90], TAILS[case.tail][1])
    return with_constants(rendered[key], **{name: value for name, value in constants.items() if not name.startswith("num_")})


def problems(case: Case, capability: int, code: MachineCode) -> Iterator[str]:
    """What is wrong with a kernel's machine code."""
    if code.shared > ARCHITECTURES[capability]:
        yield f"shared memory {code.shared} exceeds {ARCHITECTURES[capability]}"
    if isinstance(case.config, PersistentConfig) and code.shared > case.config.shared_memory(TAILS[case.tail][1]) + 64:
        yield f"shared memory {code.shared} is more than estimated"
    if ESTIMATED and (code.loop_spills or code.stack > 64):
        yield f"{code.stack} bytes of registers spilled, {code.loop_spills} accesses to them in the main loop"
    wanted = instructions(case, capability)
    if not code.mma or not all(re.fullmatch(wanted, each) for each in code.mma):
        yield f"tensor-core instructions {code.mma}, not {wanted}"


def instructions(case: Case, capability: int) -> str:
    """What multiplies int8 on an architecture, as a pattern."""
    if isinstance(case.config, VectorConfig):
        return r"dp4a\.s32\.s32"
    if capability == 90 and case.config.block_m >= 64:
        return r"wgmma\.mma_async\..*\.s32\.s8\.s8"
    # Triton 3.9 is the first to have Blackwell's own.
    own = r"|tcgen05\.mma\..*kind::i8" if capability == 100 else ""
    return rf"mma\.sync\..*\.s32\.s8\.s8\.s32{own}"


@pytest.mark.long
@pytest.mark.parametrize("capabilities", [(80,), (90,), (86, 89, 100, 120)], ids=str)
def test_machine_code(capabilities: tuple[int, ...], rendered: dict[tuple[str, int, ModuleType], str]) -> None:
    """Those that have few kernels of their own in one process, which takes longer to start than some of them to compile."""
    legal = [(capability, case) for capability in capabilities for case in cases(capability) if case.is_legal(capability)]
    assert all([each for each, _ in legal].count(capability) >= len(FEW) for capability in capabilities)
    jobs = [Job(text(case, rendered), case.config.num_warps, case.config.num_stages, capability) for capability, case in legal]
    pairs = zip(legal, compile_all(jobs), strict=True)
    found = [f"sm_{capability}, {case}: {each}" for (capability, case), code in pairs for each in problems(case, capability, code)]
    assert not found, "\n".join(found)


def test_every_architecture_has_its_machine_code_looked_at() -> None:
    (mark,) = (each for each in test_machine_code.pytestmark if each.name == "parametrize")  # type: ignore[attr-defined]
    assert sorted(itertools.chain.from_iterable(mark.args[1])) == sorted(ARCHITECTURES)


def test_constants_are_all_that_configs_differ_in(rendered: dict[tuple[str, int, ModuleType], str]) -> None:
    """Setting the constants in a generated kernel's text gives the body that Inductor generates with that config."""
    case = Case(GELU, 16, TiledConfig(32, 64, 256, 4, 4))
    mine = text(case, rendered)
    theirs = render(GELU, 16, case.config, case.template)
    body = [each[each.index("@triton.jit") :] for each in (mine, theirs)]
    assert body[0] == body[1]


def test_a_config_that_would_spill_is_not_legal(rendered: dict[tuple[str, int, ModuleType], str]) -> None:
    """The largest tiles with rows of odd length: not legal, and rightly so."""
    case = Case(ZERO_POINT, 1, TiledConfig(128, 256, 128, 3, 8))
    assert not case.is_legal(80)
    (code,) = compile_all([Job(text(case, rendered), case.config.num_warps, case.config.num_stages, 80)])
    assert code.loop_spills > 0


def test_a_config_that_takes_too_much_shared_memory_is_not_legal() -> None:
    sm_86, sm_80, tail = DEVICES[86], DEVICES[80], TAILS[GELU][1]
    assert [config.shared_memory() <= sm_86.shared_memory for config in (TiledConfig(128, 256, 128, 3, 8), TiledConfig(64, 128, 128, 4, 4))] == [
        False,
        True,
    ]
    assert [tiled.is_legal(TiledConfig(128, 256, 128, 3, 8), problem(16), device, tail) for device in (sm_86, sm_80)] == [False, True]
    twice = PersistentConfig(128, 128, 128, 3, 4, programs=2, flatten=True)
    assert [persistent.is_legal(twice, problem(16), DEVICES[capability], tail) for capability in (80, 90, 120)] == [False, True, False]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 8, 12, 16, 100, 4093, 4096])
@pytest.mark.parametrize("tail", TAILS)
def test_some_config_is_legal_for_every_length_of_rows(k: int, tail: str) -> None:
    for device in DEVICES.values():
        product = Problem(64, N, k, k, tma=False)
        chosen = tiled.candidates(product, device, TAILS[tail][1], thorough=True)
        assert chosen
        assert all(tiled.is_legal(config, product, device, TAILS[tail][1]) for config in chosen)
