"""Linears of frozen graphs on a CPU: one call of oneDNN's kernel, what it computes, and where it must not be used.

Where this machine's kernel saturates sums of two products (no VNNI), weights are drawn so small that none does.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from support import Compiled, check_blocks, check_float, check_int8, examples, linear64, run, well_conditioned, with_layout
from torch import Tensor, nn
from torch._dynamo.utils import counters

from int8_inductor import (
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    MappingType,
    calibrate,
    onednn,
    ops,
    prepacked,
    quantize_,
    reference,
)
from int8_inductor.epilogues import EPILOGUES

EXACT: Any = onednn.is_exact_and_fast
KERNEL = "torch.ops.onednn.qlinear_pointwise"


def limit() -> int:
    """Weights up to which two products with an activation of 255 stay below 2^15, where that matters."""
    return 127 if EXACT() else 64


@pytest.fixture(autouse=True, scope="module")
def prepacks() -> Iterator[None]:
    """The kernel is used on this machine, and for small sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "is_exact_and_fast", lambda: True)
        patch.setattr(prepacked, "SMALL", 0)
        yield


def frozen(fn: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Compiled:
    with inductor_config.patch(freezing=True):
        return run(fn, *inputs, cpu_backend="cpp", **kwargs)


def calls(compiled: Compiled) -> list[str]:
    """The calls of oneDNN's kernel, and that there is no other product."""
    assert not any(compiled.has(text) for text in ("_int_mm(", "extern_kernels.mm(", "extern_kernels.addmm("))
    return [line for code in compiled.code for line in code.splitlines() if KERNEL in line and "=" in line]


class Product(nn.Module):
    """An operator of some operands as inputs, by name, and of others as buffers. numbers: its other arguments."""

    def __init__(self, inputs: tuple[str, ...], constants: dict[str, Tensor], numbers: dict[str, Any], operator: Any = ops.scaled_mm) -> None:
        super().__init__()
        self.operator = operator
        for name, value in constants.items():
            self.register_buffer(name, value)
        self.inputs, self.constants, self.numbers = inputs, tuple(constants), numbers

    def forward(self, *inputs: Tensor) -> Tensor:
        tensors = dict(zip(self.inputs, inputs, strict=True)) | {name: getattr(self, name) for name in self.constants}
        out: Tensor = self.operator(**tensors, **self.numbers)
        return out


@dataclass(frozen=True)
class Case:
    """A product and how its scales are known."""

    m: int
    n: int
    k: int
    static: bool = True
    zero_point: int | None = None
    bias: torch.dtype | None = None
    activation: str = "none"
    out_dtype: torch.dtype | None = None
    out_scale: float | None = None
    out_zero_point: int | None = None
    quant_min: int = reference.INT8_MIN
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    a_scale: float = 0.01
    b_scale: float = 0.01
    seed: int = 0

    def operands(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        a = torch.randint(-128, 128, (self.m, self.k), dtype=torch.int8, generator=generator)
        b = torch.randint(-limit(), limit() + 1, (self.n, self.k), dtype=torch.int8, generator=generator)
        rows = 1 if self.static else self.m
        found = {"a": with_layout(a, self.layout), "b": with_layout(b, self.weight_layout)}
        found["a_scale"] = (1 + torch.rand(rows, 1, generator=generator)) * self.a_scale
        found["b_scale"] = (1 + torch.rand(self.n, generator=generator)) * self.b_scale
        if self.zero_point is not None:
            found["a_zero_point"] = torch.full((rows, 1), self.zero_point, dtype=torch.int32)
        if self.bias is not None:
            found["bias"] = (torch.randn(self.n, generator=generator) * self.a_scale * self.b_scale * 1000).to(self.bias)
        return found

    def store(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.out_scale is None:
            return {}, {"out_dtype": self.out_dtype}
        constants = {"out_scale": torch.tensor([self.out_scale])}
        if self.out_zero_point is not None:
            constants["out_zero_point"] = torch.tensor([self.out_zero_point], dtype=torch.int32)
        return constants, {"out_quant_min": self.quant_min}

    def check(self, compile_and_run: Callable[..., Compiled] = frozen, **kwargs: Any) -> Compiled:
        """Compile and compare each value with float64."""
        operands, (stored, numbers) = self.operands(), self.store()
        want = linear64(**operands, activation=self.activation)
        if self.out_scale is not None:
            assume(well_conditioned(want, stored["out_scale"]))
        inputs = [name for name in operands if name == "a" or (name in ("a_scale", "a_zero_point") and not self.static)]
        constants = {name: value for name, value in {**operands, **stored}.items() if name not in inputs}
        module = Product(tuple(inputs), constants, {**numbers, "activation": self.activation})
        compiled = compile_and_run(module, *(operands[name] for name in inputs), **kwargs)
        if self.out_scale is None:
            assert compiled.output.dtype == (self.out_dtype or torch.float32)
            check_float(compiled.output, want)
        else:
            check_int8(compiled.output, want, stored["out_scale"], stored.get("out_zero_point"), self.quant_min)
        return compiled


# What is computed -----------------------------------------------------------------------------------------------------------------

SIZES = st.sampled_from([1, 2, 3, 7, 16, 31, 64, 97])
ACTIVATIONS = st.sampled_from(list(EPILOGUES))
LAYOUT = st.sampled_from(["contiguous", "transposed", "sliced", "offset", "expanded"])
BIAS = st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16])
SCALES = st.sampled_from([(0.01, 0.01), (1e-30, 1e25), (1e30, 1e-28), (1e-4, 3.0), (0.0, 0.01)])


@examples(6)
@given(
    m=SIZES, n=SIZES, k=SIZES, static=st.booleans(), zero_point=st.sampled_from([None, 0, -128, 5, 127]), bias=BIAS, activation=ACTIVATIONS,
    out_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]), layout=LAYOUT, weight_layout=LAYOUT, scales=SCALES,
    seed=st.integers(0, 9),
)  # fmt: skip
def test_floats(scales: tuple[float, float], **drawn: Any) -> None:
    case = Case(**drawn, a_scale=scales[0], b_scale=scales[1])
    assume(scales == (0.01, 0.01) or case.bias in (None, torch.float32))  # others overflow
    if case.zero_point is None or (case.static and scales != (0.0, 0.01)):
        assert len(calls(case.check())) == 1
    else:
        assert not case.check().has(KERNEL)


