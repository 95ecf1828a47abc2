"""The compiled operators against float64: every kernel, over shapes, strides, scales, zero points, epilogues and ways to store the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support import (
    FLOATS,
    LAYOUTS,
    Bounded,
    check_blocks,
    check_float,
    check_int8,
    examples,
    fresh_compile,
    in_blocks,
    linear64,
    run,
    well_conditioned,
    with_layout,
)
from torch import Tensor
from torch._inductor import config as inductor_config

from int8_inductor import ops, reference
from int8_inductor.epilogues import EPILOGUES
from int8_inductor.templates import tiled

KERNELS = ("triton", "torch", "auto")
kernels = pytest.mark.parametrize("kernel", KERNELS)

# Around the tile sizes (16 to 256), primes, and 1.
ROWS = st.sampled_from([1, 2, 5, 16, 17, 31, 67])
COLUMNS = st.sampled_from([1, 3, 8, 16, 33, 61, 64, 130])
DEPTHS = st.sampled_from([1, 2, 7, 16, 31, 64, 97, 129, 260])
SIZES = {"normal": 0.01, "tiny": 1e-30, "huge": 1e25}
"""Magnitudes of a_scale and b_scale. A huge one goes with one that is not, so that no step overflows."""


@dataclass
class Case:
    """Operands of scaled_mm, from a seed."""

    m: int = 5
    n: int = 33
    k: int = 31
    seed: int = 0
    a_layout: str = "contiguous"
    b_layout: str = "contiguous"
    a_rows: bool = True
    b_rows: bool = True
    a_size: str = "normal"
    b_size: str = "normal"
    a_zero_point: torch.dtype | None = None
    b_zero_point: torch.dtype | None = None
    bias: torch.dtype | None = None
    activation: str = "none"
    device: str = "cpu"
    generator: torch.Generator = field(default_factory=torch.Generator, init=False, repr=False)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def int8(self, *shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=self.generator)

    def operands(self) -> dict[str, Tensor]:
        """The tensors by argument name, on the CPU; the same at every call."""
        self.generator.manual_seed(self.seed)
        m, n, k = self.m, self.n, self.k
        rows, columns = (m, 1) if self.a_rows else (1,), (n,) if self.b_rows else (1,)
        tensors = {
            "a": with_layout(self.int8(m, k), self.a_layout),
            "b": with_layout(self.int8(n, k), self.b_layout),
            "a_scale": (self.rand(*rows) + 0.1) * SIZES[self.a_size],
            "b_scale": (self.rand(*columns) + 0.1) * SIZES[self.b_size],
        }
        if self.a_zero_point is not None:
            tensors["a_zero_point"] = self.int8(*rows).to(self.a_zero_point)
        if self.b_zero_point is not None:
            tensors["b_zero_point"] = self.int8(*columns).to(self.b_zero_point)
        if self.bias is not None:
            # As large as the product, so that a bias that is lost or misplaced shows.
            size = float(linear64(**tensors).value.abs().mean()) or 1.0
            tensors["bias"] = ((self.rand(n) - 0.5) * min(size, 1e4)).to(self.bias)
        return tensors

    def want(self, narrow: bool = False) -> Bounded:
        return linear64(**self.operands(), activation=self.activation, narrow=narrow)

    def scaled_mm(self, kernel: str, operator: Any = ops.scaled_mm, store: dict[str, Any] | None = None, **compile_kwargs: Any) -> Any:
        """The operator compiled for these operands; `store` holds tensors and constants that say how to store the result."""
        tensors = self.operands() | {name: value for name, value in (store or {}).items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in (store or {}).items() if not isinstance(value, Tensor)}
        names = list(tensors)

        def fn(*args: Tensor) -> Any:
            named = dict(zip(names, args, strict=True))
            return operator(**named, **constants, activation=self.activation, kernel_preference=kernel)

        placed = {name: t.to(self.device) for name, t in tensors.items()}
        compiled = run(fn, *placed.values(), **compile_kwargs)
        if kernel != "torch" and compile_kwargs.get("cpu_backend") != "cpp":
            # Inductor gives a template a copy of a matrix none of whose strides is 1.
            copied = [name for name in ("a", "b") if 1 not in placed[name].stride()]
            assert len(compiled.kernels) == len(copied) + 1, (compiled.kernels, copied)
            assert compiled.kernels[-1].startswith("triton_tem_")
        else:
            assert compiled.has("_int_mm")
        compiled.output = torch.utils._pytree.tree_map(lambda t: t.cpu(), compiled.output)
        return compiled


sizes = st.sampled_from([("normal", "normal"), ("normal", "normal"), ("tiny", "tiny"), ("tiny", "huge"), ("huge", "tiny"), ("huge", "normal")])
zero_point_dtypes = st.sampled_from([None, None, torch.int8, torch.int16, torch.int32, torch.int64])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    activation = draw(st.sampled_from(sorted(EPILOGUES)))
    # The curved ones have something to say about moderate values; sizes go with those that do not change them.
    a_size, b_size = draw(sizes) if activation in ("none", "relu") else ("normal", "normal")
    return Case(
        draw(ROWS), draw(COLUMNS), draw(DEPTHS), draw(st.integers(0, 2**31)),
        draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS)), draw(st.booleans()), draw(st.booleans()), a_size, b_size,
        draw(zero_point_dtypes), draw(zero_point_dtypes), draw(st.sampled_from([None, *FLOATS])), activation,
    )  # fmt: skip


# Float results --------------------------------------------------------------------------------------------------------------------


@kernels
@examples(12)
@given(case=cases(), dtype=st.sampled_from([None, *FLOATS]))
@example(case=Case(1, 1, 1), dtype=None)
@example(case=Case(1, 130, 97, bias=torch.bfloat16), dtype=torch.bfloat16)
@example(case=Case(67, 1, 97, a_zero_point=torch.int8, b_zero_point=torch.int8), dtype=None)
def test_float_result(device: str, kernel: str, case: Case, dtype: torch.dtype | None) -> None:
    case.device = device
    got = case.scaled_mm(kernel, store={"out_dtype": dtype}).output
    assert got.dtype == (dtype or torch.float32)
    check_float(got, case.want(narrow=got.dtype != torch.float32))


# Int8 results ---------------------------------------------------------------------------------------------------------------------


def out_scale(case: Case, want: Bounded, per_row: bool) -> Tensor:
    """Scales under which the largest values saturate and most do not."""
    largest = want.value.abs().amax(-1, keepdim=True) if per_row else want.value.abs().max().reshape(1)
    return (largest.float() / 127 * (0.3 + case.rand(*largest.shape))).clamp(min=1e-37)


@kernels
@examples(12)
@given(case=cases(), per_row=st.booleans(), zero_point=zero_point_dtypes, quant_min=st.sampled_from([-128, -127]))
@example(case=Case(1, 1, 1, a_rows=False), per_row=True, zero_point=torch.int8, quant_min=-128)
@example(case=Case(17, 64, 64, activation="gelu", bias=torch.float32), per_row=False, zero_point=None, quant_min=-127)
def test_int8_result(device: str, kernel: str, case: Case, per_row: bool, zero_point: torch.dtype | None, quant_min: int) -> None:
    case.device = device
    want = case.want(narrow=True)
    scale = out_scale(case, want, per_row)
    assume(well_conditioned(want, scale))
    shift = None if zero_point is None else case.int8(*scale.shape).to(zero_point)
    store = {"out_scale": scale, "out_zero_point": shift, "out_quant_min": quant_min}
    got = case.scaled_mm(kernel, store={name: value for name, value in store.items() if value is not None}).output
    check_int8(got, want, scale, shift, quant_min)


@kernels
@examples(8)
@given(case=cases(), block_size=st.sampled_from([32, 64, 128]), blocks=st.integers(1, 3))
@example(case=Case(1, k=7), block_size=32, blocks=1)
@example(case=Case(67, k=129, activation="silu", bias=torch.float16), block_size=128, blocks=3)
def test_int8_result_in_blocks(device: str, kernel: str, case: Case, block_size: int, blocks: int) -> None:
    case.device, case.n = device, block_size * blocks
    want = case.want(narrow=True)
    parts, exact = in_blocks(want, block_size)
    assume(well_conditioned(parts, exact.unsqueeze(-1)))
    q, scale = case.scaled_mm(kernel, ops.scaled_mm_block_quant, {"block_size": block_size}).output
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (q.shape, scale.shape) == ((case.m, case.n), (case.m, blocks))
    check_blocks(q, scale, want, block_size)


# Epilogues ------------------------------------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("activation", EPILOGUES)
def test_epilogue_over_its_whole_range(device: str, kernel: str, activation: str) -> None:
    """x = q * scale sweeps both tails, the middle and zero, as K is 1 and b is 1."""
    magnitudes = torch.tensor([1e-30, 1e-3, 0.01, 0.03, 0.1, 1.0, 1e4])
    a = torch.arange(-128, 128, dtype=torch.int8).reshape(-1, 1)
    b, a_scale = torch.ones(len(magnitudes), 1, dtype=torch.int8), torch.ones(1)

    def fn(*args: Tensor) -> Tensor:
        return ops.scaled_mm(*args, activation=activation, kernel_preference=kernel)

    operands = (a, b, a_scale, magnitudes)
    got = run(fn, *(t.to(device) for t in operands)).output.cpu()
    check_float(got, linear64(*operands, activation=activation))


# Shapes and configs ---------------------------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("store", ["float", "int8", "blocks"])
def test_symbolic_rows_serve_every_m_with_one_compilation(device: str, kernel: str, store: str) -> None:
    case = Case(24, 64, 70, a_zero_point=torch.int8, bias=torch.float32, activation="gelu", device=device)
    tensors = case.operands()
    fixed = {name: tensors[name].to(device) for name in ("b", "b_scale", "bias")}

    def fn(a: Tensor, a_scale: Tensor, a_zero_point: Tensor, out_scale: Tensor) -> Any:
        arguments = {"a": a, "a_scale": a_scale, "a_zero_point": a_zero_point, "activation": "gelu", "kernel_preference": kernel, **fixed}
        if store == "blocks":
            return ops.scaled_mm_block_quant(**arguments, block_size=32)
        return ops.scaled_mm(**arguments, **({"out_scale": out_scale} if store == "int8" else {}))

    with fresh_compile(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(fn, backend="int8_inductor", dynamic=False)
        for m in (24, 2, 65, 131):
            case.m = m
            rows = case.operands()
            want = linear64(**{**rows, **{name: tensors[name] for name in fixed}}, activation="gelu", narrow=store != "float")
            scale = out_scale(case, want, per_row=True)
            inputs = [t.to(device) for t in (rows["a"], rows["a_scale"], rows["a_zero_point"], scale)]
            for each in inputs:
                torch._dynamo.mark_dynamic(each, 0)
            got = torch.utils._pytree.tree_map(lambda t: t.cpu(), compiled(*inputs))
            if store == "blocks":
                check_blocks(*got, want, 32)
            elif store == "int8":
                check_int8(got, want, scale)
            else:
                check_float(got, want)


@pytest.mark.parametrize("config", tiled.CONFIGS, ids=str)
def test_every_config_of_the_tiled_template(config: tiled.TiledConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles in each direction, none of them whole, and K beyond one step; in the interpreter, where it needs no GPU that has the room."""
    monkeypatch.setattr(tiled, "candidates", lambda *args, **kwargs: [config])
    case = Case(config.block_m + 3, config.block_n + 5, config.block_k + 7, a_zero_point=torch.int8, bias=torch.bfloat16)
    compiled = case.scaled_mm("triton", store={"out_dtype": torch.bfloat16})
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
        assert compiled.has(f"{name} : tl.constexpr = {getattr(config, name.lower())}\n")
    check_float(compiled.output, case.want())


