"""`python -m benchmarks.blocks`: the block-scaled INT8 product against its peers, checked and timed as benchmarks.gemm does it."""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor

import int8_inductor  # noqa: F401  registers the operator and its lowering

from . import gemm
from .cases import Case
from .common import float_dtype, program
from .operands import BLOCK, FLOAT, FP8_BLOCKS, INT8_BLOCKS
from .peers import DEPENDENT, GemmCall, Peer, _float, _needs_cuda, _plain_only, needs_dependents

HOPPER = (9, 0)
"""The one compute capability for which cuBLAS has 1 x 128 by 128 x 128 scales, as of CUDA 13."""


def _ours(case: Case, device: torch.device, **options: bool) -> GemmCall:
    activation, dtype, operators = case.tail.activation, float_dtype(device), torch.ops.int8_inductor

    def block_scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if case.tail.block_size is not None:
            q, scale = operators.block_scaled_mm_block_quant(a, b, a_scale, b_scale, BLOCK, bias, activation=activation)
            return q, scale  # type: ignore[return-value]
        dtypes = {} if out is not None else {"out_dtype": dtype}
        return operators.block_scaled_mm(a, b, a_scale, b_scale, BLOCK, bias, activation=activation, out_scale=out, **dtypes)

    compiled = torch.compile(block_scaled_mm, backend="int8_inductor", fullgraph=True, dynamic=False, options=options)
    return compiled if case.tail.block_size is None else lambda *operands: compiled(*operands)[0]


def _fp8(case: Case, device: torch.device) -> GemmCall:
    def scaled_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
        return torch._scaled_mm(a, b.t(), a_scale, b_scale.t(), out_dtype=torch.bfloat16)

    return scaled_mm


def _plain_kernel(case: Case, device: torch.device) -> GemmCall:
    from .plain_block_kernel import block_scaled_mm

    return block_scaled_mm


def _needs_hopper(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    return None if torch.cuda.get_device_capability(device) == HOPPER else "cuBLAS has blockwise FP8 scales for compute capability 9.0"


def _fp8_refuses(case: Case, device: torch.device) -> str | None:
    whole = case.m % 4 == 0 and case.n % BLOCK == 0 and case.k % BLOCK == 0
    return _plain_only(case, device) or (None if whole else f"needs M in multiples of 4, N and K in multiples of {BLOCK}")


PEERS: tuple[Peer, ...] = (
    Peer("ours", "ours", INT8_BLOCKS, _ours),
    Peer("ours-dependent", "ours", INT8_BLOCKS, functools.partial(_ours, **DEPENDENT), lacks=needs_dependents),
    Peer("stock-default", "stock", FLOAT, _float("default")),
    Peer("stock-max-autotune", "stock", FLOAT, _float("max-autotune-no-cudagraphs"), lacks=_needs_cuda),
    Peer("fp8-blockwise", "fp8", FP8_BLOCKS, _fp8, lacks=_needs_hopper, refuses=_fp8_refuses),
    Peer("plain-triton", "plain triton", INT8_BLOCKS, _plain_kernel, lacks=_needs_cuda, refuses=_plain_only),
)


def main(argv: list[str] | None = None) -> int:
    """benchmarks.gemm with these peers, on the shapes "blocks" unless others are asked for."""
    argv = program(argv)
    if not any(each.startswith("--shape") for each in argv):
        argv = [*argv, "--shapes", "blocks" if torch.cuda.is_available() else "small-blocks"]
    return gemm.main(argv, PEERS, "blocks")


if __name__ == "__main__":
    sys.exit(main())
