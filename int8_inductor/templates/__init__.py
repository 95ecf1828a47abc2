"""LOWERINGS: how each of PRODUCTS lowers. One object each, with its templates, the Triton main loops; the tail they all share is in tail.py.

A template is a module with CONFIGS; `is_legal(config, problem, device, tail)`; `candidates(problem, device, tail, thorough=)`, the configs worth
timing; `constants(config, problem, device, tail)`, a config as launch constants; and `template(tail)`, the TritonTemplate.
"""

from . import block_scaled_mm, scaled_mm, weight_only
from .types import Lowering

__all__ = ["LOWERINGS", "Lowering"]

LOWERINGS: dict[str, Lowering] = {each.product.name: each for each in (scaled_mm.LOWERING, block_scaled_mm.LOWERING, *weight_only.LOWERINGS)}
"""By the product's name."""
