"""The operators in `torch.ops.int8_inductor`: two for each of PRODUCTS, made here of its schema, checks and eager definition.

Both compute y = activation(product + bias) in float32. `<name>` (scaled_mm, say) stores y as a float dtype or, given `out_scale`, as int8;
`<name>_block_quant` stores y as int8 with scales of its own, one per row and block of columns (the last may be short). `torch.compile` lowers
them (lowering.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .epilogues import EPILOGUES
from .products import PRODUCTS, Product
from .products.scaled_mm import SCALED_MM, ZERO_POINT_DTYPES
from .products.types import agree, check_vector

__all__ = ["KERNEL_PREFERENCES", "OPERATORS", "STORING", "define", "scaled_mm", "scaled_mm_block_quant"]

KERNEL_PREFERENCES = ("auto", "triton", "torch")
BLOCK_SIZES = (32, 64, 128)

_EPILOGUE = 'Tensor? bias=None, *, str activation="none", str kernel_preference="auto"'
_STORE = "Tensor? out_scale=None, Tensor? out_zero_point=None, int out_quant_min=-128, ScalarType? out_dtype=None"
_EPILOGUE_ARGUMENTS = ("bias", "activation", "kernel_preference")
_STORE_ARGUMENTS = ("out_scale", "out_zero_point", "out_quant_min", "out_dtype")
_library = torch.library.Library("int8_inductor", "DEF")


def bound(operator: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, however they were passed, defaults included."""
    arguments = operator._schema.arguments
    given = {each.name: value for each, value in zip(arguments, args, strict=False)} | dict(kwargs)
    return {each.name: given.get(each.name, each.default_value) for each in arguments}


def operands_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """A product's own tensors and numbers, of all arguments of one of its operators."""
    others = (*_EPILOGUE_ARGUMENTS, *_STORE_ARGUMENTS, "block_size")
    return {name: value for name, value in given.items() if name not in others}


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _check(product: Product, given: Mapping[str, Any]) -> tuple[Any, Any]:
    """(M, N). Raise TypeError or ValueError, naming the argument, what came and what is allowed."""
    m, n = product.check(**operands_of(given))
    bias, activation, kernel_preference = (given[name] for name in _EPILOGUE_ARGUMENTS)
    check_vector(product.name, "bias", bias, n, column=False, dtypes=_FLOATS, device=given["a"].device)
    if activation not in EPILOGUES:
        raise ValueError(f"{product.name}: activation must be one of {', '.join(EPILOGUES)}, got {activation!r}")
    if kernel_preference not in KERNEL_PREFERENCES:
        raise ValueError(f"{product.name}: kernel_preference must be one of {', '.join(KERNEL_PREFERENCES)}, got {kernel_preference!r}")
    return m, n


