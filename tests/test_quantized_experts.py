"""QuantizedExperts and the configs that make them: which modules are converted and which are not, their buffers, and how they compile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from expert_cases import ExpertCase
from support import check_float, run
from torch import Tensor, nn

from int8_inductor import (
    Int4WeightOnlyExpertsConfig,
    Int8DynamicActivationInt4ExpertsConfig,
    Int8DynamicActivationInt8ExpertsConfig,
    Int8DynamicActivationInt8WeightConfig,
    QuantizedExperts,
    explain,
    quantize_,
)
from int8_inductor.experts import layouts, ops
from int8_inductor.experts.module import is_experts
from int8_inductor.quantize import Int8Config

transformers = pytest.importorskip("transformers")

CONFIGS: dict[str, tuple[Int8Config, dict[str, Any]]] = {
    "w8a8": (Int8DynamicActivationInt8ExpertsConfig(), {}),
    "w4a8": (Int8DynamicActivationInt4ExpertsConfig(32), {"group_size": 32}),
    "w4a16": (Int4WeightOnlyExpertsConfig(64), {"group_size": 64, "weight_only": True}),
}
configs = pytest.mark.parametrize(("config", "arguments"), CONFIGS.values(), ids=CONFIGS)
SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, intermediate_size=128, num_local_experts=4)),
    "Qwen2-MoE": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(**SIZES, intermediate_size=64, num_experts=6, moe_intermediate_size=64, shared_expert_intermediate_size=32)
    ),
    "Qwen3-MoE": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SIZES, intermediate_size=64, num_experts=6, moe_intermediate_size=64, num_experts_per_tok=3, head_dim=16)
    ),
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def tokens() -> Tensor:
    return torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(0))


def routed(count: int, slots: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x [5, 64], chosen experts, and their weights."""
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(count, generator=generator)[:slots] for _ in range(5)])
    return torch.randn(5, 64, generator=generator).to(dtype), index, torch.rand(5, slots, generator=generator).to(dtype)


# Conversion -----------------------------------------------------------------------------------------------------------------------


@models
@configs
def test_experts_and_nothing_else_are_converted(make: Callable[[], nn.Module], config: Int8Config, arguments: dict[str, Any]) -> None:
    """Routers, shared experts, attention and the rest stay, to the bit; experts hold their weights quantized."""
    model = build(make)
    before, untouched = experts_of(model), copy.deepcopy(model.state_dict())
    quantize_(model, config)
    assert {name for name, module in model.named_modules() if isinstance(module, QuantizedExperts)} == set(before) != set()
    state = model.state_dict()
    for name, t in untouched.items():
        if not any(name.startswith(f"{each}.") for each in before):
            assert torch.equal(state[name], t), name
    for name, original in before.items():
        converted = model.get_submodule(name)
        assert isinstance(converted, QuantizedExperts)
        assert not list(converted.parameters())
        quantize = layouts.quantize_weight_int8 if not arguments else lambda w: layouts.quantize_weight_int4(w, arguments["group_size"])
        for weight in ("gate_up_proj", "down_proj"):
            values, scale = quantize(getattr(original, weight).detach())
            assert torch.equal(getattr(converted, weight), values)
            assert torch.equal(getattr(converted, f"{weight}_scale"), scale)


@models
@configs
def test_converted_experts_compute_what_the_original_does_with_their_weights(
    make: Callable[[], nn.Module], config: Int8Config, arguments: dict[str, Any]
) -> None:
    """transformers' own module, given the dequantized weights, is the reference; only quantized activations differ from it."""
    original = next(iter(experts_of(build(make)).values()))
    converted = config.replace("experts", original, None)
    assert isinstance(converted, QuantizedExperts)
    for weight, value in zip(("gate_up_proj", "down_proj"), converted.dequantized_weights(), strict=True):
        getattr(original, weight).data = value
    inputs = routed(original.num_experts, 2)
    with torch.no_grad():
        want, got = original(*inputs), converted(*inputs)
    tolerance = 1e-5 if arguments.get("weight_only") else 0.03
    assert float((got - want).norm() / want.norm()) < tolerance


