"""The GEMM benchmark's cases: shapes [M, N, K] and what follows the product, in sets, the most telling first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tail:
    """What follows the scaled product. `activation` is one of int8_inductor's EPILOGUES; int8 output is static, one scale for the tensor."""

    name: str
    activation: str = "none"
    bias: bool = False
    int8_out: bool = False

    def out_bytes(self, float_bytes: int) -> int:
        """Bytes of an output element where a float one has `float_bytes`."""
        return 1 if self.int8_out else float_bytes


TAILS = {each.name: each for each in (Tail("plain"), Tail("gelu-int8", "gelu", bias=True, int8_out=True))}


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

SHAPE_SETS: dict[str, tuple[Case, ...]] = {
    "quick": (*_CUBE, Case(16, 4096, 4096), _EPILOGUE[0]),
    "table": (*_TABLE, *_EPILOGUE),
    "llama": _LLAMA,
    "vit": (*_VIT, _EPILOGUE[0]),
    "all": tuple(dict.fromkeys((*_TABLE, *_EPILOGUE, *_LLAMA, *_VIT))),
    "small": (*_cases((64, 256, 256), (1, 256, 256), (50, 197, 64)), *_cases((64, 256, 256), tail="gelu-int8")),
}


def parse_case(text: str) -> Case:
    """`M,N,K` or `M,N,K,tail`; ValueError otherwise."""
    *sizes, tail = text.split(",") if text.count(",") == 3 else (*text.split(","), "plain")
    if len(sizes) != 3 or not all(each.isdigit() and int(each) > 0 for each in sizes) or tail not in TAILS:
        raise ValueError(f"a shape must be M,N,K or M,N,K,tail with positive sizes and a tail from {', '.join(TAILS)}, got {text!r}")
    return Case(*map(int, sizes), TAILS[tail])


GROUPS = {
    "Llama, M >= 1024": lambda case: case.m >= 1024 and (case.n, case.k) in LLAMA and case.tail.name == "plain",
    "Llama, M 64 and 256": lambda case: case.m in (64, 256) and (case.n, case.k) in LLAMA and case.tail.name == "plain",
    "Llama, M 1 and 16": lambda case: case.m in (1, 16) and (case.n, case.k) in LLAMA and case.tail.name == "plain",
    "ViT-B/16, batch 32": lambda case: case.m == VIT_M and (case.n, case.k) in VIT and case.tail.name == "plain",
}
"""Cases whose ratios are summed up in one geometric mean."""
