"""The templates of block_scaled_mm one by one: every config against float64, which are worth timing, and their machine code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from block_cases import BlockCase
from machine_code import ARCHITECTURES, Job, compile_all, generated_kernel, with_constants
from support import check_blocks, check_float, in_blocks, run, well_conditioned
from torch import Tensor
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from int8_inductor import autotune, lowering
from int8_inductor.products.block_scaled_mm import BLOCK_SCALED_MM
from int8_inductor.templates import LOWERINGS, block_persistent, block_tiled
from int8_inductor.templates.block_persistent import BlockPersistentConfig
from int8_inductor.templates.block_tiled import BlockTiledConfig
from int8_inductor.templates.problem import Device, Problem
from int8_inductor.templates.tail import COLUMN, ROW, Tail

Config = BlockTiledConfig | BlockPersistentConfig
DEVICES = {capability: Device(limit, 132, tma=capability >= 90) for capability, limit in ARCHITECTURES.items()}
INT8 = Tail(bias=COLUMN, out_scale=ROW, activation="gelu", fast=True)
PLAIN, BLOCKS = Tail(bias=COLUMN, fast=True), Tail(bias=COLUMN, activation="gelu", block_size=128, out_quant_min=-127, fast=True)
SMALL = BlockPersistentConfig(32, 64, 2, 1, 2, 4, programs=1, group_m=4)
WIDE = BlockPersistentConfig(32, 64, 2, 2, 2, 4, programs=2)


@contextmanager
def only(module: ModuleType, config: Config) -> Iterator[None]:
    """Lower to one config of one template."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOWERINGS, "block_scaled_mm", dataclasses.replace(LOWERINGS["block_scaled_mm"], templates=(module,)))
        patch.setattr(autotune, "_WINNERS", {})
        patch.setattr(module, "candidates", lambda *args, **kwargs: [config])
        yield


# Every config ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", block_tiled.CONFIGS, ids=str)
def test_every_config_of_the_tiled_template(config: BlockTiledConfig) -> None:
    """Two tiles in each direction, none of them whole, and K beyond two blocks."""
    case = BlockCase(config.block_m + 3, config.block_n + 5, 263, 128, bias=torch.bfloat16)
    with only(block_tiled, config):
        compiled = case.compiled("triton", store={"out_dtype": torch.bfloat16})
    assert compiled.has(f"BLOCK_M : tl.constexpr = {config.block_m}\n")
    check_float(compiled.output, case.want())


@pytest.mark.parametrize("config", [*block_persistent.CONFIGS, SMALL, WIDE], ids=str)
@pytest.mark.parametrize("scale_block", [32, 128])
def test_every_config_of_the_persistent_template(device: str, config: BlockPersistentConfig, scale_block: int) -> None:
    """Several tiles a program, none of them whole; one scale of the weight for a tile's columns, and several."""
    case = BlockCase(2 * config.rows + 3, config.columns + 5, 272, scale_block, bias=torch.bfloat16, device=device)
    case.activation = "gelu"
    want = case.want(narrow=True)
    with only(block_persistent, config):
        compiled = case.compiled("triton", store={"out_dtype": torch.bfloat16})
        assert compiled.has("tl.make_tensor_descriptor")
        assert compiled.has("& zero") == (config.parts_m * config.parts_n > 1)
        check_float(compiled.output, want)
        parts, exact = in_blocks(want, 64)
        if well_conditioned(parts, exact.unsqueeze(-1)):
            check_blocks(*case.compiled("triton", BLOCK_SCALED_MM.block_quant, {"block_size": 64}).output, want, 64)


@pytest.mark.parametrize("scale_block", [32, 64, 128])
@pytest.mark.parametrize(("m", "n", "k"), [(33, 70, 48), (5, 200, 16), (130, 33, 400), (2, 1, 128)], ids=str)
def test_persistent_results(device: str, m: int, n: int, k: int, scale_block: int) -> None:
    case = BlockCase(m, n, k, scale_block, scale_layout="transposed", device=device)
    with only(block_persistent, SMALL):
        check_float(case.compiled("triton").output, case.want())


# What is worth timing -------------------------------------------------------------------------------------------------------------


def problem(m: int, n: int, k: int, size: int = 128) -> Problem:
    return Problem(m, n, k, k, tma=k % 16 == 0, groups=(size,))


def test_large_products_are_persistent_on_hopper_and_tiled_before() -> None:
    large = problem(8192, 8192, 8192)
    assert block_persistent.candidates(large, DEVICES[90], PLAIN, thorough=False) == list(block_persistent.CONFIGS)
    for tail in (BLOCKS, INT8, Tail(), Tail(activation="silu", fast=True)):
        assert len(block_persistent.candidates(large, DEVICES[90], tail, thorough=True)) == 3
    for size in (32, 64):
        narrow = block_persistent.candidates(problem(8192, 8192, 8192, size), DEVICES[90], PLAIN, thorough=True)
        assert [config.parts_m * config.parts_n for config in narrow] == [1, 1]
    assert block_persistent.candidates(large, DEVICES[80], PLAIN, thorough=True) == []
    assert block_persistent.candidates(large, DEVICES[120], PLAIN, thorough=True) == []  # a multiprocessor has shared memory for fewer programs
    assert block_persistent.candidates(problem(16, 8192, 8192), DEVICES[90], PLAIN, thorough=True) == []
    assert block_persistent.candidates(problem(8192, 8192, 8200), DEVICES[90], PLAIN, thorough=True) == []
    assert block_tiled.candidates(large, DEVICES[80], PLAIN, thorough=False)[0] == block_tiled.CONFIGS[0]