def test_programs_that_share_columns_cover_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine rows of tiles in groups of 4: the last group is short."""
    config = tiled.TiledConfig(16, 32, 32, 2, 4, group_m=4)
    monkeypatch.setattr(tiled, "candidates", lambda *args, **kwargs: [config])
    case = Case(16 * 8 + 1, 32 * 2 + 1, 32)
    check_float(case.scaled_mm("triton").output, case.want())


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 28672, 4096), (16, 4096, 14336), (300, 768, 768), (8192, 8192, 8192)])
@pytest.mark.parametrize("limit", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("block_size", [None, 32, 64, 128])
def test_candidates_are_legal_and_never_none(sizes: tuple[int, int, int], limit: int, block_size: int | None) -> None:
    from int8_inductor.templates.tail import SCALAR, Tail

    tail = Tail(SCALAR, SCALAR, block_size=block_size)
    quick = tiled.candidates(sizes, limit, tail, thorough=False)
    thorough = tiled.candidates(sizes, limit, tail, thorough=True)
    assert 1 <= len(quick) <= tiled.QUICK_CONFIGS
    assert quick == thorough[: len(quick)]
    assert len(set(thorough)) == len(thorough)
    for config in thorough:
        assert config.shared_memory() <= limit
        assert block_size is None or config.block_n % block_size == 0


# What is not finite, and nothing at all -------------------------------------------------------------------------------------------


@kernels
def test_rows_that_are_not_finite_or_zero_are_the_same_in_eager_and_compiled(device: str, kernel: str) -> None:
    case = Case(6, 64, 32, bias=torch.float32, activation="silu", device=device)
    tensors = case.operands()
    tensors["a"][1] = 0
    tensors["a_scale"][2] = float("nan")
    tensors["a_scale"][3] = float("inf")
    tensors["a_scale"][4] = reference.SMALLEST_SCALE
    tensors["a_scale"][5] = 3e38
    tensors["bias"][7:10] = torch.tensor([float("inf"), float("nan"), float("-inf")])
    scale = torch.full((6, 1), 0.05)
    names = list(tensors)

    def fn(scale: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        operands = dict(zip(names, args, strict=True)) | {"activation": "silu", "kernel_preference": kernel}
        shift = torch.full_like(scale, 9, dtype=torch.int8)
        return (
            ops.scaled_mm(**operands),
            ops.scaled_mm(**operands, out_scale=scale),
            ops.scaled_mm(**operands, out_scale=scale, out_zero_point=shift),
            *ops.scaled_mm_block_quant(**operands, block_size=32),
        )

    want = fn(scale, *tensors.values())
    got = [t.cpu() for t in run(fn, *(t.to(device) for t in (scale, *tensors.values()))).output]
    for mine, eager in zip(got, want, strict=True):
        assert mine.dtype == eager.dtype
        off = {"rtol": 0.0, "atol": 1.0} if mine.dtype == torch.int8 else {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(mine.float(), eager.float(), **off, equal_nan=True)
    y, q, shifted, q_blocks, scales = got
    assert bool(y[2].isnan().all())
    assert y[1, 7].item() == float("inf")
    assert y[:, 8:10].isnan().all()  # silu of -inf is NaN
    assert q[2].tolist() == [0] * 64
    assert q[1, 7:10].tolist() == [127, 0, 0]
    assert shifted[2].tolist() == [9] * 64
    assert shifted[1, 7:10].tolist() == [127, 9, 9]
    # The first block holds bias's infinities and NaN and so has no scale; the second has one where its row is finite.
    assert scales.isnan().tolist() == [[True, False], [True, False], [True, True], [True, True], [True, False], [True, True]]
    assert q_blocks[:, :32].tolist() == [[0] * 32] * 6
    assert q_blocks[2].tolist() == [0] * 64


@kernels
def test_no_rows_give_no_rows(device: str, kernel: str) -> None:
    """M = 0 in a compiled call of the operator."""
    b, scale = torch.ones(64, 32, dtype=torch.int8, device=device), torch.ones(1, device=device)

    def fn(a: Tensor, a_scale: Tensor) -> tuple[Tensor, ...]:
        arguments = (a, b, a_scale, scale)
        kwargs = {"kernel_preference": kernel}
        return (
            ops.scaled_mm(*arguments, **kwargs, out_dtype=torch.bfloat16),
            ops.scaled_mm(*arguments, **kwargs, out_scale=scale),
            *ops.scaled_mm_block_quant(*arguments, **kwargs, block_size=32),
        )

    got = run(fn, torch.ones(0, 32, dtype=torch.int8, device=device), torch.ones(0, 1, device=device)).output
    assert [(tuple(t.shape), t.dtype) for t in got] == [
        ((0, 64), torch.bfloat16), ((0, 64), torch.int8), ((0, 64), torch.int8), ((0, 2), torch.float32)
    ]  # fmt: skip


# Plain C++ ------------------------------------------------------------------------------------------------------------------------

CPP_CASES = (
    Case(1, 33, 31),
    Case(5, 1, 31, a_zero_point=torch.int8),
    Case(5, 33, 1, b_zero_point=torch.int32),
    Case(1, 1, 1),
    Case(1, 64, 7, a_layout="transposed", b_layout="transposed", bias=torch.bfloat16),
    Case(17, 1, 64, a_layout="sliced", b_layout="sliced", activation="gelu"),
    Case(31, 130, 97, a_layout="offset", b_layout="offset", activation="silu", bias=torch.float32, a_rows=False, b_rows=False),
    Case(16, 61, 129, a_layout="expanded", b_layout="expanded", activation="gelu_tanh", a_zero_point=torch.int8, b_zero_point=torch.int8),
    Case(2, 8, 260, activation="relu", a_size="tiny", b_size="huge"),
)


def test_plain_cpp_over_shapes_and_layouts() -> None:
    """Inductor's C++ for the CPU: all cases as float32, bfloat16 and int8, in one graph."""
    tensors = [case.operands() for case in CPP_CASES]
    scales = [out_scale(case, case.want(), per_row=False) for case in CPP_CASES]

    def fn(tensors: list[dict[str, Tensor]], scales: list[Tensor]) -> list[tuple[Tensor, ...]]:
        results = []
        for case, operands, scale in zip(CPP_CASES, tensors, scales, strict=True):
            each = operands | {"activation": case.activation}
            results.append(
                (ops.scaled_mm(**each), ops.scaled_mm(**each, out_dtype=torch.bfloat16), ops.scaled_mm(**each, out_scale=scale, out_quant_min=-127))
            )
        return results

    compiled = run(fn, tensors, scales, cpu_backend="cpp")
    assert compiled.kernels == []
    assert compiled.has("_int_mm")
    for case, scale, (single, half, int8) in zip(CPP_CASES, scales, compiled.output, strict=True):
        assert (single.dtype, half.dtype) == (torch.float32, torch.bfloat16)
        want = case.want()
        check_float(single, want)
        check_float(half, want)
        check_int8(int8, want, scale, None, -127)


