"""The GEMM benchmark's cases: shapes [M, N, K] and what follows the product, in sets, the most telling first."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Tail:
    """What follows the scaled product. `activation` is one of int8_inductor's EPILOGUES; int8 output is static, one scale for the tensor, or has a
    scale for each row and `block_size` columns, chosen from them.
    """

    name: str
    activation: str = "none"
    bias: bool = False
    int8_out: bool = False
    block_size: int | None = None

    def out_bytes(self, float_bytes: int) -> int:
        """Bytes of an output element where a float one has `float_bytes`."""
        return 1 if self.int8_out else float_bytes


TAILS = {
    each.name: each
    for each in (
        Tail("plain"),
        Tail("gelu-int8", "gelu", bias=True, int8_out=True),
        Tail("gelu-blocks", "gelu", bias=True, int8_out=True, block_size=128),
    )
}


@dataclass(frozen=True)
class Case:
    """activation(a [M, K] @ b [N, K].T * scales + bias), stored as the device's float dtype or as int8."""

    m: int
    n: int
    k: int
    tail: Tail = TAILS["plain"]

    @property
    def label(self) -> str:
        shape = f"{self.m} x {self.n} x {self.k}"
        return shape if self.tail.name == "plain" else f"{shape} {self.tail.name}"

    @property
    def operations(self) -> int:
        return 2 * self.m * self.n * self.k

    def bytes_moved(self, out_bytes: int) -> int:
        """Fewest bytes of an INT8 product: each operand read once, each output (`out_bytes` an element) written once, float32 scales and bias."""
        vectors = 4 * (self.m + self.n * (2 if self.tail.bias else 1))
        return self.m * self.k + self.n * self.k + self.m * self.n * out_bytes + vectors


LLAMA = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
VIT = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
VIT_M = 6304
CUBE = 8192


def _cases(*shapes: tuple[int, int, int], tail: str = "plain") -> tuple[Case, ...]:
    return tuple(Case(*shape, TAILS[tail]) for shape in shapes)


_CUBE = _cases((CUBE, CUBE, CUBE))
_EPILOGUE = _cases((VIT_M, 3072, 768), (2048, 28672, 4096), tail="gelu-int8")
_LLAMA = tuple(Case(m, n, k) for m in (4096, 1024, 8192, 16, 64, 256, 1) for n, k in LLAMA)
_VIT = tuple(Case(VIT_M, n, k) for n, k in VIT)
_TABLE = _cases(
    (8192, 8192, 8192), (8192, 28672, 4096), (4096, 4096, 14336), (1024, 6144, 4096), (256, 4096, 14336), (64, 28672, 4096), (16, 28672, 4096),
    (1, 28672, 4096), (1, 4096, 14336), (VIT_M, 2304, 768), (VIT_M, 768, 768), (VIT_M, 768, 3072),
)  # fmt: skip

CPU_M = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CPU = ((384, 384), (1536, 384), (384, 1536), (768, 768), (1536, 1536))
_CPU = tuple(Case(m, n, k) for n, k in CPU for m in CPU_M)

HELD_OUT_SEED, HELD_OUT_COUNT = 20261120, 24
_WIDENINGS = (1.0, 1.125, 1.25, 1.5, 2.0, 8 / 3, 3.0, 3.5, 4.0, 7.0)
"""N over K, or K over N, of the linears of transformers: attention's output, queries with keys and values, MLPs with and without gates."""


def held_out(seed: int = HELD_OUT_SEED, count: int = HELD_OUT_COUNT) -> tuple[Case, ...]:
    """Random shapes as LLMs and ViTs have them, none with an N and K that another set has: the same for the same seed; a new seed is a new test.

    A hidden size in multiples of 64 from 512 to 8192, widened on either side; M from 1 to 8192, evenly in its logarithm, odd as often as not; one in
    four with GELU and int8 output.
    """
    known = {(case.n, case.k) for cases in SHAPE_SETS.values() for case in cases}
    draw = random.Random(seed)
    cases: dict[Case, None] = {}
    while len(cases) < count:
        hidden = 64 * round(math.exp(draw.uniform(math.log(8), math.log(128))))
        wide = 16 * round(hidden * draw.choice(_WIDENINGS) / 16)
        n, k = draw.choice(((hidden, wide), (wide, hidden)))
        m = round(math.exp(draw.uniform(0, math.log(8192))))
        tail = TAILS[draw.choice(("plain", "plain", "plain", "gelu-int8"))]
        if (n, k) not in known and n * k <= 2**28:
            cases[Case(m, n, k, tail)] = None
    return tuple(sorted(cases, key=lambda case: (case.m, case.n, case.k)))


