"""The model benchmark's variants: one object each, a way to prepare a model and a mode to compile it in. To add one, list it in VARIANTS."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import int8_inductor
from int8_inductor.calibrate import calibrate

CALIBRATION_BATCHES = 2

Batches = list[tuple[Tensor, ...]]
Prepare = Callable[[nn.Module, Callable[[], Batches]], nn.Module]


def _as_it_is(model: nn.Module, batches: Callable[[], Batches]) -> nn.Module:
    return model


def _ours_dynamic(model: nn.Module, batches: Callable[[], Batches]) -> nn.Module:
    int8_inductor.quantize_(model, int8_inductor.Int8DynamicActivationInt8WeightConfig())
    return model


def _ours_static(model: nn.Module, batches: Callable[[], Batches]) -> nn.Module:
    int8_inductor.quantize_(model, int8_inductor.Int8StaticActivationInt8WeightConfig())
    calibrate(model, batches(), progress=False)
    return model


def _ours_smooth(model: nn.Module, batches: Callable[[], Batches]) -> nn.Module:
    calibration = batches()
    int8_inductor.smooth_quant(model, calibration, 0.85, progress=False)
    int8_inductor.quantize_(model, int8_inductor.Int8StaticActivationInt8WeightConfig(act_mapping_type=int8_inductor.MappingType.ASYMMETRIC))
    calibrate(model, calibration, progress=False)
    return model


def _pt2e_static(model: nn.Module, batches: Callable[[], Batches]) -> nn.Module:
    """Stock Inductor's INT8 path for x86, as torchao documents it: u8 activations with one static scale, s8 weights with one a channel.

    Not its dynamic one: with that Inductor calls a reference kernel, a second for MiniLM with batch 1.
    """
    from torchao.quantization import pt2e
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    calibration = batches()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    # Strict: the quantizer finds linears by the source that Dynamo notes, which torch 2.11 exports in no other way.
    prepared = prepare_pt2e(torch.export.export(model, calibration[0], strict=True).module(), quantizer)
    for batch in calibration:
        prepared(*batch)
    converted: torch.fx.GraphModule = convert_pt2e(prepared)
    if not any("dequantize" in str(node.target) for node in converted.graph.nodes):
        raise RuntimeError("the quantizer has quantized nothing")
    pt2e.move_exported_model_to_eval(converted)
    return converted


def _torchao_dynamic(model: nn.Module, batches: Callable[[], Batches]) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def _nothing_lacks() -> str | None:
    return None


def _torchao_lacks() -> str | None:
    return None if importlib.util.find_spec("torchao") is not None else "torchao is not installed"


def _pt2e_lacks() -> str | None:
    return "the quantizer is for x86 CPUs" if torch.cuda.is_available() else _torchao_lacks()


@dataclass(frozen=True)
class Variant:
    """A way to run a model.

    name: as it stands in options and tables. group: stock (whose fastest is the bar), ours, pt2e or torchao.
    rank: lower ranks run first, on every workload.
    prepare: changes a copy of the float model; it may draw calibration batches. mode: of torch.compile; None runs eager. backend: of torch.compile.
    lacks: why it cannot run here, or None. freezing: of Inductor, which folds weights into constants of the compiled code.
    """

    name: str
    group: str
    rank: int
    prepare: Prepare
    mode: str | None
    backend: str = "inductor"
    lacks: Callable[[], str | None] = _nothing_lacks
    freezing: bool = False

    @property
    def family(self) -> str:
        """Variants of one family prepare the model in the same way; only the mode differs."""
        return f"{self.group} {self.prepare.__name__}"

    def compiled(self, model: nn.Module) -> nn.Module:
        if self.mode is None:
            return model
        return torch.compile(model, backend=self.backend, mode=self.mode, dynamic=False)


DEFAULT, TUNED, GRAPHS = "default", "max-autotune", "reduce-overhead"


def _ours(kind: str, rank: int, prepare: Prepare, mode: str) -> Variant:
    return Variant(f"ours-{kind}-{mode}", "ours", rank, prepare, mode, backend="int8_inductor")


def _ours_frozen(kind: str, prepare: Prepare) -> Variant:
    return Variant(f"ours-{kind}-frozen", "ours", 1, prepare, DEFAULT, backend="int8_inductor", freezing=True)


VARIANTS: tuple[Variant, ...] = (
    Variant("stock-eager", "stock", 0, _as_it_is, None),
    Variant("stock-default", "stock", 0, _as_it_is, DEFAULT),
    Variant("stock-max-autotune", "stock", 0, _as_it_is, TUNED),
    Variant("stock-frozen", "stock", 0, _as_it_is, DEFAULT, freezing=True),
    Variant("stock-reduce-overhead", "stock", 0, _as_it_is, GRAPHS),
    _ours("dynamic", 0, _ours_dynamic, DEFAULT),
    _ours("dynamic", 0, _ours_dynamic, TUNED),
    _ours("dynamic", 1, _ours_dynamic, GRAPHS),
    _ours("static", 2, _ours_static, DEFAULT),
    _ours("static", 1, _ours_static, TUNED),
    _ours("static", 2, _ours_static, GRAPHS),
    _ours("smooth-static", 3, _ours_smooth, DEFAULT),
    _ours_frozen("dynamic", _ours_dynamic),
    _ours_frozen("static", _ours_static),
    Variant("pt2e-static", "pt2e", 1, _pt2e_static, DEFAULT, lacks=_pt2e_lacks, freezing=True),
    Variant("torchao-dynamic-default", "torchao", 3, _torchao_dynamic, DEFAULT, lacks=_torchao_lacks),
    Variant("torchao-dynamic-reduce-overhead", "torchao", 3, _torchao_dynamic, GRAPHS, lacks=_torchao_lacks),
    Variant("torchao-dynamic-max-autotune", "torchao", 4, _torchao_dynamic, TUNED, lacks=_torchao_lacks),
)