def test_filter_fn_chooses_and_two_configs_go_together() -> None:
    model = build(MODELS["Qwen2-MoE"])
    first, second = experts_of(model)
    quantize_(model, Int8DynamicActivationInt4ExpertsConfig(64), lambda module, name: name == first)
    quantize_(model, Int8DynamicActivationInt8ExpertsConfig())
    assert [model.get_submodule(name).group_size for name in (first, second)] == [64, None]
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), lambda module, name: "shared_expert." in name and isinstance(module, nn.Linear))
    assert type(model.get_submodule("model.layers.0.mlp.shared_expert.up_proj")).__name__ == "Int8Linear"
    assert isinstance(model.get_submodule(first), QuantizedExperts)


def test_hooks_and_training_mode_stay() -> None:
    model = build(MODELS["Mixtral"]).train()
    name, experts = next(iter(experts_of(model).items()))
    calls: list[nn.Module] = []
    handle = experts.register_forward_hook(lambda module, args, output: calls.append(module))
    quantize_(model, Int8DynamicActivationInt8ExpertsConfig())
    converted = model.get_submodule(name)
    assert converted.training
    converted(*routed(4, 2))
    assert calls == [converted]
    handle.remove()
    converted(*routed(4, 2))
    assert len(calls) == 1


def test_device_moves_the_model() -> None:
    model = build(MODELS["Mixtral"])
    quantize_(model, Int8DynamicActivationInt4ExpertsConfig(32), device="meta")
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}


# What is not converted --------------------------------------------------------------------------------------------------------------


def changed(**attributes: Any) -> nn.Module:
    experts = next(iter(experts_of(build(MODELS["Mixtral"])).values()))
    for name, value in attributes.items():
        setattr(experts, name, value)
    return experts


