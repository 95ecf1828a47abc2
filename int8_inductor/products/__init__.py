"""PRODUCTS: what there are operators for. One module each: schema, checks and eager definition; ops.py makes the operators.

Beside a product stand its main loops (templates/), how graphs spell it (passes/schemes/), and the module whose buffers it multiplies with.
"""

from .block_scaled_mm import BLOCK_SCALED_MM
from .int8_int4 import INT8_INT4_GROUP_MM, INT8_INT4_MM
from .scaled_mm import SCALED_MM
from .types import Product
from .weight_only import WEIGHT_INT4_MM, WEIGHT_INT8_GROUP_MM, WEIGHT_INT8_MM

__all__ = ["PRODUCTS", "Product"]

PRODUCTS: tuple[Product, ...] = (
    SCALED_MM,
    BLOCK_SCALED_MM,
    WEIGHT_INT8_MM,
    WEIGHT_INT8_GROUP_MM,
    WEIGHT_INT4_MM,
    INT8_INT4_MM,
    INT8_INT4_GROUP_MM,
)