@examples(6)
@given(
    m=SIZES, n=SIZES, k=SIZES, static=st.booleans(), zero_point=st.sampled_from([None, -7]), bias=BIAS, activation=ACTIVATIONS,
    out_scale=st.sampled_from([1e-6, 1e-3, 0.002, 0.05, 1.0, 1e30]), out_zero_point=st.sampled_from([None, -128, 3, 127]),
    quant_min=st.sampled_from([-128, -127]), seed=st.integers(0, 9),
)  # fmt: skip
def test_int8(**drawn: Any) -> None:
    case = Case(**drawn)
    compiled = case.check()
    if case.static or case.zero_point is None:
        (call,) = calls(compiled)
        assert (", torch.uint8, " in call) is _is_stored(case)


def _is_stored(case: Case) -> bool:
    """Whether oneDNN's kernel may store int8 itself."""
    post_op = EPILOGUES[case.activation].onednn
    assert post_op is not None
    assert case.out_scale is not None
    coarse = case.out_scale >= 100 * post_op.error and case.out_scale < 2.0**96
    least = post_op.least / case.out_scale + (case.out_zero_point or 0)
    return case.static and coarse and (case.quant_min == -128 or least > -127)


@pytest.mark.parametrize("static", [True, False])
def test_blocks(static: bool) -> None:
    """int8 with scales per block of columns: up to the activation by oneDNN with a static scale, the sums with a dynamic one."""
    case = Case(9, 72, 48, static=static, bias=torch.float32, activation="gelu")
    operands = case.operands()
    inputs = ("a",) if static else ("a", "a_scale")
    constants = {name: value for name, value in operands.items() if name not in inputs}
    module = Product(inputs, constants, {"activation": "gelu", "block_size": 32}, ops.scaled_mm_block_quant)
    compiled = frozen(module, *(operands[name] for name in inputs))
    (call,) = calls(compiled)
    assert ("'gelu'" in call) is static
    check_blocks(*compiled.output, linear64(**operands, activation="gelu"), 32)


def test_any_number_of_rows() -> None:
    """Compiled for one, run with another, and with none."""
    case = Case(40, 24, 48, bias=torch.float32, activation="gelu", out_scale=0.02)
    operands, (stored, numbers) = case.operands(), case.store()
    a = operands.pop("a")
    torch._dynamo.mark_dynamic(a, 0)
    module = Product(("a",), {**operands, **stored}, {**numbers, "activation": "gelu"})
    with inductor_config.patch(freezing=True, cpu_backend="cpp", force_disable_caches=True), torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="int8_inductor")
        for given_rows in (a, a[:2].clone(), a.repeat(5, 1), a[:0].clone()):
            want = linear64(given_rows, **operands, activation="gelu")
            check_int8(compiled(given_rows), want, stored["out_scale"])