class OwnGate(nn.Module):
    """Experts that look alike, and combine gate and up in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(2, 64, 32)), nn.Parameter(torch.ones(2, 32, 32))
        self.has_gate, self.has_bias, self.is_transposed, self.act_fn = True, False, False, nn.SiLU()

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * (up + 1)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(**SIZES, intermediate_size=64, num_local_experts=4, head_dim=16)
    return next(iter(experts_of(transformers.GptOssForCausalLM(config)).values()))


WRONG: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "biases": (gpt_oss, TypeError, "GptOssExperts says has_bias=True, and has_bias=False alone can be quantized"),
    "no gate": (lambda: changed(has_gate=False), TypeError, "MixtralExperts says has_gate=False"),
    "transposed": (lambda: changed(is_transposed=True), TypeError, "MixtralExperts says is_transposed=True"),
    "interleaved": (lambda: changed(is_concatenated=False), TypeError, "MixtralExperts says is_concatenated=False"),
    "a norm after": (lambda: changed(has_post_expert_norm=True), TypeError, "MixtralExperts says has_post_expert_norm=True"),
    "a gate of its own": (OwnGate, TypeError, "OwnGate combines gate and up in a way of its own"),
    "another activation": (lambda: changed(act_fn=nn.Softplus()), TypeError, r"act_fn must be one of .*, got Softplus"),
    "an activation with parameters": (lambda: changed(act_fn=nn.PReLU()), TypeError, r"act_fn must be one of .*, got PReLU"),
    "doubles": (lambda: changed().double(), TypeError, "experts.gate_up_proj must be one of .*, got torch.float64"),
    "sizes that do not fit": (
        lambda: changed(down_proj=nn.Parameter(torch.ones(4, 64, 127))), TypeError, r"do not go together, got \[4, 256, 64\] and \[4, 64, 127\]",
    ),
    "NaN": (lambda: changed(down_proj=nn.Parameter(torch.full((4, 64, 128), float("nan")))), ValueError, "experts.down_proj must be finite"),
    "a linear": (lambda: nn.Linear(4, 4), TypeError, "experts must be stacked experts as transformers has them .*, got Linear"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_experts_that_compute_something_else_are_refused(name: str) -> None:
    make, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        QuantizedExperts.from_experts(make())


def test_activations_are_told_apart_by_their_values() -> None:
    for act_fn, name in ((nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.ReLU(), "relu"), (nn.Identity(), "none")):
        assert QuantizedExperts.from_experts(changed(act_fn=act_fn)).activation == name


def test_on_an_error_nothing_changes() -> None:
    model = build(MODELS["Qwen3-MoE"])
    *_, last = experts_of(model).values()
    last.down_proj.data[3, 2, 1] = float("inf")
    with pytest.raises(ValueError, match=r"cannot quantize 'model.layers.1.mlp.experts': experts.down_proj must be finite, got .* in expert 3"):
        quantize_(model, Int8DynamicActivationInt8ExpertsConfig())
    assert len(experts_of(model)) == 2
    with pytest.raises(ValueError, match=r"cannot quantize 'model.layers.0.mlp.experts': hidden_dim must be a multiple of group_size 128, got 64"):
        quantize_(model, Int8DynamicActivationInt4ExpertsConfig())


def test_errors_of_quantize_() -> None:
    model = build(MODELS["Mixtral"])
    name, experts = next(iter(experts_of(model).items()))
    config = Int8DynamicActivationInt8ExpertsConfig()
    with pytest.raises(ValueError, match="model is itself a module of experts, which has no parent"):
        quantize_(experts, config)
    with pytest.raises(TypeError, match="filter_fn must choose stacked experts, got Linear for 'lm_head'"):
        quantize_(model, config, lambda module, name: name == "lm_head")
    quantize_(model, config)
    with pytest.raises(ValueError, match="model has no stacked experts that filter_fn chooses, got MixtralForCausalLM; 2 are quantized already"):
        quantize_(model, config)
    with pytest.raises(ValueError, match=f"{name} is a QuantizedExperts already"):
        quantize_(model, config, lambda module, each: each == name)
    for bad in (16, 256, None):
        with pytest.raises(ValueError, match="group_size must be one of 32, 64, 128, got"):
            Int8DynamicActivationInt4ExpertsConfig(bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="group_size must be one of 32, 64, 128, got"):
            Int4WeightOnlyExpertsConfig(bad)  # type: ignore[arg-type]


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no experts": ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
    "a K beyond int32": ({"hidden_dim": 131072}, "hidden_dim must be at most 131071, or int32 could overflow; got 131072"),
    "another group": ({"group_size": 48}, "group_size must be None or one of 32, 64, 128, got 48"),
    "a group that does not divide": ({"group_size": 64, "intermediate_dim": 96}, "intermediate_dim must be a multiple of group_size 64, got 96"),
    "weight-only int8": ({"weight_only": True}, "weight_only must be False for int8 experts"),
    "another activation": ({"activation": "swish"}, "activation must be one of none, gelu, gelu_tanh, relu, silu, got 'swish'"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_errors_of_the_module(name: str) -> None:
    arguments, message = ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        QuantizedExperts(**{"num_experts": 2, "hidden_dim": 64, "intermediate_dim": 64, "device": "meta", **arguments})


# Buffers --------------------------------------------------------------------------------------------------------------------------


def filled(**arguments: Any) -> QuantizedExperts:
    return QuantizedExperts.from_experts(changed(), **arguments)


@configs
def test_state_dict_round_trip(config: Int8Config, arguments: dict[str, Any], tmp_path: Path) -> None:
    experts, inputs = filled(**arguments), routed(4, 2)
    safetensors.torch.save_file(experts.state_dict(), tmp_path / "experts.safetensors")
    state = safetensors.torch.load_file(tmp_path / "experts.safetensors")
    assert set(state) == {"gate_up_proj", "gate_up_proj_scale", "down_proj", "down_proj_scale"}
    blank = QuantizedExperts(4, 64, 128, device="meta", **arguments)
    assert blank.load_state_dict(state, assign=True) == ([], [])
    assert torch.equal(blank(*inputs), experts(*inputs))
    with pytest.raises(TypeError, match=r"gate_up_proj must be torch\.u?int8, got torch.float32"):
        blank.load_state_dict(state | {"gate_up_proj": state["gate_up_proj"].float()})
    with pytest.raises(ValueError, match="down_proj_scale must be finite and positive"):
        blank.load_state_dict(state | {"down_proj_scale": -state["down_proj_scale"]})
    if arguments:
        with pytest.raises(TypeError, match=r"gate_up_proj must be torch\.uint8, got torch.int8"):
            blank.load_state_dict(filled().state_dict())


@configs
def test_casts_keep_weights_and_scales(config: Int8Config, arguments: dict[str, Any]) -> None:
    experts = filled(**arguments)
    before = {name: t.clone() for name, t in experts.state_dict().items()}
    experts.to(torch.bfloat16).half()
    assert all(torch.equal(t, before[name]) and t.dtype == before[name].dtype for name, t in experts.state_dict().items())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert experts(*routed(4, 2, dtype)).dtype == dtype
    with pytest.raises(TypeError, match=r"QuantizedExperts keeps its weight u?int8 and its scales float32"):
        experts.type(torch.float16)


def test_autocast_says_the_dtype() -> None:
    x, index, weights = routed(4, 2)
    experts = filled()
    with torch.autocast("cpu", torch.bfloat16):
        got = experts(x, index, weights)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, experts(x.bfloat16(), index, weights))


def test_repr_says_the_layout() -> None:
    assert "activation=silu, weight=int4 in groups of 32, input=int8" in repr(filled(group_size=32))
    assert "weight=int4 in groups of 64, input=as it is" in repr(filled(group_size=64, weight_only=True))


# Compiled -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "make"), list(zip(CONFIGS, MODELS.values(), strict=True)), ids=list(CONFIGS))
def test_compiled_block_is_one_graph_and_reported(layout: str, make: Callable[[], nn.Module]) -> None:
    """Router, experts and shared experts of one layer."""
    config, arguments = CONFIGS[layout]
    model = build(make)
    quantize_(model, config)
    block, x = model.get_submodule("model.layers.0.mlp"), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = block(x)
    compiled = run(block, x, fullgraph=True, cpu_backend="cpp", options={"kernel_preference": "torch"})
    assert float((compiled.output - want).norm() / want.norm()) < 1e-3
    layers = [entry for entry in compiled.report.linears if entry.status == "rewritten"]
    epilogue = f"scales + silu * up{'' if arguments.get('weight_only') else ' + int8'} + weighted sum"
    assert [(entry.kernel, entry.epilogue) for entry in layers] == [("torch", epilogue)]
    assert compiled.report.left() == []


@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_compiled_layer_against_float64(device: str, kernel: str) -> None:
    """Dynamic in the number of tokens: one compilation for several."""
    case = ExpertCase("w4a8", experts=4, k=64, inner=64, n=64, tokens=5, dtype=torch.bfloat16, device=device)
    x, *weights, index, routing = case.on_device()

    def layer(x: Tensor, index: Tensor, routing: Tensor) -> Tensor:
        return ops.moe_experts(x, *weights, index, routing)

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("int8_inductor")
    compiled = torch.compile(layer, backend=frames, fullgraph=True)
    with torch.no_grad():
        for count in (5, 4, 3):
            inputs = [t[:count].clone() for t in (x, index, routing)]
            for each in inputs:
                torch._dynamo.mark_dynamic(each, 0)
            got, want = compiled(*inputs), case.want()
            check_float(got.cpu(), type(want)(want.value[:count], want.error[:count]))
    assert frames.frame_count == 1
    static = run(layer, x, index, routing, options={"kernel_preference": kernel})
    check_float(static.output.cpu(), case.want(kernel))
    assert [entry.kernel for entry in static.report.linears] == [kernel]


def test_explain_names_the_module() -> None:
    block = build(MODELS["Mixtral"]).get_submodule("model.layers.0.mlp")
    quantize_(block, Int8DynamicActivationInt8ExpertsConfig())
    report = explain(block, torch.ones(1, 5, 64))
    assert [entry.source for entry in report.linears if entry.status == "rewritten"] == ["experts"]


def test_export_keeps_the_operator() -> None:
    experts, inputs = filled(group_size=32), routed(4, 2)
    program = torch.export.export(experts, inputs)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [ops.moe_experts]
    assert torch.equal(program.module()(*inputs), experts(*inputs))


@pytest.mark.gpu
def test_cuda_graphs_record_it() -> None:
    """Routed anew at every replay, with nothing on the host that depends on it."""
    case = ExpertCase("w4a8", experts=16, k=128, inner=128, n=128, tokens=40, slots=4, group=64, device="cuda")
    x, *weights, index, routing = case.on_device()
    index = index.clamp(0, 15)
    ops.moe_experts(x, *weights, index, routing)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.moe_experts(x, *weights, index, routing)
    for shift in range(3):
        index.add_(shift).remainder_(16)
        x.mul_(-1.5)
        graph.replay()
        assert torch.equal(got, ops.moe_experts(x, *weights, index, routing))
