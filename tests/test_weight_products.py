"""Weight-only and int4 products, compiled, against float64 and against their eager definition: shapes, strides, dtypes, groups, scales, epilogues."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from kernel_cases import KERNELS
from support import FLOATS, check_blocks, check_float, check_int8, examples, fresh_compile, in_blocks, well_conditioned
from weight_cases import NAMES, PRODUCTS_BY_NAME, WeightCase, weight_cases

from int8_inductor import int4, reference
from int8_inductor.epilogues import EPILOGUES

kernels = pytest.mark.parametrize("kernel", [each for each in KERNELS if each != "auto"])
names = pytest.mark.parametrize("name", NAMES)

# Results --------------------------------------------------------------------------------------------------------------------------


@kernels
@examples(16)
@given(case=weight_cases(), dtype=st.sampled_from([None, *FLOATS]))
@example(case=WeightCase("weight_int8_mm", 1, 1, 1), dtype=None)
@example(case=WeightCase("weight_int4_mm", 67, 130, groups=3, group_size=32, activation="gelu", bias=torch.bfloat16), dtype=torch.bfloat16)
@example(case=WeightCase("int8_int4_mm", 17, 64, groups=1, group_size=128, activation="silu"), dtype=torch.float16)
def test_float_result(device: str, kernel: str, case: WeightCase, dtype: torch.dtype | None) -> None:
    if device == "cuda" and kernel == "torch":
        assume(case.a_dtype == torch.float32 and not case.name.startswith("int8"))  # elsewhere the expanded weight is rounded
    case.device = device
    want = case.want(narrow=dtype not in (None, torch.float32))
    got = case.compiled(kernel, {"out_dtype": dtype}).output
    assert got.dtype == (dtype or torch.float32)
    check_float(got, want)
    eager = PRODUCTS_BY_NAME[case.name].operator(**case.operands(), activation=case.activation, out_dtype=dtype)
    check_float(eager, case.want())


@names
@examples(3)
@given(data=st.data(), per_row=st.booleans(), quant_min=st.sampled_from([-128, -127]))
def test_int8_result(device: str, name: str, data: st.DataObject, per_row: bool, quant_min: int) -> None:
    case = data.draw(weight_cases())
    case.name, case.device, case.b_size = name, device, "normal"
    want = case.want(narrow=True)
    largest = want.value.abs().amax(-1, keepdim=True) if per_row else want.value.abs().max().reshape(1)
    scale = (largest.float() / 127 * (0.3 + case.rand(*largest.shape))).clamp(min=1e-37)
    assume(well_conditioned(want, scale))
    check_int8(case.compiled("triton", {"out_scale": scale, "out_quant_min": quant_min}).output, want, scale, None, quant_min)


@names
@examples(2)
@given(data=st.data(), block_size=st.sampled_from([32, 64, 128]), blocks=st.integers(1, 2))
def test_int8_result_in_blocks(device: str, name: str, data: st.DataObject, block_size: int, blocks: int) -> None:
    case = data.draw(weight_cases())
    case.name, case.device, case.n, case.b_size = name, device, block_size * blocks, "normal"
    want = case.want(narrow=True)
    parts, exact = in_blocks(want, block_size)
    assume(well_conditioned(parts, exact.unsqueeze(-1)))
    q, scale = case.compiled("triton", {"block_size": block_size}, blocks=True).output
    check_blocks(q, scale, want, block_size)


@names
@pytest.mark.parametrize("activation", EPILOGUES)
def test_every_epilogue(name: str, activation: str) -> None:
    case = WeightCase(name, 3, 40, 100, activation=activation, bias=torch.float32)
    check_float(case.compiled("triton").output, case.want())


def test_a_row_that_is_not_finite_is_nan_and_no_other() -> None:
    """NaN and infinity of an activation, and of a scale."""
    for name in ("weight_int8_mm", "weight_int4_mm"):
        given = WeightCase(name, 4, 16, 64, groups=1, a_dtype=torch.float16).operands()
        given["a"][1, 3] = float("nan")
        given["b_scale"][2] = float("nan")
        got = PRODUCTS_BY_NAME[name].operator(**given)
        nan = torch.zeros(4, 16, dtype=torch.bool)
        nan[1], nan[:, 2] = True, True
        assert torch.equal(got.isnan(), nan)


# int4 -----------------------------------------------------------------------------------------------------------------------------


def test_low_nibble_first_value_plus_8() -> None:
    values = torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)
    packed = int4.pack_int4(values)
    assert packed.tolist() == [[0x0 | 0xF << 4, 0x8 | 0x7 << 4]]
    assert torch.equal(int4.unpack_int4(packed), values)


@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(1, 32), (3, 64), (2, 5, 128)]))
def test_every_byte_survives_packing(seed: int, shape: tuple[int, ...]) -> None:
    packed = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(int4.pack_int4(int4.unpack_int4(packed)), packed)


@given(group_size=st.sampled_from(int4.GROUP_SIZES), seed=st.integers(0, 2**31), size=st.sampled_from([0.0, 1e-30, 1.0, 1e30]))
def test_int4_quantization_is_off_by_half_a_step(group_size: int, seed: int, size: float) -> None:
    weight = torch.randn(3, 2 * group_size, generator=torch.Generator().manual_seed(seed)) * size
    packed, scale = int4.quantize_int4(weight, group_size)
    assert scale.shape == (3, 2)
    error = (int4.dequantize_groups(int4.unpack_int4(packed), scale) - weight).abs().unflatten(1, (2, group_size))
    assert bool((error <= 0.5001 * scale.unsqueeze(-1)).all())


# Errors ---------------------------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a of integers": ("weight_int8_mm", {"a": torch.ones(5, 31, dtype=torch.int8)}, "a must be one of torch.float32, torch.bfloat16, torch.float16"),
    "a of floats": ("int8_int4_mm", {"a": torch.ones(5, 128)}, "a must be one of torch.int8, got torch.float32"),
    "b of another dtype": ("weight_int4_mm", {"b": torch.ones(33, 64, dtype=torch.int8)}, "b must be torch.uint8, got torch.int8"),
    "b of three dimensions": ("weight_int8_mm", {"b": torch.ones(1, 33, 31, dtype=torch.int8)}, r"b must be a matrix, got shape \[1, 33, 31\]"),
    "another K": ("weight_int8_mm", {"a": torch.ones(5, 32)}, r"a \[M, K\] and b \[N, K\] must agree in K, got \[5, 32\] and \[33, 31\]"),
    "K, not K / 2": ("weight_int4_mm", {"a": torch.ones(5, 64)}, r"a \[M, K\] and b \[N, K / 2\] must agree in K, got \[5, 64\] and \[33, 64\]"),
    "another group": ("weight_int4_mm", {"group_size": 16}, "group_size must be one of 32, 64, 128, got 16"),
    "part of a group": (
        "weight_int8_group_mm", {"a": torch.ones(5, 48), "b": torch.ones(33, 48, dtype=torch.int8)}, "K must be a multiple of group_size 64, got 48"
    ),
    "too few scales": ("weight_int4_mm", {"b_scale": torch.ones(33, 1)}, r"b_scale must have shape \[33, 2\], got \[33, 1\]"),
    "scales of another dtype": ("int8_int4_group_mm", {"a_scale": torch.ones(5, 2).double()}, "a_scale must be torch.float32, got torch.float64"),
    "scales of no row": ("weight_int8_mm", {"b_scale": torch.ones(32)}, r"b_scale must have 1 element or shape \[33\] or \[33, 1\], got \[32\]"),
    "no columns": ("weight_int8_mm", {"a": torch.ones(5, 0), "b": torch.ones(33, 0, dtype=torch.int8)}, "N and K must be positive"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_errors_name_product_and_argument(what: str) -> None:
    name, wrong, message = WRONG[what]
    with pytest.raises((TypeError, ValueError), match=f"^{name}: {message}"):
        PRODUCTS_BY_NAME[name].operator(**(WeightCase(name).operands() | wrong))


@names
def test_the_operators_are_sound(name: str) -> None:
    """Schema, fake tensors and eager agree."""
    given = WeightCase(name, bias=torch.float32).operands()
    with fresh_compile():
        torch.library.opcheck(PRODUCTS_BY_NAME[name].operator, (), given | {"activation": "gelu"})


def test_scales_below_the_smallest_are_not_chosen() -> None:
    packed, scale = int4.quantize_int4(torch.zeros(2, 32), 32)
    assert scale.tolist() == [[reference.SMALLEST_SCALE]] * 2
    assert packed.unique().tolist() == [0x88]
