"""How many values share one scale, and whether a zero point goes with it. Names and meaning follow torchao.quantization."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from . import reference

__all__ = ["Granularity", "MappingType", "PerBlock", "PerGroup", "PerRow", "PerTensor"]

SQUARE_BLOCKS = (32, 64, 128)
"""Sizes B of the blocks that kernels multiply: 1 x B of activations, B x B of weights."""


@dataclass(frozen=True)
class Granularity:
    """Base of the granularities; `reduced_dims` says which dimensions of a tensor share a scale."""

    def reduced_dims(self, t: Tensor) -> list[int]:
        """The dimensions of `t` over which one scale is chosen (they stay, with size 1, in the scale's shape)."""
        raise TypeError(f"granularity must be PerTensor() or PerRow(), got {self!r}")


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor."""

    def reduced_dims(self, t: Tensor) -> list[int]:
        # amax refuses to reduce a dimension of size 0. An empty tensor has no values to scale: any scale that broadcasts does.
        return [-1] if guard_or_false(t.numel() == 0) else list(range(t.ndim))


@dataclass(frozen=True)
class PerRow(Granularity):
    """One scale for each row along the last dimension: per token for an activation, per output channel for a weight [N, K]."""

    def reduced_dims(self, t: Tensor) -> list[int]:
        return [-1]


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for each `group_size` values of a row: of a weight [N, K], 1 x group_size along K."""

    group_size: int

    def reduced_dims(self, t: Tensor) -> list[int]:
        raise TypeError(f"{self!r} has no dimensions that share a scale: they are parts of the last one")


@dataclass(frozen=True, init=False, repr=False)
class PerBlock(Granularity):
    """One scale for each block: PerBlock(1, 128) for 128 values of a row (an activation [..., K]), PerBlock(128, 128) for a square (a weight [N, K]).

    The sizes may come as a sequence too, as torchao takes them. The last block of a dimension may be short.
    """

    block_size: tuple[int, ...]

    def __init__(self, *block_size: int | Sequence[int]) -> None:
        sizes: tuple[object, ...] = tuple(block_size[0]) if len(block_size) == 1 and isinstance(block_size[0], Sequence) else block_size
        if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
            raise ValueError(f"block_size must be positive integers, as in PerBlock(1, 128), got {block_size!r}")
        object.__setattr__(self, "block_size", sizes)

    def __repr__(self) -> str:
        return f"PerBlock({', '.join(map(str, self.block_size))})"


class MappingType(enum.Enum):
    """SYMMETRIC: real = int8 * scale. ASYMMETRIC: real = (int8 - zero_point) * scale."""

    SYMMETRIC = "symmetric"
    ASYMMETRIC = "asymmetric"

    def choose(self, x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor | None, int]:
        """Scale (float32), zero point (int8, or None when symmetric) and smallest int8 value for quantizing `x`."""
        dims = granularity.reduced_dims(x)
        if self is MappingType.SYMMETRIC:
            return reference.choose_scale_symmetric(x, dims), None, self.quant_min
        scale, zero_point = reference.choose_scale_asymmetric(x, dims)
        return scale, zero_point, self.quant_min

    @property
    def quant_min(self) -> int:
        """The smallest int8 value that quantization makes: -127 when symmetric, else -128."""
        return reference.SYMMETRIC_MIN if self is MappingType.SYMMETRIC else reference.INT8_MIN


GranularityArgument = Granularity | tuple[Granularity, Granularity] | list[Granularity]


def normalize_granularity(value: GranularityArgument) -> tuple[Granularity, Granularity]:
    """(activation, weight) from one granularity or a pair; TypeError for anything else."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(each, (PerTensor, PerRow)) for each in pair):
        raise TypeError(f"granularity must be PerTensor(), PerRow() or a pair (activation, weight) of them, got {value!r}")
    return pair[0], pair[1]


def has_blocks(value: object) -> bool:
    """Whether a granularity, or one of a pair, is PerBlock."""
    return any(isinstance(each, PerBlock) for each in (value if isinstance(value, (tuple, list)) else (value,)))


def square_block(value: object) -> int:
    """B of a granularity (PerBlock(1, B), PerBlock(B, B)); TypeError or ValueError for anything else."""
    sizes = ", ".join(map(str, SQUARE_BLOCKS))
    wanted = f"granularity in blocks must be a pair (activation, weight) of (PerBlock(1, B), PerBlock(B, B)) with a B from {sizes}"
    pair = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(each, PerBlock) for each in pair):
        raise TypeError(f"{wanted}, got {value!r}")
    size = pair[1].block_size[-1]
    if size not in SQUARE_BLOCKS or pair != (PerBlock(1, size), PerBlock(size, size)):
        raise ValueError(f"{wanted}, got {value!r}")
    return int(size)


def check_mapping_type(value: object) -> None:
    """TypeError unless `value` is a MappingType."""
    if not isinstance(value, MappingType):
        raise TypeError(f"act_mapping_type must be MappingType.SYMMETRIC or MappingType.ASYMMETRIC, got {value!r}")


def check_scale(name: str, scale: Tensor, *, zeros: bool = False) -> None:
    """Raise unless `scale` is float32, finite and positive (`zeros`: or 0) throughout. Reads the values; a meta tensor has none and passes."""
    if scale.dtype != torch.float32:
        raise TypeError(f"{name} must be torch.float32, got {scale.dtype}")
    if scale.is_meta:
        return
    bad = ~(torch.isfinite(scale) & ((scale >= 0) if zeros else (scale > 0)))
    if bool(bad.any()):
        value, wanted = scale[bad].flatten()[0].item(), "not negative" if zeros else "positive"
        raise ValueError(f"{name} must be finite and {wanted}, got {value} in {int(bad.sum())} of {scale.numel()} places")
