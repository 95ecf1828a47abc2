"""How weight-only and int4 products lower: main loops that convert the weight on its way to the tensor cores, or a product with it expanded.

Expanded (KernelPreference.TORCH, and where `_expands` or a rival's time says so) the weight is in memory for as long as its product runs: N x K
elements of the activation's dtype. On a GPU it is then rounded to that dtype where it has scales in groups; with scales per row bfloat16 holds the
integers alone, exactly, and the product is rounded to bfloat16 once before its scale. On a CPU, and for float32 activations, all of it is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..int4 import dequantize_groups, unpack_int4
from ..products.int8_int4 import INT8_INT4_GROUP_MM, INT8_INT4_MM
from ..products.weight_only import WEIGHT_INT4_MM, WEIGHT_INT8_GROUP_MM, WEIGHT_INT8_MM
from . import hopper_int4, hopper_weights
from .hopper_blocks import INT8_INT4_MM as HOPPER_INT8_INT4
from .problem import Device, Problem
from .rivals import EXPANDED_ROWS, expanded_mm
from .types import Lowering
from .weight_formats import INT4, INT8, INT8_GROUPS, INT8_INT4, INT8_INT4_GROUPS, Weight
from .weight_split import SplitConfig, WeightSplit
from .weight_stream import WeightStream
from .weight_tiled import WeightConfig, WeightTiled
from .weight_vector import WeightVector

__all__ = ["LOWERINGS"]

# Measured on an H200 on Llama's shapes (N x K: 6144 x 4096, 4096 x 4096, 28672 x 4096, 4096 x 14336), against cuBLAS in bfloat16, geometric means
# over the best of each shape: int8 1.71, 1.65 and 1.48 at M = 1, 4 and 16 (split), 0.67 at 64 with one config for all; int4 2.22, 2.08 (stream) and
# 1.51 (both). Beyond, what is converted for each tile of rows anew costs more than the tensor cores have to spare: int8 0.56 at 256, 0.59 at 1024.
# 256 x 128 tiles with 8 warps came out wrong (Triton 3.6).
INT8_CONFIGS = (
    WeightConfig(128, 128, 64, 4, 4),
    WeightConfig(64, 64, 128, 4, 4),
    WeightConfig(64, 32, 128, 4, 4),
    WeightConfig(16, 32, 256, 5, 4),
    WeightConfig(16, 32, 256, 6, 2),
    WeightConfig(16, 64, 256, 4, 4),
    WeightConfig(8, 64, 256, 6, 4),
    WeightConfig(8, 32, 256, 6, 2),
    WeightConfig(8, 128, 128, 4, 4),
    # For rows whose length is no multiple of 16 bytes: few copies a thread.
    WeightConfig(64, 64, 32, 3, 8),
    WeightConfig(16, 128, 32, 3, 8),
    WeightConfig(16, 32, 64, 3, 4),
)
GROUP_CONFIGS = (
    WeightConfig(128, 128, 128, 4, 8),
    WeightConfig(64, 64, 128, 4, 4),
    WeightConfig(64, 64, 128, 6, 4),
    WeightConfig(32, 64, 128, 4, 4),
    WeightConfig(16, 32, 256, 4, 2),
    WeightConfig(16, 64, 256, 4, 4),
    WeightConfig(16, 128, 128, 4, 4),
    WeightConfig(8, 64, 128, 6, 4),
    WeightConfig(8, 32, 256, 4, 2),
    WeightConfig(16, 128, 128, 3, 8),  # float32 activations and results in blocks of 128: what fits into the registers
)
# In int8, nibbles put side by side in registers and multiplied once a group: 0.80 at M = 1024, 0.78 at 4096; two products, of even and odd k, 0.64.
INT8_INT4_CONFIGS = (
    WeightConfig(128, 64, 128, 4, 4),
    WeightConfig(128, 128, 128, 4, 8),
    WeightConfig(64, 128, 128, 4, 4),
    WeightConfig(64, 64, 128, 4, 4),
    WeightConfig(32, 64, 128, 4, 4),
    WeightConfig(16, 64, 256, 4, 4),
    WeightConfig(16, 32, 256, 4, 2),
    WeightConfig(16, 128, 128, 4, 4),
)
LOW_REGISTERS = tuple(config for config in INT8_INT4_CONFIGS if config.num_warps <= 4)
"""For two scales a group: 128 x 128 tiles of 8 warps spill."""
SPLIT_CONFIGS = (
    SplitConfig(8, 16, 4, 4, 4),
    SplitConfig(8, 32, 4, 4, 4),
    SplitConfig(16, 16, 4, 4, 4),
    SplitConfig(16, 32, 4, 3, 4),
    SplitConfig(16, 64, 4, 3, 4),  # int4, 16 x 28672 x 4096: 28.2 us, 31.2 with 32 rows of the weight, bf16 56.5
)


def _expanded_dtype(a: Tensor) -> torch.dtype:
    """What a weight is expanded to beside `a`."""
    if a.device.type == "cpu":
        return torch.float32
    return a.dtype if a.is_floating_point() else torch.bfloat16


def _mm(a: Tensor, weight: Tensor) -> Tensor:
    """a [M, K] @ weight [N, K] transposed, in the weight's dtype, as float32."""
    return torch.mm(a.to(weight.dtype), weight.t()).float()


