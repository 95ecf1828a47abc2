"""The templates of weight-only and int4 products one by one: every config, and which are worth timing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import check_blocks, check_float, run
from test_templates import DEVICES
from weight_cases import NAMES, WeightCase, in_triton

from int8_inductor import autotune
from int8_inductor.epilogues import EPILOGUES
from int8_inductor.templates import LOWERINGS
from int8_inductor.templates.problem import Problem
from int8_inductor.templates.rivals import EXPANDED_ROWS
from int8_inductor.templates.tail import COLUMN, Tail
from int8_inductor.templates.weight_split import WeightSplit
from int8_inductor.templates.weight_stream import StreamConfig, WeightStream
from int8_inductor.templates.weight_tiled import WeightTiled
from int8_inductor.templates.weight_vector import WeightVector


@contextmanager
def only(name: str, template: Any, config: Any) -> Iterator[None]:
    """Lower a product to one config of one template."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOWERINGS, name, dataclasses.replace(LOWERINGS[name], templates=(template,)))
        patch.setattr(autotune, "_WINNERS", {})
        patch.setattr(template, "candidates", lambda *args, **kwargs: [config])
        yield


def configs() -> Iterator[Any]:
    for name in NAMES:
        for template in in_triton(name):
            for config in template.configs:
                yield pytest.param(name, template, config, id=f"{name}-{config}")


