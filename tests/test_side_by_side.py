"""Linears that read one activation, as one product: the operator, every template that runs it, and which linears a pass joins."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import Case
from support import FLOATS, Bounded, Compiled, check_float, examples, fresh_compile, linear64, run
from test_templates import FLAT, SMALL, only
from torch import Tensor, nn
from torch.nn import functional as F

from int8_inductor import Int8DynamicActivationInt8WeightConfig, Int8StaticActivationInt8WeightConfig, calibrate, ops, quantize_
from int8_inductor.epilogues import EPILOGUES
from int8_inductor.side_by_side import scaled_mm_side_by_side
from int8_inductor.templates import persistent, tiled, vector
from int8_inductor.templates.tiled import TiledConfig
from int8_inductor.templates.vector import VectorConfig

SIDE_BY_SIDE = "int8_inductor.scaled_mm_side_by_side"

# The operator ---------------------------------------------------------------------------------------------------------------------


class Several:
    """Weights of some sizes beside each other, and one activation."""

    def __init__(
        self, m: int, k: int, rows: list[int], activations: list[str], *, bias: torch.dtype | None = None, a_rows: bool = True, seed: int = 0
    ) -> None:
        self.each = [
            Case(m, n, k, seed + i, bias=bias, activation=name, a_rows=a_rows) for i, (n, name) in enumerate(zip(rows, activations, strict=True))
        ]
        self.operands = [case.operands() for case in self.each]
        for operands in self.operands:
            operands |= {name: self.operands[0][name] for name in ("a", "a_scale")}
        self.activations = activations

    def want(self, narrow: bool) -> Bounded:
        parts = [linear64(**operands, activation=name, narrow=narrow) for operands, name in zip(self.operands, self.activations, strict=True)]
        return Bounded(torch.cat([part.value for part in parts], 1), torch.cat([part.error for part in parts], 1))

    def arguments(self, device: str = "cpu") -> tuple[Any, ...]:
        lists = [[operands[name].to(device) for operands in self.operands if name in operands] for name in ("b", "b_scale", "bias")]
        return self.operands[0]["a"].to(device), lists[0], self.operands[0]["a_scale"].to(device), *lists[1:]

    def compiled(self, device: str, dtype: torch.dtype, **kwargs: Any) -> Compiled:
        def fn(*args: Any) -> Tensor:
            result: Tensor = scaled_mm_side_by_side(*args, activations=self.activations, out_dtype=dtype)
            return result

        return run(fn, *self.arguments(device), **kwargs)


TEMPLATES = {
    "tiled": (tiled, TiledConfig(16, 32, 32, 2, 4)),
    "persistent": (persistent, SMALL),
    "flattened": (persistent, FLAT),
    "vector": (vector, VectorConfig(4, 32, 2, 1)),
}


@examples(12)
@given(
    sizes=st.tuples(st.sampled_from([2, 5, 31, 67, 130]), st.sampled_from([16, 48, 144])),
    template=st.sampled_from(sorted(TEMPLATES)),
    tiles=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    activations=st.lists(st.sampled_from(sorted(EPILOGUES)), min_size=4, max_size=4),
    bias=st.sampled_from([None, *FLOATS]),
    a_rows=st.booleans(),
    dtype=st.sampled_from(FLOATS),
)
def test_results(
    device: str,
    sizes: tuple[int, int],
    template: str,
    tiles: list[int],
    activations: list[str],
    bias: torch.dtype | None,
    a_rows: bool,
    dtype: torch.dtype,
) -> None:
    """Any M, K in multiples of 16, and two to four weights of one to three tiles each."""
    module, config = TEMPLATES[template]
    (m, k), rows = sizes, [config.block_n * each for each in tiles]
    several = Several(1 if module is vector else m, k, rows, activations[: len(rows)], bias=bias, a_rows=a_rows)
    with only(module, config):
        compiled = several.compiled(device, dtype)
    assert len(compiled.kernels) == 1
    check_float(compiled.output.cpu(), several.want(dtype != torch.float32))


def test_eager_is_scaled_mm_beside_scaled_mm() -> None:
    several = Several(5, 31, [33, 7], ["gelu", "none"], bias=torch.bfloat16)
    got = scaled_mm_side_by_side(*several.arguments(), activations=several.activations, out_dtype=torch.float16)
    check_float(got, several.want(True))


def test_schema_fake_and_eager_agree() -> None:
    several = Several(5, 16, [16, 8], ["relu", "none"])
    options = {"activations": several.activations, "out_dtype": torch.float32}
    torch.library.opcheck(scaled_mm_side_by_side, several.arguments(), options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": 1}, "b must hold two weights or more, got 1"),
        ({"b_scale": 1}, "b_scale must hold 2 for 2 weights, got 1"),
        ({"bias": 1}, "bias must hold 0 or 2 for 2 weights, got 1"),
        ({"activations": 1}, "activations must hold 2 for 2 weights, got 1"),
    ],
)
def test_lists_of_other_lengths_are_refused(change: dict[str, int], message: str) -> None:
    several = Several(5, 16, [16, 8], ["relu", "none"], bias=torch.float32)
    a, b, a_scale, b_scale, bias = several.arguments()
    given: dict[str, Any] = {"b": b, "b_scale": b_scale, "bias": bias, "activations": several.activations}
    given |= {name: given[name][:count] for name, count in change.items()}
    with pytest.raises(ValueError, match=message):
        scaled_mm_side_by_side(a, given["b"], a_scale, given["b_scale"], given["bias"], activations=given["activations"], out_dtype=torch.float32)


# Which linears are joined ---------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Q, K and V of other sizes, and what makes one of them."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(48, n, bias=bias) for n in (256, 128, 128))
        self.out = nn.Linear(128, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        heads = [part.reshape(*x.shape[:-1], 2, 64).transpose(-2, -3) for part in (q[..., :128] + q[..., 128:], k, v)]
        return self.out(F.scaled_dot_product_attention(*heads).transpose(-2, -3).reshape(*x.shape[:-1], 128))


class FeedForward(nn.Module):
    """Gate, whose SiLU is folded into its product, and up."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(48, 128, bias=False), nn.Linear(48, 128, bias=False), nn.Linear(128, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def quantized(model: nn.Module) -> nn.Module:
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def templates(compiled: Compiled) -> list[int]:
    """How many linears each template kernel computes."""
    return [3 if "BIAS_2" in text or "B_SCALE_2" in text else 2 if "B_SCALE_1" in text else 1 for text in _kernels(compiled)]


