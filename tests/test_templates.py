"""The templates one by one: every config, which configs are worth timing for a shape, and what each template declines."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from kernel_cases import Case, cases, out_scale
from support import FLOATS, check_blocks, check_float, check_int8, examples, fresh_compile, in_blocks, linear64, well_conditioned
from torch import Tensor
from torch._inductor.virtualized import V

from int8_inductor import autotune, lowering, operands, ops
from int8_inductor.templates import LOWERINGS, persistent, tiled, vector
from int8_inductor.templates.persistent import PersistentConfig
from int8_inductor.templates.problem import Device, Problem
from int8_inductor.templates.tail import ROW, SCALAR, Tail
from int8_inductor.templates.tiled import TiledConfig
from int8_inductor.templates.vector import VectorConfig

DEVICES = {
    "sm_80": Device(163 * 1024, 108, tma=False),
    "sm_86": Device(99 * 1024, 84, tma=False),
    "sm_90": Device(227 * 1024, 132, tma=True),
    "sm_120": Device(99 * 1024, 170, tma=True),
}
SMALL = PersistentConfig(32, 64, 32, 2, 4, programs=1, flatten=False)
FLAT = PersistentConfig(64, 64, 64, 2, 4, programs=2, flatten=True)


@contextmanager
def only(module: Any, config: Any) -> Iterator[None]:
    """Lower to one config of one template."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOWERINGS, "scaled_mm", dataclasses.replace(LOWERINGS["scaled_mm"], templates=(module,)))
        patch.setattr(autotune, "_WINNERS", {})
        patch.setattr(module, "candidates", lambda *args, **kwargs: [config])
        yield


# Every config ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", tiled.CONFIGS, ids=str)
def test_every_config_of_the_tiled_template(config: TiledConfig) -> None:
    """Two tiles in each direction, none of them whole, and K beyond one step; in the interpreter, where it needs no GPU that has the room."""
    case = Case(config.block_m + 3, config.block_n + 5, config.block_k + 7, a_zero_point=torch.int8, bias=torch.bfloat16)
    with only(tiled, config):
        compiled = case.scaled_mm("triton", store={"out_dtype": torch.bfloat16})
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
        assert compiled.has(f"{name} : tl.constexpr = {getattr(config, name.lower())}\n")
    check_float(compiled.output, case.want())


@pytest.mark.parametrize("config", [*persistent.CONFIGS, SMALL], ids=str)
def test_every_config_of_the_persistent_template(device: str, config: PersistentConfig) -> None:
    """Five tiles or more, so that the interpreter's programs take several, none of them whole."""
    case = Case(2 * config.block_m + 3, config.block_n + 5, config.block_k + 16, bias=torch.bfloat16, activation="gelu", device=device)
    with only(persistent, config):
        compiled = case.scaled_mm("triton", store={"out_dtype": torch.bfloat16})
    assert compiled.has("tl.make_tensor_descriptor")
    assert compiled.has(f"BLOCK_M : tl.constexpr = {config.block_m}\n")
    check_float(compiled.output, case.want(narrow=True))


def test_programs_that_share_columns_cover_every_tile() -> None:
    """Nine rows of tiles in groups of 4: the last group is short."""
    case = Case(16 * 8 + 1, 32 * 2 + 1, 32)
    for module, config in ((tiled, TiledConfig(16, 32, 32, 2, 4, group_m=4)), (persistent, PersistentConfig(16, 32, 32, 2, 4, 1, False, group_m=4))):
        with only(module, config):
            check_float(case.scaled_mm("triton").output, case.want())


# The persistent template ----------------------------------------------------------------------------------------------------------


@examples(12)
@given(case=cases(), steps=st.sampled_from([1, 2, 3, 9]), dtype=st.sampled_from([None, *FLOATS, torch.int8]), config=st.sampled_from([SMALL, FLAT]))
@example(case=Case(1, 2), steps=1, dtype=None, config=SMALL)
@example(case=Case(67, 130, activation="silu", bias=torch.float16), steps=9, dtype=torch.int8, config=FLAT)
def test_persistent_results(device: str, case: Case, steps: int, dtype: torch.dtype | None, config: PersistentConfig) -> None:
    """Any M and N but 1 x 1, K in multiples of 16, operands with K contiguous and no zero points; float and int8 results."""
    assume(case.m * case.n > 1)
    case.device, case.k, case.a_zero_point, case.b_zero_point = device, 16 * steps, None, None
    case.a_layout = case.b_layout = "contiguous"
    want = case.want(narrow=dtype not in (None, torch.float32))
    with only(persistent, config):
        if dtype == torch.int8:
            scale = out_scale(case, want, per_row=True)
            assume(well_conditioned(want, scale))
            check_int8(case.scaled_mm("triton", store={"out_scale": scale}).output, want, scale)
        else:
            check_float(case.scaled_mm("triton", store={"out_dtype": dtype}).output, want)