@pytest.mark.parametrize(("name", "template", "config"), configs())
def test_every_config(device: str, name: str, template: Any, config: Any) -> None:
    """Two tiles in each direction, none of them whole, and K beyond one step; a vector has one row."""
    few = isinstance(template, (WeightSplit, WeightStream))
    m = 1 if isinstance(template, WeightVector) else min(config.block_m + 3, 16) if few else config.block_m + 3
    if isinstance(template, WeightStream):
        k = 128 * config.num_warps * config.groups
    else:
        k = config.block_k + (8 if isinstance(template, WeightTiled) else 128) if hasattr(config, "block_k") else 4 * config.block_words + 16
    group = {WeightSplit: 64, WeightStream: 128}.get(type(template), 32)
    case = WeightCase(name, m, config.block_n + 5, k, groups=k // group + 1, group_size=group, bias=torch.bfloat16, device=device)
    with only(name, template, config):
        compiled = case.compiled("triton", {"out_dtype": torch.bfloat16})
    assert compiled.has(f"BLOCK_N : tl.constexpr = {config.block_n}\n")
    assert compiled.has(f"num_warps={config.num_warps}")
    check_float(compiled.output, case.want())


FEW = [(name, each) for name in NAMES for each in LOWERINGS[name].templates if isinstance(each, (WeightSplit, WeightStream))]
few_rows = pytest.mark.parametrize(("name", "template"), FEW, ids=[f"{name}-{type(each).__name__}" for name, each in FEW])


@few_rows
@pytest.mark.parametrize("activation", EPILOGUES)
def test_every_epilogue_of_few_rows(name: str, template: Any, activation: str) -> None:
    case = WeightCase(name, 3, 40, 256, groups=2, group_size=128, activation=activation, bias=torch.float32, a_dtype=torch.float16)
    with only(name, template, template.configs[0]):
        check_float(case.compiled("triton").output, case.want())


@few_rows
@pytest.mark.parametrize("last", [False, True])
def test_rows_and_steps(device: str, name: str, template: Any, last: bool) -> None:
    """Rows that fill a tile, or not; K of whole steps, or not (`last`: the first config, or the last of the template's)."""
    config = template.configs[-1 if last else 0]
    step = config.num_warps * config.groups if isinstance(template, WeightStream) else config.splits
    for m, steps in [(config.block_m, step), (config.block_m, step + 1), (config.block_m - 3, 2 * step)]:
        case = WeightCase(name, m, config.block_n, 128 * steps, groups=steps, group_size=128, a_dtype=torch.float16, device=device)
        with only(name, template, config):
            compiled = case.compiled("triton", {"out_dtype": torch.float16})
        assert compiled.has(f"EVEN_M : tl.constexpr = {m == config.block_m}\n")
        check_float(compiled.output, case.want())


@few_rows
def test_int8_in_blocks_of_few_rows(device: str, name: str, template: Any) -> None:
    (config, *_) = [each for each in template.configs if each.block_n == 32]
    case = WeightCase(name, 5, 64, 256, groups=2, group_size=128, a_dtype=torch.float16, bias=torch.float32, device=device)
    with only(name, template, config):
        q, scale = case.compiled("triton", {"block_size": 32}, blocks=True).output
    check_blocks(q, scale, case.want(narrow=True), 32)


def test_a_stream_is_of_few_aligned_rows_in_groups_of_128() -> None:
    stream = next(each for each in LOWERINGS["weight_int4_mm"].templates if isinstance(each, WeightStream))
    good = Problem(4, 4096, 4096, 4096, tma=True, groups=(128,), a_bytes=2)
    wrong = [{"m": 17}, {"static_k": None}, {"groups": (64,)}, {"groups": (32,)}, {"a_bytes": 4}, {"tma": False}, {"static_k": 4096 + 64}]
    device, tail = DEVICES["sm_90"], Tail(bias=COLUMN)
    assert stream.candidates(good, device, tail, thorough=False)
    for each in wrong:
        assert not stream.candidates(dataclasses.replace(good, **each), device, tail, thorough=True), each
    found = stream.candidates(good, device, Tail(bias=COLUMN, block_size=32), thorough=False)
    assert found
    assert all(config.block_n == 32 for config in found)
    assert not stream.candidates(good, device, Tail(bias=COLUMN, block_size=128), thorough=False)


@pytest.mark.parametrize(
    ("total", "most", "groups", "steps"), [(32, 8, 8, 1), (112, 8, 7, 4), (112, 2, 2, 14), (33, 8, 5, 2), (1, 8, 1, 1), (9, 2, 2, 2), (65, 8, 6, 3)]
)
def test_steps_of_a_stream_are_few_and_of_one_size(total: int, most: int, groups: int, steps: int) -> None:
    """By four warps."""
    config = StreamConfig(8, 16, 4, most)
    assert config.groups_of(total) == groups
    assert -(-total // (4 * groups)) == -(-total // (4 * most)) == steps


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("m", [1, 4, 16, 64, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_candidates_are_legal_and_few(gpu: str, m: int, name: str) -> None:
    """Some for every number of rows, on every GPU; a vector for one row alone, splits for few."""
    group = () if name == "weight_int8_mm" else (128,)
    problem = Problem(m, 4096, 4096, 4096, tma=True, one_row=m == 1, groups=group, a_bytes=1 if name.startswith("int8") else 2)
    tail = Tail(bias=COLUMN)
    found = {type(each): each.candidates(problem, DEVICES[gpu], tail, thorough=False) for each in LOWERINGS[name].templates}
    assert found[WeightTiled]
    assert bool(found[WeightSplit]) is (m <= 16) or DEVICES[gpu].shared_memory < 2**17
    assert m <= 16 or not found[WeightSplit]
    assert bool(found.get(WeightStream)) is (m <= 16 and name == "weight_int4_mm")
    assert bool(found.get(WeightVector)) is (m == 1 and not name.startswith("int8"))
    assert sum(map(len, found.values())) <= 14
    for each in LOWERINGS[name].templates:
        assert all(each.is_legal(config, problem, DEVICES[gpu], tail) for config in found[type(each)])


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 8, 12, 16, 100, 4093, 4096])
@pytest.mark.parametrize("block_size", [None, 32, 128])
def test_some_config_is_legal_for_every_length_of_rows(k: int, block_size: int | None) -> None:
    (tiled, *_) = LOWERINGS["weight_int8_mm"].templates
    for device in DEVICES.values():
        for a_bytes in (2, 4):
            problem = Problem(64, 256, k, k, tma=False, a_bytes=a_bytes)
            assert tiled.candidates(problem, device, Tail(bias=COLUMN, block_size=block_size), thorough=True)


def test_where_the_weight_is_expanded() -> None:
    """Float activations of many rows, and of float32; never where the kernel takes int8 activations, nor, untimed, where
    Hopper's template is.
    """
    device = DEVICES[sorted(DEVICES)[0]]

    def problem(m: int, a_bytes: int) -> Problem:
        return Problem(m, 4096, 4096, None, tma=False, a_bytes=a_bytes)

    for name in NAMES[:3]:
        expands = LOWERINGS[name].expands
        assert [expands(problem(m, 2), device) for m in (1, EXPANDED_ROWS - 1, EXPANDED_ROWS, 8192)] == [False, False, True, True]
        assert expands(problem(1, 4), device)
        assert LOWERINGS[name].eager_kernel(problem(8192, 2), torch.device("cpu")) == "aten.mm, the weight expanded to 33554432 bytes"
    assert not any(LOWERINGS[name].expands(problem(8192, 1), device) for name in NAMES[3:])
    hopper = dataclasses.replace(device, warpgroups=True)
    expanded = {name: [LOWERINGS[name].expands(problem(m, 2), hopper) for m in (EXPANDED_ROWS, 8192)] for name in NAMES[:3]}
    assert expanded == {NAMES[0]: [False, False], NAMES[1]: [True, True], NAMES[2]: [True, True]}
    assert LOWERINGS[NAMES[0]].expands(dataclasses.replace(problem(EXPANDED_ROWS, 2), k=1000), hopper)


def test_many_rows_in_bfloat16_are_multiplied_with_the_expanded_weight() -> None:
    case = WeightCase("weight_int8_mm", EXPANDED_ROWS, 40, 64, bias=torch.float32, activation="relu")
    product = torch.ops.int8_inductor.weight_int8_mm.default
    given = case.operands()
    compiled = run(lambda a: product(**(given | {"a": a}), activation="relu"), given["a"])
    assert not any(name.startswith("triton_tem_") for name in compiled.kernels)
    check_float(compiled.output, case.want())
