"""TEMPLATES: the Triton main loops that scaled_mm can lower to. One module each; the tail they share is in tail.py."""

from . import tiled

TEMPLATES = (tiled,)
