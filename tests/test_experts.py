"""Layers of experts: the operator against float64, eagerly, in the interpreter and on a GPU; its kernels one by one; what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import triton
from expert_cases import LAYOUTS, ExpertCase, expert_cases
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support import FLOATS, Bounded, U, check_float, examples
from torch import Tensor

from int8_inductor import ops as products
from int8_inductor.epilogues import EPILOGUES
from int8_inductor.experts import configs, kernels, launch, layouts, ops, reference
from int8_inductor.experts.configs import ExpertConfig

KERNELS = ("triton", "torch")


def compute(case: ExpertCase, kernel: str) -> Tensor:
    return ops.moe_experts(*case.on_device(), **case.options(), kernel_preference=kernel).cpu()


# Numerics -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@examples(8)
@given(data=st.data(), kernel=st.sampled_from(KERNELS))
def test_results_against_float64(device: str, layout: str, data: st.DataObject, kernel: str) -> None:
    case = dataclasses.replace(data.draw(expert_cases(layout)), device=device)
    want = case.want(kernel)
    assume(bool((want.value.abs() < torch.finfo(case.dtype).max / 16).all()))
    check_float(compute(case, kernel), want)


@pytest.mark.parametrize(
    "case",
    [
        ExpertCase(experts=1, k=1, inner=1, n=1, tokens=1, slots=1),
        ExpertCase("w4a8", k=384, inner=160, group=32, tokens=40, slots=3, activation="gelu"),
        ExpertCase("w4a16", k=64, inner=192, group=64, tokens=17, slots=8, dtype=torch.float16),
        ExpertCase("w8a8", inner=300, tokens=5, magnitudes=(0.0,)),
    ],
    ids=("ones", "several steps and groups", "rows of a tile and one", "zeros"),
)
def test_chosen_results_against_float64(device: str, case: ExpertCase) -> None:
    case = dataclasses.replace(case, device=device)
    check_float(compute(case, "triton"), case.want())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", sorted(EPILOGUES))
def test_every_activation_in_every_layout(device: str, layout: str, activation: str) -> None:
    case = ExpertCase(layout, k=128, inner=128, group=128, activation=activation, device=device)
    check_float(compute(case, "triton"), case.want())


TABLES = {"w8a8": configs.W8A8, "w4a8": configs.W4A8, "w4a16": (*configs.W4A16, *configs.W4A16_FLOAT32)}


@pytest.mark.parametrize(("layout", "config"), [(layout, config) for layout, table in TABLES.items() for config in table], ids=str)
def test_every_config(device: str, layout: str, config: ExpertConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experts with two tiles each and more than one tile of weight rows, none of them whole, and K beyond a step."""
    monkeypatch.setattr(configs, "choose", lambda *args, **kwargs: config)
    case = ExpertCase(layout, 2, 256, 160, config.down.block_n + 9, tokens=2 * config.block_m + 3, group=32, dtype=torch.bfloat16, device=device)
    check_float(compute(case, "triton"), case.want())


def test_experts_that_nobody_chose_are_not_read(device: str) -> None:
    """They may hold anything, even scales that are NaN."""
    case = ExpertCase("w4a8", experts=5, k=64, inner=64, device=device)
    tensors = [t.clone() for t in case.on_device()]
    tensors[5] = torch.where(tensors[5] == 3, 1, tensors[5])
    want = ops.moe_experts(*tensors)
    for scale in (tensors[2], tensors[4]):
        scale[3] = float("nan")
    got = ops.moe_experts(*tensors)
    assert torch.equal(got, want)
    assert bool(want.isfinite().all())


def test_tokens_do_not_depend_on_each_other(device: str) -> None:
    """A token's result is the same bits alone and among others, in whatever order: batches may be cut as one likes."""
    for layout in LAYOUTS:
        case = ExpertCase(layout, experts=4, k=128, inner=128, tokens=37, slots=3, device=device)
        x, *weights, index, routing = case.on_device()
        whole = ops.moe_experts(x, *weights, index, routing, **case.options())
        shuffled = torch.randperm(37, generator=torch.Generator().manual_seed(0)).to(device)
        again = ops.moe_experts(x[shuffled], *weights, index[shuffled], routing[shuffled], **case.options())
        assert torch.equal(again, whole[shuffled])


