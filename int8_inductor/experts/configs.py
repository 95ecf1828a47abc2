"""Tile sizes of the expert kernels, and for how many pairs an expert each is used. Measured on an H200; no timing at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .reference import ACT_BLOCK

__all__ = ["BLOCK_K", "ExpertConfig", "GroupedConfig", "choose", "choose_grouped", "fitted"]


@dataclass(frozen=True)
class GroupedConfig:
    """Tile of the weight's rows, warps and pipeline stages of one product; in how many parts a tile is computed, how many dots a stage holds where
    the weight is int4, and registers a thread at most, so that more programs share a multiprocessor.
    """

    block_n: int
    num_warps: int
    num_stages: int
    parts: int = 1
    dots: int = 1
    registers: int | None = None
    bits: bool = False


@dataclass(frozen=True)
class ExpertConfig:
    """Up to `pairs` pairs an expert, on average: tiles of block_m pairs, and the two products. None: any number."""

    pairs: int | None
    block_m: int
    gate_up: GroupedConfig
    down: GroupedConfig
    group_m: int = 8


# H200, 256 experts, top 8, hidden 2048, intermediate 512: ms for the layer at 1, 64, 1024, 4096 tokens, for which a layer of bf16
# torch._grouped_mm takes 0.078, 0.56, 0.75, 1.26.
# gate_up quantizes blocks of ACT_BLOCK columns, so its block_n is that wherever activations are int8.
W8A8 = (
    ExpertConfig(8, 16, GroupedConfig(128, 4, 4), GroupedConfig(64, 4, 4)),  # 0.026, 0.20
    ExpertConfig(64, 32, GroupedConfig(128, 8, 3), GroupedConfig(128, 4, 3)),  # 0.28
    ExpertConfig(None, 64, GroupedConfig(128, 8, 2), GroupedConfig(128, 4, 3)),  # 0.61
)
W4A8 = (
    ExpertConfig(8, 16, GroupedConfig(128, 8, 4), GroupedConfig(128, 4, 4)),  # 0.027, 0.16
    ExpertConfig(None, 32, GroupedConfig(128, 8, 4), GroupedConfig(128, 4, 4)),  # 0.28, 0.77
)
W4A16 = (
    ExpertConfig(8, 16, GroupedConfig(64, 4, 4), GroupedConfig(128, 4, 4)),  # 0.030, 0.21
    ExpertConfig(None, 64, GroupedConfig(128, 8, 3), GroupedConfig(128, 8, 3)),  # 0.49 at 1024 tokens
)
W4A16_FLOAT32 = (ExpertConfig(None, 16, GroupedConfig(64, 4, 2), GroupedConfig(64, 4, 2)),)
"""For float32 activations, each in three bfloat16 parts: more registers, and nobody's speed."""
GROUPED = (
    (8, 16, GroupedConfig(128, 4, 4)),
    (64, 32, GroupedConfig(128, 8, 4)),
    (None, 64, GroupedConfig(128, 8, 4)),
)

BLOCK_K = ACT_BLOCK
"""K of a step where the weight is int8: one scale of an activation."""
X_BLOCK = ACT_BLOCK
RESERVED = 1024
"""Bytes of shared memory that every block takes for itself."""


def step_int4(group_size: int) -> int:
    """K of a step where the weight is int4: a group, or two of 32, as the tensor cores take 32 bytes of a row at once."""
    return max(group_size, 64)


def choose(weight: torch.dtype, activation: torch.dtype, pairs: int, experts: int) -> ExpertConfig:
    """The config for so many pairs over so many experts, and for what the products multiply: int8 or packed (uint8) by int8 or floats."""
    table: tuple[ExpertConfig, ...]
    if weight == torch.int8:
        table = W8A8
    elif activation == torch.int8:
        table = W4A8
    else:
        table = W4A16_FLOAT32 if activation == torch.float32 else W4A16
    return next(config for config in table if config.pairs is None or pairs <= config.pairs * experts)


def choose_grouped(rows: int, experts: int) -> tuple[int, GroupedConfig]:
    """(block_m, config) of scaled_grouped_mm."""
    return next((block_m, config) for limit, block_m, config in GROUPED if limit is None or rows <= limit * experts)


def fitted(config: GroupedConfig, stage_bytes: int, shared_memory: int) -> GroupedConfig:
    """`config` with as many stages, of `stage_bytes` of shared memory each, as fit into `shared_memory` bytes; at least one."""
    room = (shared_memory - RESERVED) // stage_bytes
    return replace(config, num_stages=max(1, min(config.num_stages, room)))
