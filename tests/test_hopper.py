"""The templates for Hopper: every config on a GPU against float64, its machine code without one, and what is legal."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from block_cases import BlockCase
from hopper_cases import FAST, H200, INT4_CONFIGS, JOBS, WEIGHT_CONFIGS, compile_jobs
from kernel_cases import Case, out_scale
from support import FLOATS, check_float, check_int8
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.virtualized import V
from weight_cases import WeightCase

from int8_inductor import autotune, operands
from int8_inductor.expand_int4 import expand_int4
from int8_inductor.gluon import program
from int8_inductor.gluon.program import Box, Launch
from int8_inductor.gluon.template import memory_in_words, swapped
from int8_inductor.int4 import unpack_int4
from int8_inductor.products.scaled_mm import ZERO_POINT_DTYPES
from int8_inductor.templates import LOWERINGS, hopper, hopper_blocks, hopper_int4, hopper_scaled_mm, hopper_weights
from int8_inductor.templates.hopper_int4 import INT4_MM
from int8_inductor.templates.problem import Problem
from int8_inductor.templates.tail import COLUMN, ROW, Tail

gpu = pytest.mark.gpu
TEMPLATES = {
    "scaled_mm": hopper_scaled_mm,
    "block_scaled_mm": hopper_blocks.BLOCK_SCALED_MM,
    "int8_int4_mm": hopper_blocks.INT8_INT4_MM,
    "weight_int8_mm": hopper_weights,
}


def template_of(product: str, config: hopper.HopperConfig) -> Any:
    """The template that has it."""
    return TEMPLATES[product] if product in TEMPLATES else next(each for each in INT4_MM if config in each.configs)


@contextmanager
def only(product: str, config: hopper.HopperConfig) -> Iterator[None]:
    """Lower `product` to one config of its template for Hopper, whatever the sizes."""

    class One:
        """The template, with one candidate."""

        def __getattr__(self, name: str) -> Any:
            return getattr(template_of(product, config), name)

        def candidates(self, problem: Problem, device: Any, tail: Tail, *, thorough: bool) -> list[hopper.HopperConfig]:
            assert template_of(product, config).is_legal(config, problem, device, tail), device
            return [config]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOWERINGS, product, dataclasses.replace(LOWERINGS[product], templates=(One(),)))
        patch.setattr(autotune, "_WINNERS", {})
        yield


# On a GPU -------------------------------------------------------------------------------------------------------------------------

# (M, N, K), activation, dtype of the bias, whether scales are rows', of int8 results. Tiles that are not whole, one and more than there are
# programs; K of one step, of an odd number of them, and not whole.
CASES = [
    ((70, 50, 128), "none", None, False),
    ((1, 128, 16), "relu", torch.float32, True),
    ((257, 4100, 48), "gelu", torch.bfloat16, False),
    ((4500, 1016, 912), "silu", torch.float32, True),
    ((1030, 1000, 400), "gelu_tanh", torch.bfloat16, True),
]
CONFIGS = {"scaled_mm": hopper_scaled_mm.CONFIGS, "weight_int8_mm": WEIGHT_CONFIGS, "weight_int4_mm": INT4_CONFIGS}


def _cases(*templates: str) -> Any:
    pairs = [(name, config) for name in templates for config in CONFIGS.get(name, hopper_blocks.CONFIGS)]
    every = [(*pair, *case) for pair in pairs for case in CASES]
    return pytest.mark.parametrize(("product", "config", "sizes", "activation", "bias", "rows"), every, ids=str)


@gpu
@_cases("scaled_mm")
def test_scaled_mm(product: str, config: Any, sizes: tuple[int, ...], activation: str, bias: torch.dtype | None, rows: bool) -> None:
    case = Case(*sizes, bias=bias, activation=activation, a_rows=rows, b_rows=rows, device="cuda")
    want = case.want(narrow=True)
    scale = out_scale(case, want, per_row=rows)
    store = {"out_scale": scale} if rows else {"out_dtype": torch.bfloat16}
    with only(product, config):
        compiled = case.scaled_mm("triton", store=store)
    assert compiled.kernels == ["triton_tem_gluon"]
    if rows:
        check_int8(compiled.output, want, scale)
    else:
        check_float(compiled.output, want)


@gpu
@_cases("block_scaled_mm")
def test_block_scaled_mm(product: str, config: Any, sizes: tuple[int, ...], activation: str, bias: torch.dtype | None, rows: bool) -> None:
    case = BlockCase(*sizes, scale_block=128, bias=bias, activation=activation, device="cuda")
    with only(product, config):
        compiled = case.compiled("triton", store={"out_dtype": torch.float16 if rows else torch.bfloat16})
    assert compiled.kernels == ["triton_tem_gluon"]
    check_float(compiled.output, case.want(narrow=True))


@gpu
@_cases("int8_int4_mm", "weight_int8_mm", "weight_int4_mm")
def test_weights(product: str, config: Any, sizes: tuple[int, ...], activation: str, bias: torch.dtype | None, rows: bool) -> None:
    dtype = torch.float16 if rows else torch.bfloat16
    case = WeightCase(
        product, *sizes, groups=-(-sizes[2] // 128), group_size=128, a_dtype=dtype, a_rows=rows, bias=bias, activation=activation, device="cuda"
    )
    with only(product, config):
        compiled = case.compiled("triton", store={"out_dtype": torch.bfloat16})
    assert compiled.kernels == ["triton_tem_gluon"]
    assert compiled.has(f'"unpacked": {sizes[1] * case.depth if product == "int8_int4_mm" else 0}')
    assert compiled.has(f'"splits": {config.splits}')
    check_float(compiled.output, case.want(narrow=True))


@gpu
def test_a_result_that_is_not_aligned_is_refused() -> None:
    out = torch.empty(65, dtype=torch.int8, device="cuda")[1:].view(8, 8)
    with pytest.raises(ValueError, match="out must begin at a multiple of 16 bytes, got address 0x"):
        program.run(source="", launch="", out=out)


# Machine code ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_machine_code() -> None:
    """Every config with the longest tail: on sm_90's own tensor-core instruction, in flight, within registers and shared memory."""
    for job, code in zip(JOBS, compile_jobs(JOBS), strict=True):
        loop = job.loop
        instruction = {torch.int8: "s32.s8.s8", torch.bfloat16: "f32.bf16.bf16", torch.float16: "f32.f16.f16"}[job.dtype]
        assert code.mma, job
        assert all(each.startswith("wgmma.mma_async") and each.endswith(instruction) for each in code.mma), (job, code.mma)
        assert (code.stack, code.serialized) == (0, False), (job, code)
        assert code.shared <= loop.shared_memory(job.config), (job, code)
        assert job.config.programs * (code.shared + 1024) <= 228 * 1024, (job, code)
        # What stays in flight: the newest product; beside few rows nothing, there are other programs.
        assert code.waits[0] == (not job.in_words), (job, code)