def test_a_token_that_is_not_finite_is_nan_and_alone(device: str) -> None:
    for layout in ("w8a8", "w4a8"):
        for bad in (float("nan"), float("inf")):
            case = ExpertCase(layout, tokens=5, device=device)
            x, *rest, index, routing = case.on_device()
            index = index.clamp(0, case.experts - 1)
            want = ops.moe_experts(x, *rest, index, routing)
            x = x.clone()
            x[2, 3] = bad
            for kernel in KERNELS:
                got = ops.moe_experts(x, *rest, index, routing, kernel_preference=kernel)
                assert bool(got[2].isnan().all())
                assert torch.allclose(got[[0, 1, 3, 4]], want[[0, 1, 3, 4]], rtol=1e-5, atol=1e-6)


def test_no_tokens_and_no_expert_chosen(device: str) -> None:
    for kernel in KERNELS:
        empty = compute(ExpertCase(tokens=0, device=device), kernel)
        assert empty.shape == (0, 33)
        case = ExpertCase(tokens=3, device=device)
        x, *weights, index, routing = case.on_device()
        assert torch.equal(
            ops.moe_experts(x, *weights, torch.full_like(index, case.experts), routing, kernel_preference=kernel), torch.zeros(3, 33, device=device)
        )


def test_other_layouts_of_activation_and_routing(device: str) -> None:
    case = ExpertCase("w4a8", k=64, inner=64, tokens=6, slots=3, device=device)
    x, *weights, index, routing = case.on_device()
    want = ops.moe_experts(x, *weights, index, routing)
    strided = [t.t().contiguous().t() for t in (x, index, routing)]
    assert torch.equal(ops.moe_experts(strided[0], *weights, *strided[1:]), want)
    apart = [torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape) for t in (x, *weights, index, routing)]  # no multiple of 16 bytes
    for operands in (apart, (x, *weights, index, routing), apart):
        assert torch.equal(ops.moe_experts(*operands), want)


# Layouts --------------------------------------------------------------------------------------------------------------------------


def test_int4_is_packed_low_nibble_first_and_offset_by_8() -> None:
    values = torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)
    assert layouts.pack_int4(values).tolist() == [[0xF0, 0x78]]
    assert torch.equal(layouts.unpack_int4(layouts.pack_int4(values)), values)


@examples(20)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    group=st.sampled_from(layouts.GROUP_SIZES),
    seed=st.integers(0, 99),
    size=st.sampled_from([0, 1e-30, 1.0, 1e30]),
)
def test_quantized_weights_are_within_half_a_step(rows: int, groups: int, group: int, seed: int, size: float) -> None:
    weight = torch.randn(2, rows, groups * group, generator=torch.Generator().manual_seed(seed)) * size
    packed, scale = layouts.quantize_weight_int4(weight, group)
    assert packed.shape == (2, rows, groups * group // 2)
    assert scale.shape == (2, rows, groups)
    error = (layouts.dequantize_weight(packed, scale) - weight).abs().unflatten(-1, (groups, group))
    assert bool((error <= scale.unsqueeze(-1) * (0.5 + 1e-5)).all())
    q, scale = layouts.quantize_weight_int8(weight)
    error = (layouts.dequantize_weight(q, scale) - weight).abs()
    assert bool((error <= scale * (0.5 + 1e-4)).all())


def test_the_layer_is_close_to_the_same_weights_in_floats() -> None:
    """What int8 activations cost: the cosine to the same int4 weights is at least 0.9998."""
    case = ExpertCase("w4a8", experts=4, k=512, inner=256, n=256, tokens=32, slots=2, group=128)
    floats = dataclasses.replace(case, layout="w4a16")
    got, want = compute(case, "torch"), compute(floats, "torch")
    assert float(torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), 0)) > 0.9998


# Grouped product ------------------------------------------------------------------------------------------------------------------


def grouped_operands(rows: int, experts: int, n: int, k: int, ends: list[int], seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator) for shape in ((rows, k), (experts, n, k)))
    scales = [torch.rand(shape, generator=generator) * 0.01 for shape in ((rows, 1), (experts, n))]
    return a, b, *scales, torch.tensor(ends, dtype=torch.int32)


