"""Tile sizes of the expert kernels, and for how many pairs an expert each is used. Measured on an H200; no timing at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .reference import ACT_BLOCK

__all__ = ["BLOCK_K", "ExpertConfig", "GroupedConfig", "choose", "choose_grouped", "fitted"]


@dataclass(frozen=True)
class GroupedConfig:
    """Tile of the weight's rows, warps and pipeline stages of one product; in how many parts a tile is computed, and registers a thread at most, so
    that more programs share a multiprocessor.
    """

    block_n: int
    num_warps: int
    num_stages: int
    parts: int = 1
    registers: int | None = None


@dataclass(frozen=True)
class ExpertConfig:
    """Up to `pairs` pairs an expert, on average: tiles of block_m pairs, and the two products. None: any number. tight: takes all registers that
    Hopper has for it, and would spill in its loops on other GPUs and where a step has two groups of int4.
    """

    pairs: int | None
    block_m: int
    gate_up: GroupedConfig
    down: GroupedConfig
    group_m: int = 8
    tight: bool = False


# H200, 256 experts, top 8, hidden 2048, intermediate 512: ms for the layer at 1, 64, 1024, 4096 tokens, for which a layer of bf16
# torch._grouped_mm takes 0.078, 0.56, 0.75, 1.26.
# gate_up quantizes blocks of ACT_BLOCK columns, so its block_n is that wherever activations are int8.
W8A8 = (
    ExpertConfig(8, 16, GroupedConfig(128, 4, 4), GroupedConfig(64, 4, 4)),  # 0.026, 0.20
    ExpertConfig(64, 32, GroupedConfig(128, 8, 3), GroupedConfig(128, 4, 3)),  # 0.28
    ExpertConfig(256, 64, GroupedConfig(128, 8, 2), GroupedConfig(128, 4, 3)),  # 0.61
    # By arithmetic, not measured: with 64 pairs gate_up reads 40 KB from the L2 for each 4.2 million operations, with 128 it reads 24.
    ExpertConfig(None, 128, GroupedConfig(128, 8, 3), GroupedConfig(128, 8, 3, parts=2), tight=True),
    ExpertConfig(None, 64, GroupedConfig(128, 8, 2), GroupedConfig(128, 4, 3)),
)
# gate_up at 4096 tokens, us: 574 with a scale of x for each 128 columns (32 pairs, 8 warps, 4 stages), 551 with the best tile for that; with one a
# row 495, and 324 in two parts with 4 warps, 3 stages and 168 registers (4 stages 338, 128 registers 385). down 302.
# Eight experts of 4096 x 14336, top 2, 4096 tokens: gate_up 7093 before, 3172 with 64 pairs; down 2473 with 32.
W4A8 = (
    ExpertConfig(8, 16, GroupedConfig(128, 8, 4), GroupedConfig(128, 4, 4)),  # 0.027, 0.16
    ExpertConfig(256, 32, GroupedConfig(128, 4, 3, parts=2, registers=168), GroupedConfig(128, 4, 4), tight=True),
    ExpertConfig(None, 64, GroupedConfig(128, 4, 3, parts=2), GroupedConfig(128, 4, 3, parts=2), tight=True),
    ExpertConfig(None, 32, GroupedConfig(128, 8, 4), GroupedConfig(128, 4, 4)),
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
LEAST_STEP = 64
"""K of a step at least where the weight is int4: the tensor cores take 32 bytes of a row at once."""
RESERVED = 1024
"""Bytes of shared memory that every block takes for itself."""


def step_int4(group_size: int) -> int:
    """K of a step where the weight is int4: a group, or two of 32."""
    return max(group_size, LEAST_STEP)


def choose(weight: torch.dtype, activation: torch.dtype, pairs: int, experts: int, *, tight: bool) -> ExpertConfig:
    """The config for so many pairs over so many experts, and for what the products multiply: int8 or packed (uint8) by int8 or floats. tight: whether
    it may be.
    """
    table: tuple[ExpertConfig, ...]
    if weight == torch.int8:
        table = W8A8
    elif activation == torch.int8:
        table = W4A8
    else:
        table = W4A16_FLOAT32 if activation == torch.float32 else W4A16
    return next(config for config in table if (config.pairs is None or pairs <= config.pairs * experts) and (tight or not config.tight))


def choose_grouped(rows: int, experts: int) -> tuple[int, GroupedConfig]:
    """(block_m, config) of scaled_grouped_mm."""
    return next((block_m, config) for limit, block_m, config in GROUPED if limit is None or rows <= limit * experts)


def fitted(config: GroupedConfig, stage_bytes: int, shared_memory: int) -> GroupedConfig:
    """`config` with as many stages, of `stage_bytes` of shared memory each, as fit into `shared_memory` bytes; at least one."""
    room = (shared_memory - RESERVED) // stage_bytes
    return replace(config, num_stages=max(1, min(config.num_stages, room)))