def _kernels(compiled: Compiled) -> list[str]:
    code = "\n".join(compiled.code)
    return [part.split("''', device_str")[0] for part in code.split("async_compile.triton('triton_tem_")[1:]]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "joined"), [(Attention, [3, 1]), (FeedForward, [2, 1])])
def test_linears_of_one_activation_are_one_kernel(
    device: str, make: Callable[[], nn.Module], joined: list[int], dtype: torch.dtype, dynamic: bool
) -> None:
    torch.manual_seed(0)
    model, x = quantized(make().to(dtype).to(device)), torch.randn(2, 9, 48, dtype=dtype, device=device)
    with torch.no_grad():
        compiled, want = run(model, x, dynamic=dynamic), model(x)
    # With a symbolic M each has a kernel for each range of it.
    assert [count for count, _ in itertools.groupby(templates(compiled))] == joined
    assert dynamic or len(templates(compiled)) == len(joined)
    linears = compiled.report.linears
    assert [entry.status for entry in linears] == ["rewritten"] * sum(joined)
    kernels = "triton for M <= 16, M <= 64, above" if dynamic else "triton"
    assert device == "cuda" or all(entry.kernel == kernels for entry in linears)
    # The model's own rounding, and a step of int8 where that moves a value over a tie.
    tolerance = 0.02 * float(want.float().abs().max()) if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(compiled.output.float(), want.float(), rtol=0, atol=tolerance)


def test_each_linear_is_reported_with_its_own_epilogue() -> None:
    with torch.no_grad():
        report = run(quantized(FeedForward()), torch.randn(4, 48)).report
    assert [(entry.source, entry.epilogue) for entry in report.linears] == [("gate", "scales + silu"), ("up", "scales"), ("down", "scales")]


def test_symbolic_rows_need_no_compilation_of_their_own() -> None:
    torch.manual_seed(0)
    model = quantized(Attention())
    with torch.no_grad(), fresh_compile(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, backend="int8_inductor", dynamic=True)
        for rows in (7, 2, 33):
            x = torch.randn(3, rows, 48)
            got, want = compiled(x), model(x)
            # A value that the next linear quantizes may go to the other side of a tie: a step of int8 in one of its terms.
            torch.testing.assert_close(got, want, rtol=0, atol=0.02 * float(want.abs().max()))