_BLOCKS = (*_CUBE, *_cases((4096, 28672, 4096), (2048, 4096, 4096), (64, 28672, 4096)), *_cases((VIT_M, 3072, 768), tail="gelu-blocks"))
SHAPE_SETS: dict[str, tuple[Case, ...]] = {
    "quick": (*_CUBE, Case(16, 4096, 4096), _EPILOGUE[0]),
    "table": (*_TABLE, *_EPILOGUE),
    "llama": _LLAMA,
    "blocks": _BLOCKS,
    "small-blocks": (*_cases((64, 256, 256), (5, 200, 300)), *_cases((64, 256, 256), tail="gelu-blocks")),
    "vit": (*_VIT, _EPILOGUE[0]),
    "all": tuple(dict.fromkeys((*_TABLE, *_EPILOGUE, *_LLAMA, *_VIT))),
    "weights": tuple(Case(m, n, k) for m in (1, 16, 4, 1024, 4096, 64, 256, 8192) for n, k in LLAMA),
    "cpu": _CPU,
    "small": (*_cases((64, 256, 256), (1, 256, 256), (50, 197, 64)), *_cases((64, 256, 256), tail="gelu-int8")),
}


def parse_case(text: str) -> Case:
    """`M,N,K` or `M,N,K,tail`; ValueError otherwise."""
    *sizes, tail = text.split(",") if text.count(",") == 3 else (*text.split(","), "plain")
    if len(sizes) != 3 or not all(each.isdigit() and int(each) > 0 for each in sizes) or tail not in TAILS:
        raise ValueError(f"a shape must be M,N,K or M,N,K,tail with positive sizes and a tail from {', '.join(TAILS)}, got {text!r}")
    return Case(*map(int, sizes), TAILS[tail])


def _on_a_cpu(case: Case, low: int, high: int) -> bool:
    return low <= case.m <= high and (case.n, case.k) in CPU and case.tail.name == "plain"


def _elsewhere(case: Case, low: int, high: int) -> bool:
    """Whether no set has the shape's N and K: it is held out, or given by --shape."""
    return low <= case.m <= high and (case.n, case.k) not in _NAMED


_NAMED = {(case.n, case.k) for cases in SHAPE_SETS.values() for case in cases}

GROUPS = {
    "Llama, M >= 1024": lambda case: case.m >= 1024 and (case.n, case.k) in LLAMA and case.tail.name == "plain",
    "Llama, M 64 and 256": lambda case: case.m in (64, 256) and (case.n, case.k) in LLAMA and case.tail.name == "plain",
    "Llama, M 1 and 16": lambda case: case.m in (1, 16) and (case.n, case.k) in LLAMA and case.tail.name == "plain",
    "Llama, M 4": lambda case: case.m == 4 and (case.n, case.k) in LLAMA and case.tail.name == "plain",
    "ViT-B/16, batch 32": lambda case: case.m == VIT_M and (case.n, case.k) in VIT and case.tail.name == "plain",
    "BERT sizes, M 1 to 16": lambda case: _on_a_cpu(case, 1, 16),
    "BERT sizes, M 32 to 512": lambda case: _on_a_cpu(case, 32, 512),
    "other shapes, M 1 to 64": lambda case: _elsewhere(case, 1, 64),
    "other shapes, M 65 to 1023": lambda case: _elsewhere(case, 65, 1023),
    "other shapes, M >= 1024": lambda case: _elsewhere(case, 1024, 8192),
}
"""Cases whose ratios are summed up in one geometric mean."""
