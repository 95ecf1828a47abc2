"""`python -m benchmarks.weights --scheme w8a16`: weight-only INT8, and INT4 weights beside bfloat16 and int8, against their peers, shape by shape.

The program, its options and its results are those of benchmarks.gemm; the operands and peers are these.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import int8_inductor  # noqa: F401  registers the operators and their lowerings
from int8_inductor.int4 import dequantize_groups, unpack_int4

from . import common, gemm
from .cases import Case
from .common import float_dtype
from .operands import FLOAT, INT8_STD, Operands
from .peers import DEPENDENT, PEERS, GemmCall, Peer, needs_dependents

GROUP = 128
INT4_STD = 4.6
"""Standard deviation of integers drawn evenly from -8 to 7."""


def _activation(case: Case, device: torch.device) -> Tensor:
    return torch.randn(case.m, case.k, device=device).to(float_dtype(device))


def _int8(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    b = torch.randint(-127, 128, (case.n, case.k), device=device, dtype=torch.int8)
    return _activation(case, device), b, (torch.rand(case.n, device=device) + 0.5) / (INT8_STD * math.sqrt(case.k))


def _int4_weight(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    packed = torch.randint(0, 256, (case.n, case.k // 2), device=device, dtype=torch.uint8)
    return packed, (torch.rand(case.n, case.k // GROUP, device=device) + 0.5) / (INT4_STD * math.sqrt(case.k))


def _int4(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    return _activation(case, device), *_int4_weight(case, device)


def _int8_int4(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    a = torch.randint(-127, 128, (case.m, case.k), device=device, dtype=torch.int8)
    return a, (torch.rand(case.m, 1, device=device) + 0.5) / INT8_STD, *_int4_weight(case, device)


def _wide_int4(packed: Tensor, scale: Tensor) -> Tensor:
    return dequantize_groups(unpack_int4(packed), scale).double()


W8A16 = Operands("w8a16", _int8, exact=False, dequantized=lambda t: (t[0].double(), t[1].double() * t[2].double().reshape(-1, 1)))
W4A16 = Operands("w4a16", _int4, exact=False, dequantized=lambda t: (t[0].double(), _wide_int4(t[1], t[2])))
W4A8 = Operands("w4a8", _int8_int4, exact=False, dequantized=lambda t: (t[0].double() * t[1].double(), _wide_int4(t[2], t[3])))


def _compiled(fn: Callable[..., Tensor], **options: Any) -> GemmCall:
    return torch.compile(fn, fullgraph=True, dynamic=False, **options)


def _ours(product: str, **options: bool) -> Callable[[Case, torch.device], GemmCall]:
    """The operator in our backend; its operands in the order in which the format draws them."""

    def build(case: Case, device: torch.device) -> GemmCall:
        operator, dtype = getattr(torch.ops.int8_inductor, product), float_dtype(device)

        def int8(a: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
            return operator(a, b, b_scale, out_dtype=dtype)

        def int4(a: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
            return operator(a, b, b_scale, GROUP, out_dtype=dtype)

        def int8_int4(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
            return operator(a, b, a_scale, b_scale, GROUP, out_dtype=dtype)

        fns = {"weight_int8_mm": int8, "weight_int4_mm": int4, "int8_int4_mm": int8_int4}
        return _compiled(fns[product], backend="int8_inductor", options=options)

    return build


def _stock_int8(case: Case, device: torch.device) -> GemmCall:
    """As torchao's weight-only linear has it: the scale after the product."""
    return _compiled(lambda a, b, b_scale: torch.mm(a, b.to(a.dtype).t()) * b_scale.to(a.dtype))


def _stock_int4(case: Case, device: torch.device) -> GemmCall:
    return _compiled(lambda a, b, b_scale: F.linear(a, dequantize_groups(unpack_int4(b), b_scale).to(a.dtype)))


def _both(form: Operands, product: str) -> tuple[Peer, Peer]:
    dependent = Peer("ours-dependent", "ours", form, _ours(product, **DEPENDENT), lacks=needs_dependents)
    return Peer("ours", "ours", form, _ours(product)), dependent


_STOCK = tuple(peer for peer in PEERS if peer.form is FLOAT)
SCHEMES: dict[str, tuple[Peer, ...]] = {
    "w8a16": (*_both(W8A16, "weight_int8_mm"), *_STOCK, Peer("stock-dequantized", "dequantized", W8A16, _stock_int8)),
    "w4a16": (*_both(W4A16, "weight_int4_mm"), *_STOCK, Peer("stock-dequantized", "dequantized", W4A16, _stock_int4)),
    "w4a8": (*_both(W4A8, "int8_int4_mm"), *_STOCK),
}


def main(argv: list[str] | None = None) -> int:
    """Run benchmarks.gemm with the peers of a scheme. 1 when any result was wrong or failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights", description=__doc__, add_help=False)
    parser.add_argument("--scheme", choices=list(SCHEMES), default="w8a16", help="(default: %(default)s)")
    options, rest = parser.parse_known_args(common.program(argv))
    shapes = [] if any(each.startswith("--shape") for each in rest) else ["--shapes", "weights"]
    return gemm.main([*shapes, *rest], SCHEMES[options.scheme], "weights", ("--scheme", options.scheme))


if __name__ == "__main__":
    sys.exit(main())