def _expand_int8(a: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    dtype = _expanded_dtype(a)
    if dtype == torch.float16:  # sums of products with whole numbers are beyond its range
        return _mm(a, (b.float() * b_scale.reshape(-1, 1)).to(dtype))
    return _mm(a, b.to(dtype)) * b_scale.reshape(-1)


def _expand_int8_groups(a: Tensor, b: Tensor, b_scale: Tensor, group_size: int) -> Tensor:
    return _mm(a, dequantize_groups(b, b_scale).to(_expanded_dtype(a)))


def _expand_int4(a: Tensor, b: Tensor, b_scale: Tensor, group_size: int) -> Tensor:
    return _mm(a, dequantize_groups(unpack_int4(b), b_scale).to(_expanded_dtype(a)))


def _expand_int8_int4(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, group_size: int) -> Tensor:
    return _expand_int4(a, b, b_scale, group_size) * a_scale.reshape(-1, 1)


def _expand_both(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, group_size: int) -> Tensor:
    dtype = _expanded_dtype(a)
    return _mm(dequantize_groups(a, a_scale).to(dtype), dequantize_groups(unpack_int4(b), b_scale).to(dtype))


def _expands(problem: Problem, device: Device) -> bool:
    """For many rows, and for float32 activations, which tensor cores do not multiply. On an H200, against a bfloat16 weight (int8 / int4, 4096 x
    4096): 0.60 / 0.62 at M = 256, 0.75 / 0.76 at 1024, 0.91 at 4096, 0.96 at 8192; the Triton templates stay at 0.4 to 0.6.
    """
    return problem.a_bytes == 4 or problem.m >= EXPANDED_ROWS


def _int8_expands(problem: Problem, device: Device) -> bool:
    """The same; but where hopper_weights.py has a template, its time decides (rivals.py)."""
    hopper = device.warpgroups and problem.a_bytes == 2 and problem.k % 16 == 0
    return _expands(problem, device) and not hopper


def _memory(problem: Problem, device: torch.device) -> str:
    """The kernel in words, with what the expanded weight takes while it runs."""
    return f"aten.mm, the weight expanded to {problem.n * problem.k * max(2, problem.a_bytes)} bytes"


def _group(operands: Mapping[str, Any]) -> tuple[int, ...]:
    return (operands["group_size"],)


def _templates(weight: Weight, tiles: tuple[WeightConfig, ...], *more: type) -> tuple[Any, ...]:
    """The main loops for one kind of weight, `more` besides those that all have."""
    return (WeightTiled(weight, tiles), WeightSplit(weight, SPLIT_CONFIGS), *(each(weight) for each in more))


_IN_GROUPS: dict[str, Any] = {"loop": ("b_scale",), "groups": _group}
LOWERINGS = (
    Lowering(
        WEIGHT_INT8_MM,
        (*_templates(INT8, INT8_CONFIGS, WeightVector), hopper_weights),
        _expand_int8,
        _memory,
        expands=_int8_expands,
        rival=expanded_mm,
    ),
    Lowering(
        WEIGHT_INT8_GROUP_MM, _templates(INT8_GROUPS, GROUP_CONFIGS, WeightVector), _expand_int8_groups, _memory, expands=_expands, **_IN_GROUPS
    ),
    Lowering(
        WEIGHT_INT4_MM,
        (*_templates(INT4, GROUP_CONFIGS, WeightStream, WeightVector), *hopper_int4.INT4_MM),
        _expand_int4,
        _memory,
        expands=_expands,
        **_IN_GROUPS,
    ),
    Lowering(INT8_INT4_MM, (*_templates(INT8_INT4, INT8_INT4_CONFIGS), HOPPER_INT8_INT4), _expand_int8_int4, _memory, **_IN_GROUPS),
    Lowering(INT8_INT4_GROUP_MM, _templates(INT8_INT4_GROUPS, LOW_REGISTERS), _expand_both, _memory, loop=("a_scale", "b_scale"), groups=_group),
)
