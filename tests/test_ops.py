"""The operators in eager: against float64, under torch.library.opcheck, and every error by its exact words."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from int8_inductor import ops, reference
from int8_inductor.epilogues import EPILOGUES

EPS = 2.0**-24
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 64])


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * torch.special.erfc(-x / math.sqrt(2))


def gelu_tanh(x: Tensor) -> Tensor:
    # 0.5 (1 + tanh t) is sigmoid(2 t), which does not cancel.
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


ACTIVATIONS = {"none": lambda x: x, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": lambda x: x.clamp(min=0), "silu": lambda x: x * torch.sigmoid(x)}
"""Each epilogue in float64, by another formula than the package's."""


class Inputs:
    """Random operands of scaled_mm. `parts` names the optional ones to make, and "rows": scales and zero points per row, not per tensor."""

    def __init__(self, m: int, n: int, k: int, seed: int, parts: set[str], strided: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        rows, columns = ((m, 1), (n,)) if "rows" in parts else ((1,), (1,))
        self.a, self.b = self.int8(m, k, strided), self.int8(n, k, strided)
        self.operands: dict[str, Any] = {"a_scale": self.scale(rows), "b_scale": self.scale(columns)}
        if "a_zero_point" in parts:
            self.operands["a_zero_point"] = self.zero_point(rows)
        if "b_zero_point" in parts:
            self.operands["b_zero_point"] = self.zero_point(columns)
        if "bias" in parts:
            self.operands["bias"] = torch.randn(n, generator=self.generator)
        self.store: dict[str, Any] = {}
        if "out_scale" in parts:
            self.store["out_scale"] = self.scale(rows) * 10
        if "out_zero_point" in parts:
            self.store["out_zero_point"] = self.zero_point(rows)

    def int8(self, rows: int, columns: int, strided: bool) -> Tensor:
        whole = torch.randint(-128, 128, (columns, 2 * rows) if strided else (rows, columns), dtype=torch.int8, generator=self.generator)
        return whole.t()[::2] if strided else whole

    def scale(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.generator) * 0.03 + 0.001

    def zero_point(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=self.generator)

    def float64(self, activation: str) -> tuple[Tensor, Tensor]:
        """The result before the store, and a bound on the float32 error of it."""

        def get(name: str, shape: tuple[int, ...]) -> Tensor | float:
            return self.operands[name].double().reshape(shape) if name in self.operands else 0.0

        a = self.a.double() - get("a_zero_point", (-1, 1))
        b = self.b.double() - get("b_zero_point", (-1, 1))
        product = (a @ b.t()) * get("a_scale", (-1, 1)) * get("b_scale", (1, -1))
        bias = get("bias", (1, -1))
        # Four roundings: int32 to float32, two scales, bias. The activations' slopes are at most 1.13, and their own float32
        # formulas round a few intermediate values that are at most |x| + 1 large.
        magnitude = product.abs() + (bias.abs() if isinstance(bias, Tensor) else 0.0)
        activated = activation != "none"
        return ACTIVATIONS[activation](product + bias), EPS * (5 * magnitude + activated * 8 * (magnitude + 1))


all_parts = st.sets(st.sampled_from(["rows", "a_zero_point", "b_zero_point", "bias"]))
# By the package's list: an epilogue without its float64 twin above fails.
activations = st.sampled_from(sorted(EPILOGUES))
seeds = st.integers(0, 2**32 - 1)


@given(m=SIZES | st.just(0), n=SIZES, k=SIZES, seed=seeds, parts=all_parts, activation=activations, strided=st.booleans(),
       dtype=st.sampled_from([None, *reference.OUT_DTYPES]))  # fmt: skip
def test_float_output_against_float64(
    m: int, n: int, k: int, seed: int, parts: set[str], activation: str, strided: bool, dtype: torch.dtype | None
) -> None:
    inputs = Inputs(m, n, k, seed, parts, strided)
    got = ops.scaled_mm(inputs.a, inputs.b, **inputs.operands, activation=activation, out_dtype=dtype)
    out_dtype = dtype or torch.float32
    assert (got.dtype, got.shape, got.is_contiguous()) == (out_dtype, (m, n), True)
    expected, error = inputs.float64(activation)
    smallest_step = torch.finfo(out_dtype).smallest_normal * torch.finfo(out_dtype).eps
    assert bool(((got.double() - expected).abs() <= error + HALF_ULP[out_dtype] * (expected.abs() + error) + smallest_step).all())


@given(m=SIZES | st.just(0), n=SIZES, k=SIZES, seed=seeds, parts=all_parts, activation=activations, zero_point=st.booleans(),
       quant_min=st.sampled_from([-128, -127]))  # fmt: skip
def test_int8_output_against_float64(m: int, n: int, k: int, seed: int, parts: set[str], activation: str, zero_point: bool, quant_min: int) -> None:
    inputs = Inputs(m, n, k, seed, {*parts, "out_scale"} | ({"out_zero_point"} if zero_point else set()))
    got = ops.scaled_mm(inputs.a, inputs.b, **inputs.operands, **inputs.store, activation=activation, out_quant_min=quant_min)
    assert (got.dtype, got.shape, got.is_contiguous()) == (torch.int8, (m, n), True)
    expected, error = inputs.float64(activation)
    out_scale = inputs.store["out_scale"].double()
    steps = expected / out_scale
    shift = inputs.store["out_zero_point"].double() if zero_point else 0.0
    rounded = (steps.round() + shift).clamp(quant_min, 127)
    near_tie = ((steps - steps.floor() - 0.5).abs() <= error / out_scale + EPS * steps.abs()).double()
    assert bool(((got.double() - rounded).abs() <= near_tie).all())


@given(m=st.integers(0, 5), n=st.sampled_from([1, 31, 32, 64, 130, 256]), block_size=st.sampled_from(ops.BLOCK_SIZES), k=SIZES, seed=seeds,
       parts=all_parts, activation=activations)  # fmt: skip
def test_block_quant_is_scaled_mm_and_quantize_blocks(m: int, n: int, block_size: int, k: int, seed: int, parts: set[str], activation: str) -> None:
    inputs = Inputs(m, n, k, seed, parts)
    q, scale = ops.scaled_mm_block_quant(inputs.a, inputs.b, **inputs.operands, activation=activation, block_size=block_size)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    y = ops.scaled_mm(inputs.a, inputs.b, **inputs.operands, activation=activation)
    largest = reference.in_blocks(y, (block_size,)).abs().amax(-1)
    assert torch.equal(scale, torch.where(largest > 0, (largest / 127).clamp(min=reference.SMALLEST_SCALE), 0.0))
    assert q.shape == y.shape
    step = reference.expand_blocks(scale, [n], (block_size,)).double()
    assert bool(((q.double() * step - y.double()).abs() <= step * (0.5 + 127 * 4 * EPS)).all())


@pytest.mark.parametrize("quant_min", [-128, -127])
def test_int8_output_saturates_at_the_limits_asked_for(quant_min: int) -> None:
    a, one = torch.tensor([[127], [-127]], dtype=torch.int8), torch.ones(1)
    for zero_point in (None, torch.tensor([5], dtype=torch.int8)):
        stored = ops.scaled_mm(a, a[:1], one, one, out_scale=one, out_zero_point=zero_point, out_quant_min=quant_min)
        assert stored.tolist() == [[127], [quant_min]]


def test_a_nan_scale_makes_its_row_nan_and_no_other() -> None:
    inputs = Inputs(3, 4, 5, 0, {"rows"})
    inputs.operands["a_scale"][1] = math.nan
    assert torch.isnan(ops.scaled_mm(inputs.a, inputs.b, **inputs.operands)).tolist() == [[False] * 4, [True] * 4, [False] * 4]
    for name in EPILOGUES:
        stored = ops.scaled_mm(
            inputs.a, inputs.b, **inputs.operands, activation=name, out_scale=torch.ones(1), out_zero_point=torch.tensor([9], dtype=torch.int8)
        )
        assert stored[1].tolist() == [9] * 4


def test_zero_points_are_exact_at_the_largest_k() -> None:
    k = reference.MAX_K_ZERO_POINTS
    a = torch.full((1, k), -128, dtype=torch.int8)
    one, shift = torch.ones(1), torch.tensor([127], dtype=torch.int8)
    assert float(ops.scaled_mm(a, a, one, one, shift, shift)) == float(torch.tensor(255.0 * 255 * k, dtype=torch.float32))
    wide = torch.full((1, reference.MAX_K_ZERO_POINT), -128, dtype=torch.int8)
    expected = float(torch.tensor(255.0 * 128 * reference.MAX_K_ZERO_POINT, dtype=torch.float32))
    assert float(ops.scaled_mm(wide, wide, one, one, shift)) == expected
    assert float(ops.scaled_mm(wide, wide, one, one, None, shift)) == expected


OPTIONAL = ("rows", "a_zero_point", "b_zero_point", "bias")
STORES = (set(), {"out_scale"}, {"out_scale", "out_zero_point"})


def check_both(inputs: Inputs, **kwargs: Any) -> None:
    """opcheck of scaled_mm and, unless `inputs` has what only that stores, of scaled_mm_block_quant."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.scaled_mm, (inputs.a, inputs.b), {**inputs.operands, **inputs.store, **kwargs}, test_utils=checks)
    if not inputs.store and "out_dtype" not in kwargs:
        torch.library.opcheck(ops.scaled_mm_block_quant, (inputs.a, inputs.b), {**inputs.operands, **kwargs, "block_size": 32}, test_utils=checks)


@pytest.mark.parametrize("store", STORES, ids=["float", "int8", "int8 with zero point"])
def test_opcheck_over_all_operands(store: set[str]) -> None:
    for flags in itertools.product((False, True), repeat=len(OPTIONAL)):
        check_both(Inputs(3, 32, 8, 0, store | set(itertools.compress(OPTIONAL, flags))))


@pytest.mark.parametrize("store", STORES, ids=["float", "int8", "int8 with zero point"])
@pytest.mark.parametrize("activation", list(EPILOGUES))
def test_opcheck_over_all_activations(activation: str, store: set[str]) -> None:
    check_both(Inputs(3, 32, 8, 0, {*OPTIONAL, *store}), activation=activation)


@pytest.mark.parametrize("dtype", reference.OUT_DTYPES)
@pytest.mark.parametrize("preference", ops.KERNEL_PREFERENCES)
def test_opcheck_over_all_output_dtypes_and_preferences(preference: str, dtype: torch.dtype) -> None:
    check_both(Inputs(3, 32, 8, 0, set(OPTIONAL)), out_dtype=dtype, kernel_preference=preference)


@pytest.mark.parametrize("store", STORES, ids=["float", "int8", "int8 with zero point"])
@pytest.mark.parametrize("size", [(0, 3, 5), (1, 1, 1), (2, 64, 8)])
def test_opcheck_traces_with_symbolic_shapes(size: tuple[int, int, int], store: set[str]) -> None:
    inputs = Inputs(*size, 0, {*OPTIONAL, *store})
    torch.library.opcheck(ops.scaled_mm, (inputs.a, inputs.b), {**inputs.operands, **inputs.store, "activation": "gelu"})
    if not store and size[1] == 64:
        torch.library.opcheck(ops.scaled_mm_block_quant, (inputs.a, inputs.b), {**inputs.operands, "block_size": 32})


INT8 = torch.zeros(2, 8, dtype=torch.int8)
ZERO = torch.zeros(1, dtype=torch.int8)
ONE = torch.ones(1)
FLOATS = "torch.float32, torch.bfloat16, torch.float16"
INTEGERS = "torch.int8, torch.int16, torch.int32, torch.int64"


def wide(k: int) -> Tensor:
    return ZERO.expand(1, k)


OPERAND_ERRORS = [
    ({"a": INT8.float()}, TypeError, "a must be torch.int8, got torch.float32"),
    ({"b": INT8.to(torch.uint8)}, TypeError, "b must be torch.int8, got torch.uint8"),
    ({"a": INT8[0]}, ValueError, "a must be a matrix, got shape [8]"),
    ({"b": INT8[None]}, ValueError, "b must be a matrix, got shape [1, 2, 8]"),
    ({"b": INT8[:, :7]}, ValueError, "a [M, K] and b [N, K] must agree in K, got [2, 8] and [2, 7]"),
    ({"b": INT8[:0]}, ValueError, "N and K must be positive, got a [2, 8] and b [0, 8]"),
    ({"a": INT8[:, :0], "b": INT8[:, :0]}, ValueError, "N and K must be positive, got a [2, 0] and b [2, 0]"),
    ({"a": wide(131072), "b": wide(131072)}, ValueError, "K must be at most 131071, or int32 could overflow; got 131072"),
    ({"a": wide(65794), "b": wide(65794), "a_zero_point": ZERO}, ValueError,
     "K must be at most 65793 with a zero point, or int32 could overflow; got 65794"),
    ({"a": wide(65794), "b": wide(65794), "b_zero_point": ZERO}, ValueError,
     "K must be at most 65793 with a zero point, or int32 could overflow; got 65794"),
    ({"a": wide(33026), "b": wide(33026), "a_zero_point": ZERO, "b_zero_point": ZERO}, ValueError,
     "K must be at most 33025 with two zero points, or int32 could overflow; got 33026"),
    ({"b": INT8.to("meta")}, ValueError, "b must be on cpu, the device of a, got meta"),
    ({"a_scale": ONE.double()}, TypeError, "a_scale must be one of torch.float32, got torch.float64"),
    ({"b_scale": ONE.bfloat16()}, TypeError, "b_scale must be one of torch.float32, got torch.bfloat16"),
    ({"a_scale": torch.ones(3)}, ValueError, "a_scale must have 1 element or shape [2] or [2, 1], got [3]"),
    ({"a_scale": torch.ones(1, 2)}, ValueError, "a_scale must have 1 element or shape [2] or [2, 1], got [1, 2]"),
    ({"a_scale": torch.ones(1, 1, 1)}, ValueError, "a_scale must have 1 element or shape [2] or [2, 1], got [1, 1, 1]"),
    ({"b_scale": torch.ones(0)}, ValueError, "b_scale must have 1 element or shape [2] or [2, 1], got [0]"),
    ({"b_scale": ONE.to("meta")}, ValueError, "b_scale must be on cpu, the device of a, got meta"),
    ({"a_zero_point": ONE}, TypeError, f"a_zero_point must be one of {INTEGERS}, got torch.float32"),
    ({"b_zero_point": ZERO.expand(3)}, ValueError, "b_zero_point must have 1 element or shape [2] or [2, 1], got [3]"),
    ({"bias": ONE.double()}, TypeError, f"bias must be one of {FLOATS}, got torch.float64"),
    ({"bias": torch.ones(2, 1)}, ValueError, "bias must have 1 element or shape [2], got [2, 1]"),
    ({"activation": "tanh"}, ValueError, "activation must be one of none, gelu, gelu_tanh, relu, silu, got 'tanh'"),
    ({"kernel_preference": "cuda"}, ValueError, "kernel_preference must be one of auto, triton, torch, got 'cuda'"),
]  # fmt: skip

STORE_ERRORS = [
    ({"out_zero_point": ZERO}, ValueError, "out_zero_point needs out_scale, got None"),
    ({"out_dtype": torch.float64}, TypeError, f"out_dtype must be one of {FLOATS}, got torch.float64"),
    ({"out_dtype": torch.int8}, TypeError, f"out_dtype must be one of {FLOATS}, got torch.int8"),
    ({"out_scale": ONE, "out_dtype": torch.float32}, TypeError, "out_dtype must be torch.int8 or None with out_scale, got torch.float32"),
    ({"out_scale": ONE, "out_quant_min": -126}, ValueError, "out_quant_min must be -128 or -127, got -126"),
    ({"out_scale": ONE.half()}, TypeError, "out_scale must be one of torch.float32, got torch.float16"),
    ({"out_scale": torch.ones(3, 1)}, ValueError, "out_scale must have 1 element or shape [2] or [2, 1], got [3, 1]"),
    ({"out_scale": ONE, "out_zero_point": ONE}, TypeError, f"out_zero_point must be one of {INTEGERS}, got torch.float32"),
    ({"out_scale": ONE, "out_zero_point": ZERO.expand(3)}, ValueError, "out_zero_point must have 1 element or shape [2] or [2, 1], got [3]"),
    ({"out_scale": ONE.to("meta")}, ValueError, "out_scale must be on cpu, the device of a, got meta"),
]


def call(op: Any, change: dict[str, Any]) -> Any:
    return op(**{"a": INT8, "b": INT8, "a_scale": ONE, "b_scale": ONE, **change})


@pytest.mark.parametrize("op", [ops.scaled_mm, ops.scaled_mm_block_quant], ids=["scaled_mm", "block_quant"])
@pytest.mark.parametrize(("change", "error", "message"), OPERAND_ERRORS, ids=[message for _, _, message in OPERAND_ERRORS])
def test_operand_errors(op: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call(op, change)
    assert str(raised.value) == f"scaled_mm: {message}"


@pytest.mark.parametrize(("change", "error", "message"), STORE_ERRORS, ids=[message for _, _, message in STORE_ERRORS])
def test_store_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call(ops.scaled_mm, change)
    assert str(raised.value) == f"scaled_mm: {message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 16}, "block_size must be one of 32, 64, 128, got 16"),
        ({"block_size": 256}, "block_size must be one of 32, 64, 128, got 256"),
    ],
)
def test_block_size_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="block_size") as raised:
        call(ops.scaled_mm_block_quant, change)
    assert str(raised.value) == f"scaled_mm_block_quant: {message}"


def test_the_unchanged_call_has_no_error() -> None:
    assert call(ops.scaled_mm, {}).tolist() == [[0.0, 0.0]] * 2


def test_fake_errors_are_the_eager_ones() -> None:
    with pytest.raises(ValueError, match=r"^scaled_mm: a_scale must have 1 element or shape \[2\]"):
        ops.scaled_mm(INT8.to("meta"), INT8.to("meta"), torch.ones(3, device="meta"), ONE.to("meta"))