def _check_store(product: Product, m: Any, given: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for what says how the result is stored."""
    name, device = product.name, given["a"].device
    out_scale, out_zero_point, out_quant_min, out_dtype = (given[each] for each in _STORE_ARGUMENTS)
    if out_scale is None:
        if out_zero_point is not None:
            raise ValueError(f"{name}: out_zero_point needs out_scale, got None")
        if out_dtype is not None and out_dtype not in reference.OUT_DTYPES:
            raise TypeError(f"{name}: out_dtype must be one of {', '.join(map(str, reference.OUT_DTYPES))}, got {out_dtype}")
        return
    if out_dtype not in (None, torch.int8):
        raise TypeError(f"{name}: out_dtype must be torch.int8 or None with out_scale, got {out_dtype}")
    if out_quant_min not in (reference.INT8_MIN, reference.SYMMETRIC_MIN):
        raise ValueError(f"{name}: out_quant_min must be -128 or -127, got {out_quant_min}")
    check_vector(name, "out_scale", out_scale, m, column=True, dtypes=(torch.float32,), device=device)
    check_vector(name, "out_zero_point", out_zero_point, m, column=True, dtypes=ZERO_POINT_DTYPES, device=device)


def _check_block_size(product: Product, block_size: int) -> None:
    name = f"{product.name}_block_quant"
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"{name}: block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")


def linear_eager(y: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """activation(y + bias) in float32 for the result y [M, N] of a product."""
    return EPILOGUES[activation].eager(y if bias is None else y + bias.float())


def store_eager(
    y: Tensor,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_quant_min: int = reference.INT8_MIN,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """What is stored of a float32 result y [M, N]: int8 when there is an `out_scale` ([1] or [M, 1]), else `out_dtype` (float32)."""
    if out_scale is None:
        return y.to(out_dtype or torch.float32)
    shift = None if out_zero_point is None else out_zero_point.reshape(-1, 1)
    return reference.quantize(y, out_scale.reshape(-1, 1), shift, out_quant_min)


def store_blocks_eager(y: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """y [M, N] as int8 in blocks of columns, in whole ones with zeros at the end, and their scales."""
    return reference.quantize_blocks(reference.whole_blocks(y, block_size), block_size)


def stored_dtype(given: Mapping[str, Any]) -> torch.dtype:
    """The dtype that the first operator of a product stores."""
    return torch.int8 if given["out_scale"] is not None else given["out_dtype"] or torch.float32


def _define_storing(product: Product) -> None:
    """The operator that stores floats, or int8 with a given scale."""

    def checked(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Any, Any]:
        given = bound(product.operator, args, kwargs)
        m, n = _check(product, given)
        _check_store(product, m, given)
        return given, m, n

    def eager(*args: Any, **kwargs: Any) -> Tensor:
        given, *_ = checked(args, kwargs)
        y = linear_eager(product.eager(**operands_of(given)), given["bias"], given["activation"])
        return store_eager(y, *(given[name] for name in _STORE_ARGUMENTS))

    def fake(*args: Any, **kwargs: Any) -> Tensor:
        given, m, n = checked(args, kwargs)
        a: Tensor = given["a"]
        return a.new_empty((m, n), dtype=stored_dtype(given))

    define_operator(product.name, f"({product.operands}, {_EPILOGUE}, {_STORE}) -> Tensor", eager, fake)


def _define_block_quant(product: Product) -> None:
    """The operator that stores int8 in blocks of columns, and their scales."""

    def checked(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Any, Any]:
        given = bound(product.block_quant, args, kwargs)
        m, n = _check(product, given)
        _check_block_size(product, given["block_size"])
        return given, m, n

    def eager(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given, *_ = checked(args, kwargs)
        y = linear_eager(product.eager(**operands_of(given)), given["bias"], given["activation"])
        q, scale = store_blocks_eager(y, given["block_size"])
        return q[:, : y.shape[1]].contiguous(), scale

    def fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given, m, n = checked(args, kwargs)
        a: Tensor = given["a"]
        return a.new_empty((m, n), dtype=torch.int8), a.new_empty((m, -(-n // given["block_size"])), dtype=torch.float32)

    define_operator(f"{product.name}_block_quant", f"({product.operands}, {_EPILOGUE}, int block_size=128) -> (Tensor, Tensor)", eager, fake)


def define_operator(name: str, schema: str, eager: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define torch.ops.int8_inductor.<name> with its eager definition, on every device, and its fake."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"int8_inductor::{name}", fake, lib=_library)


def round_to_int8_eager(t: Tensor, quant_min: int = reference.INT8_MIN) -> Tensor:
    """float32 steps t as int8, rounded to nearest even and saturated to [quant_min, 127]; NaN becomes 0."""
    _check_round_to_int8(t, quant_min)
    return reference.saturate(torch.round(t), None, quant_min)


def _round_to_int8_fake(t: Tensor, quant_min: int = reference.INT8_MIN) -> Tensor:
    _check_round_to_int8(t, quant_min)
    return torch.empty_like(t, dtype=torch.int8)


def _check_round_to_int8(t: Tensor, quant_min: int) -> None:
    if t.dtype != torch.float32:
        raise TypeError(f"round_to_int8: t must be torch.float32, got {t.dtype}")
    if quant_min not in (reference.INT8_MIN, reference.SYMMETRIC_MIN):
        raise ValueError(f"round_to_int8: quant_min must be -128 or -127, got {quant_min}")


def block_requantize_eager(q: Tensor, scale: Tensor, activation: str = "none", block_size: int = 128) -> tuple[Tensor, Tensor]:
    """activation(q * scale) as int8 in blocks of columns again, and its scales: what stands between two block-scaled products apart from them.

    q: int8 [..., K]. scale: float32 [..., ceil(K / block_size)]. The result has the same shapes.
    """
    _check_block_requantize(q, scale, activation, block_size)
    values, scales = requantized_in_whole_blocks(q, scale, activation, block_size)
    return values[..., : q.shape[-1]].contiguous(), scales


def requantized_in_whole_blocks(q: Tensor, scale: Tensor, activation: str, block_size: int) -> tuple[Tensor, Tensor]:
    """The same, with zeros up to a whole number of blocks: every activation leaves 0 as it is, so they have no part in a scale."""
    y = EPILOGUES[activation].eager(reference.dequantize(reference.in_blocks(q, (block_size,)), scale.unsqueeze(-1)))
    scales = reference.choose_scale_blocks(y, [-1])
    return reference.quantize(y, scales, None, reference.SYMMETRIC_MIN).flatten(-2), scales.squeeze(-1)


def _block_requantize_fake(q: Tensor, scale: Tensor, activation: str = "none", block_size: int = 128) -> tuple[Tensor, Tensor]:
    _check_block_requantize(q, scale, activation, block_size)
    return torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty_like(scale, memory_format=torch.contiguous_format)


def _check_block_requantize(q: Tensor, scale: Tensor, activation: str, block_size: int) -> None:
    name = "block_requantize"
    for argument, t, dtype in (("q", q, torch.int8), ("scale", scale, torch.float32)):
        if t.dtype != dtype:
            raise TypeError(f"{name}: {argument} must be {dtype}, got {t.dtype}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"{name}: block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")
    if activation not in EPILOGUES:
        raise ValueError(f"{name}: activation must be one of {', '.join(EPILOGUES)}, got {activation!r}")
    wanted = [*q.shape[:-1], -(-q.shape[-1] // block_size)] if q.ndim else []
    if not wanted or scale.ndim != q.ndim or not all(agree(name, x, y) for x, y in zip(scale.shape, wanted, strict=True)):
        raise ValueError(f"{name}: scale must have shape {wanted} for q {list(q.shape)} in blocks of {block_size}, got {list(scale.shape)}")
    if scale.device != q.device:
        raise ValueError(f"{name}: scale must be on {q.device}, the device of q, got {scale.device}")


STORING: dict[Any, Product] = {}
"""The operators that store floats or int8 with a given scale, and whose they are."""
OPERATORS: set[Any] = set()
"""All operators that compute products."""


def define(product: Product) -> None:
    """Define the two operators of `product`."""
    _define_storing(product)
    _define_block_quant(product)
    STORING[product.operator] = product
    OPERATORS.update((product.operator, product.block_quant))


for _product in PRODUCTS:
    define(_product)
define_operator(
    "block_requantize",
    '(Tensor q, Tensor scale, str activation="none", int block_size=128) -> (Tensor, Tensor)',
    block_requantize_eager,
    _block_requantize_fake,
)
define_operator("round_to_int8", "(Tensor t, int quant_min=-128) -> Tensor", round_to_int8_eager, _round_to_int8_fake)

scaled_mm = SCALED_MM.operator
scaled_mm_block_quant = SCALED_MM.block_quant
block_requantize = torch.ops.int8_inductor.block_requantize.default
round_to_int8 = torch.ops.int8_inductor.round_to_int8.default