@pytest.mark.parametrize("k", [1, 2, 7, 8, 16, 100, 4093, 4096])
@pytest.mark.parametrize("tail", [PLAIN, BLOCKS], ids=["plain", "blocks"])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_some_config_is_legal_for_every_length_of_rows(k: int, tail: Tail, size: int) -> None:
    for device in DEVICES.values():
        chosen = block_tiled.candidates(problem(64, 256, k, size), device, tail, thorough=True)
        assert chosen
        assert all(block_tiled.is_legal(config, problem(64, 256, k, size), device, tail) for config in chosen)


def test_few_rows_read_the_weight_once() -> None:
    for m in (1, 16, 33):
        chosen = block_tiled.candidates(problem(m, 4096, 4096), DEVICES[90], PLAIN, thorough=True)
        assert {config.block_m for config in chosen} == {max(16, 1 << (m - 1).bit_length())}


# Machine code ---------------------------------------------------------------------------------------------------------------------

N, K = 256, 4096


def _plain(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor) -> Tensor:
    return BLOCK_SCALED_MM.operator(a, b, a_scale, b_scale, bias=bias, out_dtype=torch.bfloat16)  # type: ignore[no-any-return]


def _blocks(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return BLOCK_SCALED_MM.block_quant(a, b, a_scale, b_scale, bias=bias, activation="gelu")  # type: ignore[no-any-return]


def _int8(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor) -> Tensor:
    return BLOCK_SCALED_MM.operator(a, b, a_scale, b_scale, bias=bias, activation="gelu", out_scale=a_scale[:, :1])  # type: ignore[no-any-return]


TAILS: dict[str, tuple[Any, Tail]] = {
    "bias and bfloat16": (_plain, PLAIN),
    "bias, gelu and int8 by row": (_int8, INT8),
    "bias, gelu and int8 in blocks": (_blocks, BLOCKS),
}


def render(tail: str, module: ModuleType, config: Config) -> str:
    """The kernel that Inductor generates with `config`, for any M, on a machine without a GPU."""
    ints = [torch.zeros(rows, K, dtype=torch.int8) for rows in (2, N)]
    inputs = (*ints, torch.ones(2, K // 128), torch.ones(N // 128, K // 128), torch.ones(N))
    for each in (inputs[0], inputs[2]):
        torch._dynamo.mark_dynamic(each, 0)
    with only(module, config), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "has_ptx", lambda device: True)
        patch.setattr(CachingAutotuner, "run", lambda *args, **kwargs: None)  # a kernel for a GPU: it is looked at, not run
        return generated_kernel(run(TAILS[tail][0], *inputs).code[0])


def test_machine_code() -> None:
    """No spills in a main loop, the shared memory that was estimated, and the architecture's int8 instruction."""
    cases: list[tuple[str, ModuleType, Config, int]] = []
    for capability, tail, module in (
        (80, "bias and bfloat16", block_tiled),
        (80, "bias, gelu and int8 in blocks", block_tiled),
        (90, "bias, gelu and int8 in blocks", block_tiled),
        (90, "bias and bfloat16", block_persistent),
        (90, "bias, gelu and int8 by row", block_persistent),
        (90, "bias, gelu and int8 in blocks", block_persistent),
    ):
        product, shape = problem(8192, N, K), TAILS[tail][1]
        legal = [config for config in module.CONFIGS if module.is_legal(config, product, DEVICES[capability], shape)]
        # The first configs are the largest.
        cases += [(tail, module, config, capability) for config in legal[: None if module is block_persistent else 2]]
    assert sum(module is block_persistent for _, module, _, _ in cases) == 9
    texts: dict[tuple[str, ModuleType, tuple[int, int]], str] = {}
    jobs = []
    for tail, module, config, capability in cases:
        key = tail, module, (getattr(config, "parts_m", 1), getattr(config, "parts_n", 1))
        if key not in texts:
            texts[key] = render(tail, module, config)
        constants = module.constants(config, problem(8192, N, K), DEVICES[capability], TAILS[tail][1])
        chosen = {name: value for name, value in constants.items() if name not in ("num_warps", "num_stages", "PARTS_M", "PARTS_N")}
        jobs.append(Job(with_constants(texts[key], **chosen), config.num_warps, config.num_stages, capability))
    for (tail, module, config, capability), code in zip(cases, compile_all(jobs), strict=True):
        what = f"{tail}, {config}, sm_{capability}: {code}"
        assert code.loop_spills == 0, what
        assert code.shared <= ARCHITECTURES[capability], what
        if module is block_persistent:
            assert code.registers * 32 * config.num_warps * config.programs <= 65536, what  # type: ignore[union-attr]
            assert code.shared * config.programs <= ARCHITECTURES[90], what  # type: ignore[union-attr]
        wgmma = capability == 90 and config.block_m >= 64
        wanted = r"wgmma\.mma_async\..*\.s32\.s8\.s8" if wgmma else r"mma\.sync\..*\.s32\.s8\.s8\.s32"
        assert code.mma, what
        assert all(re.fullmatch(wanted, each) for each in code.mma), what