def test_plain_cpp_with_symbolic_rows_and_blocks() -> None:
    case = Case(24, 64, 70, bias=torch.float32, activation="gelu")
    fixed = {name: case.operands()[name] for name in ("b", "b_scale", "bias")}

    def fn(a: Tensor, a_scale: Tensor) -> tuple[Tensor, ...]:
        arguments = {"a": a, "a_scale": a_scale, "activation": "gelu", **fixed}
        return ops.scaled_mm(**arguments), *ops.scaled_mm_block_quant(**arguments, block_size=32)

    with fresh_compile(), inductor_config.patch(cpu_backend="cpp"), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(fn, backend="int8_inductor", dynamic=False)
        for m in (24, 2, 65):
            case.m = m
            rows = case.operands()
            want = linear64(**{**rows, **fixed}, activation="gelu")
            torch._dynamo.mark_dynamic(rows["a"], 0)
            torch._dynamo.mark_dynamic(rows["a_scale"], 0)
            got, q, scale = compiled(rows["a"], rows["a_scale"])
            check_float(got, want)
            check_blocks(q, scale, want, 32)


def test_a_preference_that_cannot_be_met_is_an_error() -> None:
    words = "KernelPreferenceError: kernel_preference 'triton' cannot be met on cpu: Inductor's CPU backend is not Triton"
    with pytest.raises(Exception, match=words):
        Case().scaled_mm("triton", cpu_backend="cpp")