def grouped64(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, offs: Tensor) -> Bounded:
    value = torch.zeros(len(a), b.shape[1], dtype=torch.float64)
    start = 0
    for expert, end in enumerate(offs.tolist()):
        product = a[start:end].double() @ b[expert].double().t()
        value[start:end] = product * (a_scale.double().expand(len(a), 1)[start:end] * b_scale[expert].double())
        start = end
    return Bounded(value, 4 * U * value.abs())


@examples(20)
@given(
    rows=st.sampled_from([1, 5, 40, 150]), experts=st.sampled_from([1, 3, 16]), n=st.sampled_from([1, 33, 130]), k=st.sampled_from([1, 7, 128, 300]),
    seed=st.integers(0, 99), per_row=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), kernel=st.sampled_from(KERNELS),
)  # fmt: skip
@example(rows=9, experts=4, n=8, k=8, seed=3, per_row=True, dtype=torch.float32, kernel="triton")
def test_grouped_product(device: str, rows: int, experts: int, n: int, k: int, seed: int, per_row: bool, dtype: torch.dtype, kernel: str) -> None:
    """Ends anywhere, experts without rows, and rows past the last expert's, which are 0."""
    ends = sorted(torch.randint(0, rows + 1, (experts,), generator=torch.Generator().manual_seed(seed)).tolist())
    operands = list(grouped_operands(rows, experts, n, k, ends, seed))
    if not per_row:
        operands[2] = operands[2][:1]
    got = ops.scaled_grouped_mm(*(t.to(device) for t in operands), out_dtype=dtype, kernel_preference=kernel)
    check_float(got.cpu(), grouped64(*operands))


# int8 of activations --------------------------------------------------------------------------------------------------------------