@examples(4)
@given(case=cases(), block_size=st.sampled_from([32, 64]), blocks=st.integers(1, 3))
def test_persistent_results_in_blocks(device: str, case: Case, block_size: int, blocks: int) -> None:
    case.device, case.n, case.k, case.a_zero_point, case.b_zero_point = device, block_size * blocks, 48, None, None
    case.a_layout = case.b_layout = "contiguous"
    want = case.want(narrow=True)
    parts, exact = in_blocks(want, block_size)
    assume(well_conditioned(parts, exact.unsqueeze(-1)))
    with only(persistent, FLAT):
        q, scale = case.scaled_mm("triton", ops.scaled_mm_block_quant, {"block_size": block_size}).output
    check_blocks(q, scale, want, block_size)


def test_persistent_with_symbolic_rows(device: str) -> None:
    """One compilation for every M from 2 on."""
    case = Case(24, 70, 64, bias=torch.float32, activation="gelu", device=device)
    fixed = {name: case.operands()[name] for name in ("b", "b_scale", "bias")}

    def fn(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor) -> Tensor:
        return ops.scaled_mm(a, b, a_scale, b_scale, bias=bias, activation="gelu", kernel_preference="triton")

    with fresh_compile(), torch._dynamo.config.patch(error_on_recompile=True), only(persistent, SMALL):
        compiled = torch.compile(fn, backend="int8_inductor", dynamic=False)
        for m in (24, 2, 65, 131):
            case.m = m
            rows = case.operands()
            want = linear64(**{**rows, **fixed}, activation="gelu")
            inputs = [rows["a"].to(device), rows["a_scale"].to(device)]
            for each in inputs:
                torch._dynamo.mark_dynamic(each, 0)
            check_float(compiled(*inputs, *(t.to(device) for t in fixed.values())).cpu(), want)


def problem_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> Problem:
    """What the lowering takes the operands of `case` for; the result is checked too."""
    seen: list[Problem] = []
    make = lowering.problem_of
    monkeypatch.setattr(lowering, "problem_of", lambda *args, **kwargs: seen.append(make(*args, **kwargs)) or seen[-1])
    check_float(case.scaled_mm("triton").output, case.want())
    (problem,) = seen
    return problem


