"""PRODUCTS: what there are operators for. One module each: schema, checks and eager definition; ops.py makes the operators.

Beside a product stand its main loops (templates/), how graphs spell it (passes/schemes/), and the module whose buffers it multiplies with.
"""

from .scaled_mm import SCALED_MM
from .types import Product

__all__ = ["PRODUCTS", "Product"]

PRODUCTS: tuple[Product, ...] = (SCALED_MM,)
