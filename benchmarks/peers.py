"""The GEMM benchmark's peers: one object each. To add one, write what builds its callable and list it in PEERS; everything else loops over them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import int8_inductor  # noqa: F401  registers the operator and its lowering
from int8_inductor.epilogues import EPILOGUES
from int8_inductor.launching import can_launch_dependents

from .cases import Case
from .common import float_dtype
from .operands import FLOAT, FP8, INT8, INT8_BF16_SCALES, Operands

GemmCall = Callable[..., Tensor]


def _always(device: torch.device) -> str | None:
    return None


def _static_only(case: Case, device: torch.device) -> str | None:
    return None if case.tail.block_size is None else f"stores int8 with a given scale, not {case.tail.name}"


def _everything(case: Case, device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Peer:
    """One way to compute a case.

    name: its name in options and results. group: its column in tables; the fastest of a group stands there.
    form: the operands it takes. build: (case, device) -> callable over those operands.
    lacks: device -> why it cannot run there at all, or None. refuses: (case, device) -> why it does not take this case, or None.
    """

    name: str
    group: str
    form: Operands
    build: Callable[[Case, torch.device], GemmCall]
    lacks: Callable[[torch.device], str | None] = _always
    refuses: Callable[[Case, torch.device], str | None] = _everything


DEPENDENT = {"triton.enable_pdl": True}
"""So compiled, our kernels are launched as in the CUDA graphs that torch.compile records (launching.py), also in one that is recorded by hand."""


def needs_dependents(device: torch.device) -> str | None:
    """Why kernels cannot be launched so, or None."""
    return None if can_launch_dependents(device) else "needs Hopper or newer, and a driver for CUDA 12.3 or newer"


def _ours(preference: str, **options: bool) -> Callable[[Case, torch.device], GemmCall]:
    def build(case: Case, device: torch.device) -> GemmCall:
        activation, dtype = case.tail.activation, float_dtype(device)

        def scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None = None, out_scale: Tensor | None = None) -> Tensor:
            return torch.ops.int8_inductor.scaled_mm(
                a, b, a_scale, b_scale, None, None, bias, activation=activation, kernel_preference=preference,
                out_scale=out_scale, out_dtype=None if out_scale is not None else dtype,
            )  # fmt: skip

        return torch.compile(scaled_mm, backend="int8_inductor", fullgraph=True, dynamic=False, options=options)

    return build


def _stock_int_mm(case: Case, device: torch.device) -> GemmCall:
    eager, dtype = EPILOGUES[case.tail.activation].eager, float_dtype(device)

    def scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None = None, out_scale: Tensor | None = None) -> Tensor:
        y = torch._int_mm(a, b.t()).float() * a_scale * b_scale
        y = eager(y if bias is None else y + bias)
        return y.to(dtype) if out_scale is None else torch.clamp(torch.round(y / out_scale), -128, 127).to(torch.int8)

    return torch.compile(scaled_mm, fullgraph=True, dynamic=False)


def _float(mode: str | None) -> Callable[[Case, torch.device], GemmCall]:
    """F.linear and the activation, eager for None, else compiled in that mode."""

    def build(case: Case, device: torch.device) -> GemmCall:
        eager = EPILOGUES[case.tail.activation].eager

        def linear(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
            return eager(F.linear(a, b, bias))

        return linear if mode is None else torch.compile(linear, fullgraph=True, dynamic=False, mode=mode)

    return build


def _fp8_rowwise(fast: bool) -> Callable[[Case, torch.device], GemmCall]:
    def build(case: Case, device: torch.device) -> GemmCall:
        def scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
            return torch._scaled_mm(a, b.t(), a_scale, b_scale.reshape(1, -1), out_dtype=torch.bfloat16, use_fast_accum=fast)

        return scaled_mm

    return build


def _torchao_int8(case: Case, device: torch.device) -> GemmCall:
    from torchao.prototype.quantized_training.int8_mm import scaled_int8_mm

    def scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
        return scaled_int8_mm(a, b.t(), a_scale, b_scale.reshape(1, -1))

    return scaled_mm


def _needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA GPU"


def _needs_triton_templates(device: torch.device) -> str | None:
    from int8_inductor.kernels import KernelPreference, KernelPreferenceError, resolve

    try:
        resolve(KernelPreference.TRITON, device)
    except KernelPreferenceError as error:
        return str(error)
    return None


def _needs_fp8(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    return None if torch.cuda.get_device_capability(device) >= (8, 9) else "needs compute capability 8.9"


def _needs_torchao(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    return None if importlib.util.find_spec("torchao") is not None else "torchao is not installed"


def _int_mm_refuses(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda" or case.tail.block_size is not None:
        return _static_only(case, device)
    if case.m <= 16:
        return f"torch._int_mm needs M > 16, got {case.m}"
    return f"torch._int_mm needs N and K in multiples of 8, got {case.n} and {case.k}" if case.n % 8 or case.k % 8 else None


def _plain_only(case: Case, device: torch.device) -> str | None:
    return None if case.tail.name == "plain" else f"computes the plain product only, not {case.tail.name}"


def _fp8_refuses(case: Case, device: torch.device) -> str | None:
    odd = case.n % 16 or case.k % 16
    return _plain_only(case, device) or (f"torch._scaled_mm needs N and K in multiples of 16, got {case.n} and {case.k}" if odd else None)


def _torchao_refuses(case: Case, device: torch.device) -> str | None:
    return _plain_only(case, device) or ("its check of row_scale's shape refuses M = 1" if case.m == 1 else None)


PEERS: tuple[Peer, ...] = (
    Peer("ours", "ours", INT8, _ours("auto"), refuses=_static_only),
    Peer("ours-dependent", "ours", INT8, _ours("auto", **DEPENDENT), lacks=needs_dependents, refuses=_static_only),
    Peer("stock-eager", "stock", FLOAT, _float(None)),
    Peer("stock-default", "stock", FLOAT, _float("default")),
    Peer("stock-max-autotune", "stock", FLOAT, _float("max-autotune-no-cudagraphs"), lacks=_needs_cuda),
    Peer("fp8-rowwise", "fp8", FP8, _fp8_rowwise(fast=False), lacks=_needs_fp8, refuses=_fp8_refuses),
    Peer("fp8-rowwise-fast", "fp8", FP8, _fp8_rowwise(fast=True), lacks=_needs_fp8, refuses=_fp8_refuses),
    Peer("stock-int-mm", "int_mm", INT8, _stock_int_mm, refuses=_int_mm_refuses),
    Peer("torchao-triton", "torchao", INT8_BF16_SCALES, _torchao_int8, lacks=_needs_torchao, refuses=_torchao_refuses),
    Peer("ours-triton", "ours triton", INT8, _ours("triton"), lacks=_needs_triton_templates, refuses=_static_only),
    Peer("ours-torch", "ours torch", INT8, _ours("torch"), refuses=_static_only),
)