class Two(nn.Module):
    """Two linears that could be joined, but for one thing."""

    def __init__(self, columns: int = 128, biases: tuple[bool, bool] = (True, True)) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, columns, bias=biases[0]), nn.Linear(48, columns, bias=biases[1])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.first(x), self.second(x)


class OtherActivation(Two):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.first(x), self.second(x + 1)


class NotNeighbours(Two):
    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Linear(128, 128)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.between(self.first(x))
        return y, self.second(x)


class ComputedWeight(Two):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q = torch.clamp(torch.round(x / 0.02), -127, 127).to(torch.int8).float() * 0.02
        weights = (self.first.weight, self.second.weight)
        return tuple(F.linear(q, (weight.flip(0).float() * 0.01)) for weight in weights)


def _plain(model: nn.Module) -> nn.Module:
    return quantized(model)


def _static(model: nn.Module) -> nn.Module:
    """Both scales are known, and one of the results is stored as int8."""
    quantize_(model, Int8StaticActivationInt8WeightConfig())
    calibrate(model, [(torch.randn(5, 48),)], progress=False)
    return model


class Requantized(Two):
    """Each is quantized for a linear of its own: stored as int8, which wins over a common launch."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = nn.ModuleList(nn.Linear(128, 16) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(end(F.relu(each(x))) for end, each in zip(self.ends, (self.first, self.second), strict=True))


def _per_tensor(model: nn.Module) -> nn.Module:
    from int8_inductor import PerRow, PerTensor

    quantize_(model, Int8DynamicActivationInt8WeightConfig(granularity=(PerRow(), PerTensor())))
    return model


def _asymmetric(model: nn.Module) -> nn.Module:
    from int8_inductor import MappingType

    quantize_(model, Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC))
    return model


@pytest.mark.parametrize(
    ("make", "prepare"),
    [
        (lambda: Two(96), _plain),
        (lambda: Two(biases=(True, False)), _plain),
        (OtherActivation, _plain),
        (NotNeighbours, _plain),
        (ComputedWeight, _plain),
        (Requantized, _static),
        (Two, _per_tensor),
        (Two, _asymmetric),
    ],
    ids=["columns", "one bias", "activation", "not neighbours", "computed weight", "requantized", "per tensor", "zero point"],
)
def test_near_misses_are_kernels_of_their_own(make: Callable[[], nn.Module], prepare: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = prepare(make()), torch.randn(5, 48)
    with torch.no_grad():
        compiled, want = run(model, x), model(x)
    assert set(templates(compiled)) == {1}
    for got, each in zip(compiled.output, want, strict=True):
        torch.testing.assert_close(got, each, rtol=1e-3, atol=1e-3)


def test_two_that_could_be_joined_are() -> None:
    """What the near-misses are near to."""
    with torch.no_grad():
        assert templates(run(quantized(Two()), torch.randn(5, 48))) == [2]


def test_torch_kernels_are_not_joined() -> None:
    with torch.no_grad():
        compiled = run(quantized(Two()), torch.randn(5, 48), options={"kernel_preference": "torch"})
    assert not templates(compiled)
    assert [entry.kernel for entry in compiled.report.linears] == ["aten._int_mm"] * 2


def test_five_linears_are_four_and_one() -> None:
    class Five(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each = nn.ModuleList(nn.Linear(48, 128) for _ in range(5))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [linear(x) for linear in self.each]

    model, x = quantized(Five()), torch.randn(5, 48)
    with torch.no_grad():
        compiled, want = run(model, x), model(x)
    assert len(compiled.kernels) == 3
    torch.testing.assert_close(compiled.output, want, rtol=1e-4, atol=1e-4)


def test_operators_that_the_model_calls_are_joined_and_take_up_what_follows(device: str) -> None:
    several = Several(5, 48, [128, 256], ["none", "none"])
    a, (one, other), a_scale, (one_scale, other_scale), _ = several.arguments(device)

    def fn(a: Tensor, one: Tensor, other: Tensor, a_scale: Tensor, one_scale: Tensor, other_scale: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(ops.scaled_mm(a, one, a_scale, one_scale)), ops.scaled_mm(a, other, a_scale, other_scale)

    compiled = run(fn, a, one, other, a_scale, one_scale, other_scale)
    assert len(compiled.kernels) == 1
    several.activations = ["relu", "none"]
    check_float(torch.cat(compiled.output, 1).cpu(), several.want(False))