def test_a_compile_worker_leaves_the_kernel_in_tritons_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text that a worker runs, in a process like a worker: it imports nothing of this package."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    texts: list[str] = []

    class Pool:
        """Inductor's workers."""

        def submit(self, fn: Any, text: str, names: dict[str, Any]) -> Future[None]:
            assert (fn, names) == (exec, {})
            texts.append(text)
            return Future()

    monkeypatch.setattr(AsyncCompile, "use_process_pool", lambda: True)
    monkeypatch.setattr(AsyncCompile, "process_pool", Pool)
    monkeypatch.setattr(program, "_UNDER_WAY", {})
    source, launch = JOBS[0].program()
    for _ in range(2):
        program.start_compiling(torch.device("cuda", 0), source, launch)
    (text,) = texts
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")}
    check = "\nimport sys\nassert not any(name.startswith('int8_inductor') for name in sys.modules)\n"
    subprocess.run([sys.executable, "-c", text + check], env=env, check=True, cwd=tmp_path)
    assert list(tmp_path.glob("*/kernel.cubin"))


# Without a GPU --------------------------------------------------------------------------------------------------------------------


def test_what_is_legal() -> None:
    """Descriptors, a static K, results of two bytes or one, no sums for a zero point, no scales to store; and Hopper."""
    problem = Problem(4096, 4096, 4096, 4096, tma=True)
    config, tail = hopper_scaled_mm.CONFIGS[0], FAST
    assert hopper_scaled_mm.is_legal(config, problem, H200, tail)
    for changed in (
        dataclasses.replace(problem, tma=False),
        dataclasses.replace(problem, static_k=None),
        dataclasses.replace(problem, side_by_side=(4000, 96)),
    ):
        assert not hopper_scaled_mm.is_legal(config, changed, H200, tail)
    for changed in (
        dataclasses.replace(tail, fast=False),
        dataclasses.replace(tail, a_zero_point=ROW),
        dataclasses.replace(tail, block_size=128),
    ):
        assert not hopper_scaled_mm.is_legal(config, problem, H200, changed)
    for device in (dataclasses.replace(H200, warpgroups=False), dataclasses.replace(H200, shared_memory=99 * 1024)):
        assert not hopper_scaled_mm.is_legal(config, problem, device, tail)
    for template, groups in itertools.product((hopper_blocks.BLOCK_SCALED_MM, hopper_blocks.INT8_INT4_MM), (32, 64, 128)):
        assert template.is_legal(hopper_blocks.CONFIGS[0], dataclasses.replace(problem, groups=(groups,)), H200, tail) is (groups == 128)
    weights = dataclasses.replace(problem, a_bytes=2)
    for group in (32, 64, 128):
        for each in INT4_MM:
            assert each.is_legal(each.configs[0], dataclasses.replace(weights, groups=(group,)), H200, tail) is (group == 128)
            assert not each.is_legal(each.configs[0], dataclasses.replace(weights, groups=(128,), a_bytes=4), H200, tail)
    assert hopper_weights.is_legal(hopper_weights.CONFIGS[0], weights, H200, tail)
    assert not hopper_weights.is_legal(hopper_weights.CONFIGS[0], dataclasses.replace(weights, a_bytes=4), H200, tail)
    split = dataclasses.replace(hopper_weights.TILES[0], splits=2)
    assert not hopper_weights.is_legal(split, weights, H200, tail)
    assert hopper_weights.is_legal(split, dataclasses.replace(weights, static_m=4096), H200, tail)
    blocks = dataclasses.replace(problem, groups=(128,), static_m=4096)
    assert not hopper_blocks.BLOCK_SCALED_MM.is_legal(dataclasses.replace(hopper_blocks.CONFIGS[1], parts=1), blocks, H200, tail)
    assert not hopper_blocks.BLOCK_SCALED_MM.is_legal(dataclasses.replace(hopper_blocks.CONFIGS[0], splits=2), blocks, H200, tail)