@pytest.mark.parametrize(
    ("case", "fits"),
    [
        (Case(5, 33, 32), True),
        (Case(5, 33, 48), True),
        (Case(1, 1, 16), True),
        (Case(5, 33, 40), False),
        (Case(5, 33, 31), False),
        (Case(16, 32, 32, a_layout="transposed"), False),
        (Case(16, 32, 32, b_layout="transposed"), False),
        (Case(16, 32, 32, a_layout="expanded"), False),
    ],
    ids=str,
)
def test_operands_that_a_descriptor_can_name(case: Case, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problem_of(case, monkeypatch) == Problem(case.m, case.n, case.k, case.k, fits, one_row=case.m == 1, static_m=case.m)


@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_no_descriptors_where_cpp_launches_the_kernel(device: str, cpp_wrapper: bool) -> None:
    """AOTInductor would have the programs of one launch overwrite each other's descriptors."""
    graph: Any = SimpleNamespace(cpp_wrapper=cpp_wrapper, fx_wrapper=False)
    with V.set_graph_handler(graph):
        found = operands.device_of(torch.device(device), 4096)
    expected = not cpp_wrapper and (device == "cpu" or torch.cuda.get_device_capability() >= (9, 0))
    assert found.tma == expected


# The vector template --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", vector.CONFIGS, ids=str)
@pytest.mark.parametrize("k", [4 * 512, 4 * 512 + 48, 16])
def test_every_config_of_the_vector_template(device: str, config: VectorConfig, k: int) -> None:
    case = Case(1, 3 * config.block_n + 1, k, bias=torch.bfloat16, activation="gelu", device=device)
    with only(vector, config):
        compiled = case.scaled_mm("triton", store={"out_dtype": torch.float16})
    assert compiled.has("BLOCK_WORDS : tl.constexpr")
    assert compiled.has("dp4a") == (device == "cuda")
    check_float(compiled.output, case.want(narrow=True))


@examples(8)
@given(case=cases(), steps=st.sampled_from([1, 2, 9]), dtype=st.sampled_from([None, *FLOATS, torch.int8]))
@example(case=Case(1, 1), steps=1, dtype=None)
def test_vector_results(device: str, case: Case, steps: int, dtype: torch.dtype | None) -> None:
    """M = 1, any N, K in multiples of 16 and no zero points; float and int8 results."""
    case.device, case.m, case.k, case.a_zero_point, case.b_zero_point = device, 1, 16 * steps, None, None
    case.a_layout = case.b_layout = "contiguous"
    want = case.want(narrow=dtype not in (None, torch.float32))
    with only(vector, VectorConfig(4, 8, 2, 4)):
        if dtype == torch.int8:
            scale = out_scale(case, want, per_row=True)
            assume(well_conditioned(want, scale))
            check_int8(case.scaled_mm("triton", store={"out_scale": scale}).output, want, scale)
        else:
            check_float(case.scaled_mm("triton", store={"out_dtype": dtype}).output, want)


def test_when_the_vector_template_is_a_candidate() -> None:
    """One row for certain, whole words, no sums for a zero point in the loop and no blocks."""
    one, tail = Problem(1, 4096, 4096, 4096, tma=True, one_row=True), Tail(SCALAR, SCALAR)
    for device in DEVICES.values():
        assert vector.candidates(one, device, tail, thorough=False) == list(vector.CONFIGS)
        assert vector.candidates(Problem(1, 4096, 4096, 4096, tma=True), device, tail, thorough=False) == []
        assert vector.candidates(Problem(1, 4096, 4100, 4100, tma=False, one_row=True), device, tail, thorough=False) == []
        assert vector.candidates(one, device, Tail(SCALAR, SCALAR, a_zero_point=ROW), thorough=False) == []
        assert vector.candidates(one, device, Tail(SCALAR, SCALAR, block_size=128), thorough=False) == []


# Which candidate is taken -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fastest", [0, 1])
def test_the_fastest_candidate_is_taken_and_leaves_no_other_behind(fastest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = TiledConfig(16, 32, 32, 2, 4), TiledConfig(32, 32, 32, 2, 4)

    def timer(choice: Any, *args: Tensor, out: Tensor) -> float:
        return 1.0 if f"({configs[fastest].block_m}, " in choice.log_info["tile_shape"] else 2.0

    monkeypatch.setattr(autotune.Kernel, "candidates", lambda self: [(tiled, config) for config in configs])
    monkeypatch.setattr(autotune, "_median_ms", timer)
    case = Case(5, 33, 32)
    for operator, store in ((ops.scaled_mm, {}), (ops.scaled_mm_block_quant, {"block_size": 32})):
        compiled = case.scaled_mm("triton", operator, store)
        assert compiled.has(f"BLOCK_M : tl.constexpr = {configs[fastest].block_m}\n")
        if store:
            check_blocks(*compiled.output, case.want(narrow=True), 32)
        else:
            check_float(compiled.output, case.want())


# Which configs are timed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 28672, 4096), (16, 4096, 14336), (300, 768, 768), (8192, 8192, 8192)])
@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("block_size", [None, 32, 64, 128])
def test_candidates_are_legal_few_and_never_none(sizes: tuple[int, int, int], name: str, block_size: int | None) -> None:
    tail, device = Tail(SCALAR, SCALAR, block_size=block_size), DEVICES[name]
    problem = Problem(*sizes, sizes[2], tma=sizes[2] % 16 == 0)
    quick = tiled.candidates(problem, device, tail, thorough=False)
    thorough = tiled.candidates(problem, device, tail, thorough=True)
    assert 1 <= len(quick) <= tiled.QUICK_CONFIGS
    assert quick == thorough[: len(quick)]
    assert len(set(thorough)) == len(thorough)
    for config in thorough:
        assert config.shared_memory() <= device.shared_memory
        assert block_size is None or config.block_n % block_size == 0
    assert sum(len(module.candidates(problem, device, tail, thorough=False)) for module in LOWERINGS["scaled_mm"].templates) <= 12


def test_when_the_persistent_template_is_a_candidate() -> None:
    """With TMA, more tiles than multiprocessors, and no sums for a zero point in the loop. A float32 result takes more room to turn around."""
    tail, large = Tail(SCALAR, SCALAR, fast=True), Problem(8192, 8192, 8192, 8192, tma=True)

    def found(problem: Problem = large, name: str = "sm_90", tail: Tail = tail) -> list[PersistentConfig]:
        return persistent.candidates(problem, DEVICES[name], tail, thorough=False)

    assert found() == list(persistent.CONFIGS)
    assert found(tail=Tail(SCALAR, SCALAR)) == [config for config in persistent.CONFIGS if not config.flatten]
    assert found(name="sm_80") == found(name="sm_120") == []
    assert found(Problem(8192, 8192, 8192, 8192, tma=False)) == []
    assert found(Problem(64, 8192, 8192, 8192, tma=True)) == found(Problem(1, 1, 8192, 8192, tma=True)) == []
    assert found(tail=Tail(SCALAR, SCALAR, a_zero_point=ROW, fast=True)) == []
    assert found(tail=Tail(SCALAR, SCALAR, block_size=128, fast=True)) == list(persistent.CONFIGS)
    assert found(tail=Tail(SCALAR, SCALAR, block_size=256, fast=True)) == []
