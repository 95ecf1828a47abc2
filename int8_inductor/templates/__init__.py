"""TEMPLATES: the Triton main loops that scaled_mm can lower to. One module each; the tail they share is in tail.py.

A module has CONFIGS; `is_legal(config, problem, device, tail)`; `candidates(problem, device, tail, thorough=)`, the configs worth timing;
`constants(config, problem, device, tail)`, a config as launch constants; and `template(tail)`, the TritonTemplate.
"""

from . import persistent, tiled, vector

TEMPLATES = (tiled, persistent, vector)