@pytest.mark.parametrize("case", [Case(33, 40, 72, activation="gelu"), Case(33, 40, 72, static=False, bias=torch.float32)], ids=str)
def test_with_every_config_timed(case: Case) -> None:
    """Inductor's own template is no candidate: it corrects zero points in float32."""
    assert len(calls(case.check(mode="max-autotune"))) == 1


# What of it is true of oneDNN -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", list(EPILOGUES))
def test_post_ops(activation: str) -> None:
    """Within their error, 2e-6 relatively, or 1e-35 of float64 over the whole range, and never below their least value."""
    post_op = EPILOGUES[activation].onednn
    assert post_op is not None
    large = torch.logspace(-30, 30, 3001)
    x = torch.cat([torch.linspace(-20, 20, 400001), large, -large, torch.tensor([0.0, -0.0])])
    a, b = torch.zeros(1, 4, dtype=torch.int8), torch.zeros(len(x), 4, dtype=torch.int8)
    packed, ones, zeros = torch.ops.onednn.qlinear_prepack(b, [1, 4]), torch.ones(len(x)), torch.zeros(len(x), dtype=torch.int32)
    stored = (1.0, 0, torch.float32, post_op.name, [], post_op.algorithm)
    got = torch.ops.onednn.qlinear_pointwise(a, 1.0, 0, packed, ones, zeros, x, *stored)[0]
    want = EPILOGUES[activation].eager(x.double()) if activation != "gelu" else 0.5 * x.double() * torch.erfc(-x.double() / math.sqrt(2))
    error = (got.double() - want).abs()
    assert bool((error <= (2e-6 * want.abs()).clamp(min=max(post_op.error, 1000 * torch.finfo(torch.float32).tiny))).all())
    assert got.min() >= post_op.least


@pytest.fixture
def asked_anew() -> Iterator[None]:
    EXACT.cache_clear()
    yield
    EXACT.cache_clear()