@examples(20)
@given(
    k=st.sampled_from([1, 7, 128, 256, 300]),
    size=st.sampled_from([0.0, 1e-40, 1e-30, 1.0, 1e30]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
@example(k=256, size=1.0, dtype=torch.bfloat16, seed=0)
@example(k=300, size=1.0, dtype=torch.float32, seed=0)
def test_activations_become_the_int8_of_the_definition(device: str, k: int, size: float, dtype: torch.dtype, seed: int) -> None:
    """Bit for bit, at ties too: the first values are half of the largest, which is 63.5 steps. One row is 127 and ties alone; one is not finite."""
    x = torch.randn(40, k, generator=torch.Generator().manual_seed(seed)) * size
    x[:, : k // 128 + 1] = x[:, :128].abs().amax(1, keepdim=True) / 2
    x[0] = torch.arange(k) % 127 + 0.5
    x[0, ::128] = 127
    x[1, -1] = float("nan")
    x = x.to(dtype)
    q, scale = torch.empty(40, k, dtype=torch.int8, device=device), torch.empty(40, 1, device=device)
    index, counts = torch.zeros(40, 1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    half = triton.next_power_of_2(triton.cdiv(k, 2))
    kernels.prepare[(40,)](
        x.to(device), q, scale, index, counts, torch.empty_like(index, dtype=torch.int32), K=k, E=1, TOP_K=1, SLOTS=1, HALF=half, SPLIT=False,
        INT8_X=True, PTX=device == "cuda",
    )  # fmt: skip
    wanted = reference.quantize_activation(x, None)
    assert torch.equal(q.cpu(), wanted[0])
    torch.testing.assert_close(scale.cpu(), wanted[1], rtol=0, atol=0, equal_nan=True)


# Sorting --------------------------------------------------------------------------------------------------------------------------


@examples(15)
@given(
    tokens=st.sampled_from([1, 3, 40, 300]),
    slots=st.integers(1, 8),
    experts=st.sampled_from([1, 2, 7, 40]),
    block_m=st.sampled_from([16, 32]),
    seed=st.integers(0, 9),
)
def test_tiles_hold_every_pair_once(device: str, tokens: int, slots: int, experts: int, block_m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, experts + 1, (tokens, slots), generator=generator).to(device)
    x = torch.zeros(tokens, 4, device=device)
    counts, rank = torch.zeros(experts, dtype=torch.int32, device=device), torch.empty(tokens * slots, dtype=torch.int32, device=device)
    kernels.prepare[(tokens,)](
        x, torch.empty_like(x), x, index, counts, rank, K=4, E=experts, TOP_K=slots, SLOTS=triton.next_power_of_2(slots), HALF=2, SPLIT=False,
        INT8_X=False, PTX=False,
    )  # fmt: skip
    order, ends, tile_expert, tile_first = (t.tolist() for t in launch._sort(counts, rank, index, block_m))
    chosen = index.flatten().tolist()
    starts = [0, *ends]
    seen = []
    for expert, first in zip(tile_expert, tile_first, strict=True):
        if expert >= 0:
            assert (first - starts[expert]) % block_m == 0
            seen += [(expert, pair) for pair in order[first : min(first + block_m, ends[expert])]]
    assert sorted(seen) == sorted((expert, pair) for pair, expert in enumerate(chosen) if 0 <= expert < experts)


# Choice of config -----------------------------------------------------------------------------------------------------------------


def test_configs_go_by_pairs_an_expert_and_fit_the_device() -> None:
    for weight, activation in ((torch.int8, torch.int8), (torch.uint8, torch.int8), (torch.uint8, torch.bfloat16)):
        for tight in (False, True):
            chosen = [configs.choose(weight, activation, pairs, 8, tight=tight) for pairs in (1, 8, 64, 500, 5000, 10**6)]
            heights = [config.block_m for config in chosen]
            assert heights == sorted(heights)
            assert heights[0] == 16
            assert any(config.tight for config in chosen) == (tight and activation == torch.int8)
    assert configs.choose_grouped(1, 8)[0] == 16
    config = configs.GroupedConfig(128, 8, 4)
    assert configs.fitted(config, 32 * 1024, 227 * 1024) == config
    assert configs.fitted(config, 32 * 1024, 99 * 1024).num_stages == 3
    assert configs.fitted(config, 200 * 1024, 99 * 1024).num_stages == 1


def test_gate_up_quantizes_whole_blocks() -> None:
    """A tile of int8 hidden values is one block of scales."""
    assert {config.gate_up.block_n for table in (configs.W8A8, configs.W4A8) for config in table} == {reference.ACT_BLOCK}


# What it refuses ------------------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[int, Any], dict[str, Any], type[Exception], str]] = {
    "x of integers": ({0: lambda x: x.to(torch.int32)}, {}, TypeError, "x must be one of .*, got torch.int32"),
    "x of 3 dimensions": ({0: lambda x: x[None]}, {}, ValueError, "must have 2, 3 and 3 dimensions"),
    "another K": ({0: lambda x: x[:, :-1]}, {}, ValueError, r"gate_up must have shape \[3, 128, 63\], got \[3, 128, 64\]"),
    "odd gate_up": ({1: lambda w: w[:, :-1]}, {}, ValueError, r"gate_up must be \[E, 2 I, K\]"),
    "int16 weights": ({1: lambda w: w.short(), 3: lambda w: w.short()}, {}, TypeError, "gate_up must be one of torch.int8, torch.uint8, got"),
    "two layouts": ({3: lambda w: w.to(torch.uint8)}, {}, TypeError, "must have the same dtype, got torch.int8 and torch.uint8"),
    "strided weights": ({1: lambda w: w.transpose(1, 2).contiguous().transpose(1, 2)}, {}, ValueError, "gate_up and .* must be contiguous"),
    "a double scale": ({2: lambda s: s.double()}, {}, TypeError, "gate_up_scale must be one of torch.float32, got torch.float64"),
    "scales of groups": ({2: lambda s: s.expand(3, 128, 2).contiguous()}, {}, ValueError, r"gate_up_scale must have shape \[3, 128, 1\]"),
    "another inner size": ({3: lambda w: w[:, :, :-1].contiguous()}, {}, ValueError, r"down must have shape \[3, 33, 64\], got \[3, 33, 63\]"),
    "a flat index": ({5: lambda i: i.flatten()}, {}, ValueError, r"top_k_index must have shape \[7, k\]"),
    "an index of bytes": ({5: lambda i: i.to(torch.uint8)}, {}, TypeError, "top_k_index must be one of torch.int32, torch.int64, got torch.uint8"),
    "routing of another shape": ({6: lambda w: w[:, :1]}, {}, ValueError, r"top_k_weights must have shape \[7, 2\], got \[7, 1\]"),
    "weight-only int8": ({}, {"weight_only": True}, ValueError, "weight_only must be False for int8 weights"),
    "an unknown activation": ({}, {"activation": "swish"}, ValueError, "activation must be one of none, gelu, gelu_tanh, relu, silu, got 'swish'"),
    "an unknown preference": ({}, {"kernel_preference": "cuda"}, ValueError, "kernel_preference must be one of auto, triton, torch, got 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name: str) -> None:
    changes, options, error, message = WRONG[name]
    tensors = list(ExpertCase().operands())
    for position, change in changes.items():
        tensors[position] = change(tensors[position])
    with pytest.raises(error, match=f"moe_experts: .*{message}"):
        ops.moe_experts(*tensors, **options)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(error, match=message):
        ops.moe_experts(*map(mode.from_tensor, tensors), **options)


def test_errors_of_int4() -> None:
    tensors = list(ExpertCase("w4a8").operands())
    with pytest.raises(ValueError, match=r"gate_up_scale must have shape \[3, 128, 64/32, 64/64, 64/128\], a group each, got \[3, 128, 4\]"):
        ops.moe_experts(tensors[0], tensors[1], tensors[2].repeat(1, 1, 2), *tensors[3:])
    with pytest.raises(ValueError, match="gate_up is packed int4, whose K must be even, got 63"):
        ops.moe_experts(tensors[0][:, :-1], *tensors[1:])


GROUPED_WRONG: dict[str, tuple[dict[int, Any], type[Exception], str]] = {
    "another K": ({0: lambda a: a[:, :-1]}, ValueError, r"b must have shape \[2, 5, 7\], got \[2, 5, 8\]"),
    "a float a": ({0: lambda a: a.float()}, TypeError, "a must be one of torch.int8, got torch.float32"),
    "b of 2 dimensions": ({1: lambda b: b[0]}, ValueError, r"a must be \[S, K\] and b \[E, N, K\]"),
    "b transposed": ({1: lambda b: b.transpose(1, 2).contiguous().transpose(1, 2)}, ValueError, "b must be contiguous"),
    "a scale a column": ({2: lambda s: s.t()}, ValueError, r"a_scale must have shape \[6, 1\], got \[1, 6\]"),
    "one scale an expert": ({3: lambda s: s[:, :1]}, ValueError, r"b_scale must have shape \[2, 5\], got \[2, 1\]"),
    "long offsets": ({4: lambda o: o.long()}, TypeError, "offs must be one of torch.int32, got torch.int64"),
    "offsets of fewer experts": ({4: lambda o: o[:1]}, ValueError, r"offs must have shape \[2\], got \[1\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPED_WRONG)
def test_errors_of_the_grouped_product(name: str) -> None:
    changes, error, message = GROUPED_WRONG[name]
    operands = list(grouped_operands(6, 2, 5, 8, [2, 6]))
    for position, change in changes.items():
        operands[position] = change(operands[position])
    with pytest.raises(error, match=f"scaled_grouped_mm: {message}"):
        ops.scaled_grouped_mm(*operands)


# As operators ---------------------------------------------------------------------------------------------------------------------


def test_operators_keep_the_rules_of_custom_operators() -> None:
    case = ExpertCase("w4a8", tokens=3)
    for kernel in KERNELS:
        torch.library.opcheck(ops.moe_experts, case.operands(), {"kernel_preference": kernel})
        torch.library.opcheck(ops.scaled_grouped_mm, grouped_operands(6, 2, 5, 8, [2, 6]), {"kernel_preference": kernel})
    assert {ops.moe_experts, ops.scaled_grouped_mm} <= products.OPERATORS


@pytest.mark.parametrize("kernel", KERNELS)
def test_there_is_no_gradient_and_that_is_said(kernel: str) -> None:
    """Not a gradient that leaves the layer out: a model with frozen experts must not be trained wrongly."""
    x, *rest = ExpertCase(tokens=3).operands()
    y = ops.moe_experts(x.requires_grad_(), *rest, kernel_preference=kernel)
    with pytest.raises(RuntimeError, match=r"have no gradient: .* call them under torch.no_grad\(\)"):
        y.sum().backward()