@pytest.mark.parametrize(
    ("m", "n", "k", "splits"),
    [(64, 4096, 14336, 2), (256, 4096, 14336, 2), (1024, 28672, 4096, 1), (4096, 4096, 4096, 1), (64, 768, 768, 1)],
)
def test_k_is_split_where_tiles_are_few(m: int, n: int, k: int, splits: int) -> None:
    """The first candidate, which the cost model holds for the best."""
    problem = Problem(m, n, k, k, tma=True, a_bytes=2, static_m=m)
    found = hopper_weights.candidates(problem, H200, FAST, thorough=False)
    assert found[0].splits == splits
    assert all(each.splits == 1 for each in hopper_weights.candidates(dataclasses.replace(problem, static_m=None), H200, FAST, thorough=False))


@pytest.mark.parametrize("m", [1, 16, 17, 64, 100, 256, 6304])
def test_candidates_are_few_and_not_mostly_padding(m: int) -> None:
    rows = {"scaled_mm": (65, m), "weight_int8_mm": (33, m), "weight_int4_mm": (5, 191)}
    for name in (*TEMPLATES, "weight_int4_mm"):
        groups = (128,) if "block" in name or "int4" in name else ()
        problem = Problem(m, 4096, 4096, 4096, tma=True, groups=groups, a_bytes=2 if name.startswith("weight") else 1)
        template = TEMPLATES.get(name)
        found = template.candidates(problem, H200, FAST, thorough=True) if template else int4_candidates(problem)
        assert len(found) <= getattr(template or hopper_int4, "TIMED", 2)
        least, most = rows.get(name, (256, m))
        assert bool(found) is (least <= m <= most)


@pytest.mark.parametrize(
    ("m", "n", "k", "columns", "splits"),
    [
        (16, 6144, 4096, 16, [4, 4, 2]),
        (16, 7168, 4096, 16, [4, 2, 2]),
        (17, 4096, 14336, 32, [4, 2, 1]),
        (64, 4096, 4096, 64, [4, 2, 1]),
        (16, 28672, 4096, 16, [1]),
        (191, 4096, 4096, 128, [2, 1]),
        (16, 1024, 1024, 16, [2, 2, 1]),
    ],
)
def test_an_int4_weight_is_split_where_tiles_are_few(m: int, n: int, k: int, columns: int, splits: list[int]) -> None:
    """The narrowest tile, and as many parts of K as run at once; none where M, and with it the memory for the sums, is not known."""
    problem = Problem(m, n, k, k, tma=True, groups=(128,), a_bytes=2, static_m=m)
    found = int4_candidates(problem)
    assert [(each.columns, each.splits) for each in found] == [(columns, each) for each in splits]
    assert [each.splits for each in int4_candidates(dataclasses.replace(problem, static_m=None))] == [1]


def int4_candidates(problem: Problem) -> list[hopper.HopperConfig]:
    """Of both templates, of which one has any."""
    first, second = (each.candidates(problem, H200, FAST, thorough=False) for each in INT4_MM)
    assert not (first and second)
    return first or second


