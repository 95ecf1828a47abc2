"""The template of scaled_mm for Hopper: int8 products that stay in flight while the next are issued (see hopper.py).

Triton waits for an int8 product as soon as it is issued, so its persistent template drains the tensor cores at every step. On an H200, us, this one
and that one: 8192 cubed 701 and 756; 1024 x 4096 x 14336 75.8 and 84; 6304 x 2304 x 768 28.6 and 30.0; 6304 x 3072 x 768 35.3 and 38.
"""

from __future__ import annotations

from typing import Any

from ..gluon.program import Box
from ..gluon.template import GluonTemplate
from . import hopper
from .hopper import HopperConfig, Loop
from .problem import Device, Problem
from .tail import Tail

__all__ = ["CONFIGS", "LOOP", "is_legal", "template"]

_TEXT = """dot = tl.zeros((ROWS, COLUMNS), tl.int32, L)
last = 0
for step in range(0, TRIPS):
    mbarrier.wait(ready.index(stage), phase)
    dot = warpgroup_mma(left_boxes.index(stage * PARTS + PART), right_boxes.index(stage).permute((1, 0)), dot, is_async=True)
    # One product behind, so that the tensor cores always have the next; its stage is free when it is done.
    dot = warpgroup_mma_wait(1, deps=[dot])
    mbarrier.arrive(free.index(last), count=1, pred=step > 0)
    last = stage
    stage, phase = advance(stage, phase)
dot = warpgroup_mma_wait(0, deps=[dot])
mbarrier.arrive(free.index(last), count=1)"""

LOOP = Loop("int8_scaled_mm_hopper", _TEXT, left=Box(0, 128, "int8", 128), right=Box(0, 128, "int8", 128), k=128)

CONFIGS = (
    HopperConfig(128, 2, 128, 4),
    HopperConfig(128, 1, 128, 3, programs=2),
)


def is_legal(config: HopperConfig, problem: Problem, device: Device, tail: Tail) -> bool:
    """Whether the device can run it with that tail; see hopper.is_legal."""
    return hopper.is_legal(LOOP, config, problem, device, tail)


def candidates(problem: Problem, device: Device, tail: Tail, *, thorough: bool) -> list[HopperConfig]:
    """The configs worth timing: legal, and more rows than one tile of the skinny templates; two anyway, `thorough` or not."""
    return [config for config in CONFIGS if is_legal(config, problem, device, tail) and hopper.useful(LOOP, config, problem)]


def template(tail: Tail) -> GluonTemplate:
    """The template with that tail."""
    return hopper.hopper_template(LOOP, tail)


def constants(config: HopperConfig, problem: Problem, device: Device, tail: Tail) -> dict[str, Any]:
    """The constants of a kernel."""
    return hopper.launch_constants(LOOP, config, problem)
