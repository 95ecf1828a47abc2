"""The rows of the table: one encoder each, float or int8, and how it is compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from int8_inductor import (
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    MappingType,
    calibrate,
    explain,
    quantize_,
    smooth_quant,
)

from .encoder import Batch, SentenceEncoder

__all__ = ["Variant", "cpu_variants", "gpu_variants", "quantized"]

GPU_MODES = ("default", "reduce-overhead")
"""Not max-autotune: stock Inductor times its own kernels for minutes there, for what is reduce-overhead's time in the end."""
ALPHA = 0.7
"""SmoothQuant's alpha: how much of the unevenness of the channels goes to the weight, whose scales are per row. Up to 0.85 the mean cosine grows
(0.9983), but what becomes of the worst paragraph, a table drawn in dashes, is chance there: 0.986 to 0.994 with the last bit of the factors."""
STOCK, DYNAMIC, STATIC = "torch.compile", "int8 dynamic", "int8 static"


@dataclass
class Variant:
    """One way to run the encoder, and what was measured of it."""

    name: str
    module: nn.Module
    device: str = "cpu"
    backend: str | None = None
    mode: str = "default"
    is_stock: bool = False
    run: Callable[..., Tensor] = field(init=False, repr=False)
    milliseconds: list[float] = field(default_factory=list, repr=False)
    embeddings: list[Tensor] = field(default_factory=list, repr=False)
    linears: int = 0
    rewritten: int | None = None
    kernels: int = 0
    compile_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.backend is None:
            self.run = self.module
        else:
            self.run = torch.compile(self.module, backend=self.backend, mode=None if self.mode == "default" else self.mode)

    @property
    def is_int8(self) -> bool:
        return self.backend == "int8_inductor"

    @property
    def megabytes(self) -> float:
        """Of parameters and buffers, in 10^6 bytes; what is shared counts once."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(sizes.values()) / 1e6

    def count_rewritten(self, batch: Batch) -> None:
        """Ask `explain` how many linears became scaled_mm kernels."""
        report = explain(self.module, *(t.to(self.device) for t in batch))
        self.rewritten = report.counts()["linear"]["rewritten"]


def _count_linears(module: nn.Module) -> int:
    return sum(isinstance(each, nn.Linear) for each in module.modules())


def quantized(encoder: SentenceEncoder, calibration: list[Batch]) -> dict[str, SentenceEncoder]:
    """The int8 encoders by name; `encoder` stays as it is.

    One static scale for all tokens needs more care than a scale for each: inputs without outliers, hence `smooth_quant` (a few channels of
    MiniLM's activations are ten times larger than the rest), and all 256 steps spent on values that occur, hence ASYMMETRIC, as GELU gives
    next to nothing below zero. MiniLM's layer norms also feed the residual, so they cannot take the factors: each linear multiplies by its
    act_pre_scale, in the kernel that quantizes.
    """
    dynamic = copy.deepcopy(encoder)
    quantize_(dynamic, Int8DynamicActivationInt8WeightConfig())
    static = copy.deepcopy(encoder)
    smooth_quant(static, calibration, ALPHA, progress=False)
    quantize_(static, Int8StaticActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC))
    calibrate(static, calibration)
    return {DYNAMIC: dynamic, STATIC: static}


def cpu_variants(encoder: SentenceEncoder, int8: dict[str, SentenceEncoder]) -> list[Variant]:
    """Eager and stock torch.compile in float32, and the int8 encoders."""
    rows = [Variant("eager float32", encoder), Variant(f"{STOCK} float32", encoder, backend="inductor", is_stock=True)]
    rows += [Variant(name, module, backend="int8_inductor") for name, module in int8.items()]
    for row in rows:
        row.linears = _count_linears(encoder)
    return rows


def gpu_variants(encoder: SentenceEncoder, int8: dict[str, SentenceEncoder]) -> list[Variant]:
    """The same in bfloat16 on the GPU, compiled in each of GPU_MODES. Scales stay float32."""

    def on_gpu(module: SentenceEncoder) -> SentenceEncoder:
        return copy.deepcopy(module).to("cuda", torch.bfloat16)

    float_module = on_gpu(encoder)
    rows = [Variant("eager bf16", float_module, "cuda")]
    rows += [Variant(f"{STOCK} bf16, {mode}", float_module, "cuda", "inductor", mode, is_stock=True) for mode in GPU_MODES]
    for name, module in int8.items():
        moved = on_gpu(module)
        rows += [Variant(f"{name}, {mode}", moved, "cuda", "int8_inductor", mode) for mode in GPU_MODES]
    for row in rows:
        row.linears = _count_linears(encoder)
    return rows