def test_for_which_devices_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute capability 9.0, a static M (a branch on M is of Inductor's own templates), and kernels that Python launches."""

    def warpgroups(capability: tuple[int, int], m: Any, cpp_wrapper: bool = False) -> bool:
        major, minor = capability
        properties = SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=227 * 1024, multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        with V.set_graph_handler(SimpleNamespace(cpp_wrapper=cpp_wrapper, fx_wrapper=False)):
            return operands.device_of(torch.device("cuda"), m).warpgroups

    assert warpgroups((9, 0), 640)
    assert warpgroups((9, 0), sympy.Integer(640))
    assert not warpgroups((9, 0), sympy.Symbol("s0"))
    assert not warpgroups((9, 0), 640, cpp_wrapper=True)
    assert not any(warpgroups(each, 640) for each in ((8, 0), (8, 9), (10, 0), (12, 0)))


def test_what_a_launch_counts() -> None:
    """Short kernels are taken where CUDA graphs launch them; long ones where they are faster than what Inductor would fuse more into."""
    with inductor_config.patch({"triton.cudagraphs": False}):
        assert autotune._with_launch(0.05) == pytest.approx(0.05 * 1.03 + 0.03)
        assert autotune._with_launch(0.06) == pytest.approx(0.06 * 1.03)
    with inductor_config.patch({"triton.cudagraphs": True}):
        assert autotune._with_launch(0.05) == pytest.approx(0.05 * 1.03)


def test_every_operand_has_a_type_in_triton() -> None:
    assert set(program.TRITON_NAMES) >= {*ZERO_POINT_DTYPES, *FLOATS}


@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (65, 128), (2, 3, 20), (130, 4100)])
def test_int4_is_unpacked_in_memory(shape: tuple[int, ...]) -> None:
    packed = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(expand_int4(packed), unpack_int4(packed))
    rows_apart = packed.repeat_interleave(2, -2)[..., ::2, :]
    assert torch.equal(expand_int4(rows_apart), unpack_int4(packed))
    assert torch.equal(expand_int4(torch.arange(256, dtype=torch.uint8).view(1, 256)), unpack_int4(torch.arange(256, dtype=torch.uint8).view(1, 256)))


def test_int4_in_parts_of_words_is_refused() -> None:
    with pytest.raises(ValueError, match=r"packed must have rows of whole 4 bytes, got shape \[3, 7\]"):
        expand_int4(torch.zeros(3, 7, dtype=torch.uint8))


def test_a_transposed_tail() -> None:
    lines = ["x = dot * tl.load(A_SCALE + ram)[:, None] * tl.load(B_SCALE + rbn)[None, :]", "y = x"]
    assert swapped(lines) == ["x = dot * tl.load(A_SCALE + ram)[None, :] * tl.load(B_SCALE + rbn)[:, None]", "y = x"]
    assert swapped(swapped(lines)) == lines


def test_a_launch_as_text() -> None:
    boxes = (Box(64, 128, "int8", 128), Box(128, 32, "int16", 64))
    how = Launch(boxes, ("float32", "bfloat16"), (128, 256), 4000, 2, 128, unpacked=4096, splits=2, last_tile=(32, 64))
    assert Launch.from_json(how.to_json()) == how
    assert how.sums(129) == 2 * 256 * 4096


def test_the_memory_of_a_launch_in_words() -> None:
    """The sums of a split product, and the weight that is unpacked; nothing for others, nor for a kernel of another kind."""
    boxes, dtypes = (Box(64, 128, "int8", 128),), ("float32", "bfloat16")

    def words(name: str = "extern_kernels.int8_inductor_gluon", **more: Any) -> str:
        launch = Launch(boxes, dtypes, (128, 256), 4000, 1, **more).to_json()
        buffer = SimpleNamespace(python_kernel_name=name, kwargs={"launch": launch}, get_size=lambda: [sympy.Integer(129), 4000])
        return memory_in_words(SimpleNamespace(data=SimpleNamespace(data=buffer)))

    assert words(splits=2) == f", K in 2 parts with {4 * 2 * 256 * 4096} bytes of sums"
    assert words(unpacked=4096) == ", the weight unpacked to 4096 bytes"
    assert words() == words("extern_kernels.mm", unpacked=4096) == ""


def test_a_tail_with_constants_and_several_weights() -> None:
    """A constant is a literal of the module; each weight has its descriptor, and no tile spans two."""
    tail = dataclasses.replace(FAST, a_scale=None, bias=COLUMN)
    template = hopper_scaled_mm.template(tail)
    assert template.names == ("A", "B", "B_SCALE", "BIAS")
    assert "tl.load(BIAS + rbn *" in template.source