def test_an_inexact_kernel_is_found(asked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    product = onednn.product
    monkeypatch.setattr(onednn, "_is_fast", lambda: True)
    monkeypatch.setattr(onednn, "product", lambda a, packed, zero_point: product(a, packed, zero_point).clamp(-(2**20), 2**20))
    assert not EXACT()


def test_another_kind_of_cpu_is_not_asked(asked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(onednn, "_is_exact", lambda: pytest.fail("asked"))
    assert not EXACT()


@pytest.mark.parametrize(("milliseconds", "fast", "calls"), [(0, True, 7), (60, False, 7), (2000, False, 2)])
def test_a_slow_kernel_is_found(milliseconds: float, fast: bool, calls: int, asked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a float32 product of 20 ms; one of a hundred times as long is called twice."""
    counted: list[Any] = []
    seconds = {"mm": 0.02, "product": milliseconds / 1000}
    now = [0.0]

    def advance(name: str) -> Any:
        counted.append(name)
        now[0] += seconds[name]

    monkeypatch.setattr(onednn, "_is_exact", lambda: True)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "mm", lambda *given: advance("mm"))
    monkeypatch.setattr(onednn, "product", lambda *given: advance("product"))
    assert EXACT() is fast
    assert counted.count("product") == calls


# Where it is not used -------------------------------------------------------------------------------------------------------------

PLAIN = Case(8, 24, 48, bias=torch.float32)


def test_not_without_freezing() -> None:
    compiled = PLAIN.check(lambda *args: run(*args, cpu_backend="cpp"))
    assert not compiled.has(KERNEL)
    assert compiled.has("_int_mm(")


def test_not_where_the_kernel_is_inexact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_exact_and_fast", lambda: False)
    compiled = PLAIN.check()
    assert not compiled.has(KERNEL)
    assert compiled.has("_int_mm(")


def test_not_for_a_weight_that_is_an_input() -> None:
    operands = PLAIN.operands()
    module = Product(("a", "b"), {name: value for name, value in operands.items() if name not in ("a", "b")}, {})
    compiled = frozen(module, operands["a"], operands["b"])
    check_float(compiled.output, linear64(**operands))
    assert not compiled.has(KERNEL)


def test_not_for_a_weight_with_a_zero_point() -> None:
    operands = PLAIN.operands() | {"b_zero_point": torch.full((24,), 3, dtype=torch.int32)}
    compiled = frozen(Product(("a",), {name: value for name, value in operands.items() if name != "a"}, {}), operands["a"])
    check_float(compiled.output, linear64(**operands))
    assert not compiled.has(KERNEL)


def test_scales_that_float32_cannot_multiply_stay_apart() -> None:
    """1e-30 times 1e-25 is zero in float32, but not after 1e28 times that: the kernel gives sums alone."""
    compiled = Case(8, 24, 48, a_scale=1e-30, b_scale=1e-25).check()
    (call,) = calls(compiled)
    assert "_ones" in call or ", None, 1.0, 0, torch.float32, 'none'" in call


def test_a_bias_that_is_not_finite() -> None:
    operands = PLAIN.operands()
    operands["bias"][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    constants = {name: value for name, value in operands.items() if name != "a"} | {"out_scale": torch.tensor([0.02])}
    compiled = frozen(Product(("a",), constants, {}), operands["a"])
    assert compiled.output[:, :3].tolist() == [[0, 127, -128]] * 8
    assert len(calls(compiled)) == 1


def test_not_for_small_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "SMALL", PLAIN.m * PLAIN.n * PLAIN.k + 1)
    assert not PLAIN.check().has(KERNEL)
    assert PLAIN.check().has("_int_mm(")
    assert len(calls(dataclasses.replace(PLAIN, activation="relu").check())) == 1
    assert len(calls(dataclasses.replace(PLAIN, m=PLAIN.m + 1).check())) == 1


# Caches ---------------------------------------------------------------------------------------------------------------------------


def test_other_weights_are_no_hit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Inductor's cache knows frozen weights by shape and dtype alone: such a graph is not kept, and nothing complains that it could not be."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for seed in range(2):
        case = dataclasses.replace(PLAIN, seed=seed, activation="gelu")
        operands = case.operands()
        module = Product(("a",), {name: value for name, value in operands.items() if name != "a"}, {"activation": "gelu"})
        torch._dynamo.reset()
        counters.clear()
        with inductor_config.patch(freezing=True, cpu_backend="cpp", fx_graph_cache=True), torch.no_grad():
            got = torch.compile(module, backend="int8_inductor")(operands["a"])
        check_float(got, linear64(**operands, activation="gelu"))
        assert counters["inductor"]["fxgraph_cache_bypass"] == 1
        assert counters["inductor"]["fxgraph_cache_hit"] == 0
    assert "unable to serialize" not in caplog.text


# Whole models ---------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Q, K and V of one activation; V has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64, bias=i != 2) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (linear(h).unflatten(-1, (4, 16)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


CONFIGS = (
    Int8StaticActivationInt8WeightConfig(),
    Int8StaticActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC),
    Int8DynamicActivationInt8WeightConfig(),
)


def quantized(model: nn.Module, config: Any, x: Tensor) -> nn.Module:
    quantize_(model.eval(), config)
    if isinstance(config, Int8StaticActivationInt8WeightConfig):
        calibrate(model, [(x,)], progress=False)
    for buffer in model.buffers():
        if buffer.dtype == torch.int8 and buffer.ndim == 2:
            buffer.clamp_(-limit(), limit())
    return model


def check_model(model: nn.Module, x: Tensor) -> Compiled:
    compiled = frozen(model, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled.output, model(x), rtol=1e-4, atol=1e-4)
    return compiled


@pytest.mark.parametrize("config", CONFIGS, ids=["static", "asymmetric", "dynamic"])
@pytest.mark.parametrize(("batch", "joined"), [(2, True), (40, False)])
def test_linears_of_one_activation_are_one_call_where_rows_are_few(config: Any, batch: int, joined: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, 16, 64)
    compiled = check_model(quantized(Attention(), config, x), x)
    assert len(calls(compiled)) == (2 if joined else 4)
    assert len({re.search(r"tensor\((\w+)", call).group(1) for call in calls(compiled)[:3]}) == (2 if joined else 1)  # type: ignore[union-attr]
    assert str(compiled.report).count(", 3 side by side") == (3 if joined else 0)
    assert str(compiled.report).count("onednn.qlinear_pointwise on a prepacked weight") == 4
    compiled.check_report(linear={"rewritten": 4}, quant=compiled.report.counts()["quant"], dequant={"rewritten": 8})


def test_linears_of_other_scales_are_not_joined() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 64)
    model: Any = quantized(Attention(), CONFIGS[0], x)
    model.k.input_scale.mul_(1.5)
    compiled = check_model(model, x)
    assert len(calls(compiled)) == 4


@pytest.mark.parametrize("config", CONFIGS[:2], ids=["static", "asymmetric"])
def test_a_chain_stays_int8(config: Any) -> None:
    """linear -> gelu -> quant -> linear: two calls, the first of which stores int8, and nothing between them."""
    torch.manual_seed(0)
    x = torch.randn(32, 48)
    model = quantized(nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 40)), config, x)
    compiled = check_model(model, x)
    first, second = calls(compiled)
    assert ", torch.uint8, 'gelu'," in first
    assert ", torch.float32, 'none'," in second
    assert len({name for code in compiled.code for name in re.findall(r"cpp_fused_\w+", code)}) == 1  # x alone is quantized by a kernel
