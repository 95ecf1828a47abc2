"""Each way of writing quantize and dequantize that the passes read, as functions that a test strings into a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor

decomposed = torch.ops.quantized_decomposed  # which the last import defines
INT8 = (-128, 127, torch.int8)

M, N, K = 6, 23, 41
"""Sizes that are nothing else's, so that they can be looked for in the generated code."""


@dataclass(frozen=True)
class Dialect:
    """One way to write it.

    quantize(x, scale, zero_point), dequantize(q, scale, zero_point): of an activation [..., K], with what `qparams` makes.
    weight(w, scale): dequantizes a weight [N, K] with scales [N, 1].
    per_row: whether it has scales by rows ([..., 1]); numbers: its scale and zero point are Python numbers, not tensors.
    zero_point_dtype: of the tensors.
    """

    name: str
    quantize: Callable[[Tensor, Any, Any], Tensor]
    dequantize: Callable[[Tensor, Any, Any], Tensor]
    weight: Callable[[Tensor, Tensor], Tensor]
    per_row: bool = True
    numbers: bool = False
    zero_point_dtype: torch.dtype = torch.int32

    def qparams(self, scale: Tensor, zero_point: Tensor | None = None) -> tuple[Any, Any]:
        """A scale (float32) and zero point (int32, of the scale's shape), as this dialect takes them."""
        if not self.numbers:
            return scale, None if zero_point is None else zero_point.to(self.zero_point_dtype)
        return scale.item(), None if zero_point is None else int(zero_point.item())


def _or_zeros(zero_point: Any, scale: Any) -> Any:
    return torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point


# Plain aten -----------------------------------------------------------------------------------------------------------------------


def _divide(x: Tensor, scale: Any, zero_point: Any) -> Tensor:
    steps = torch.round(x / scale)
    return torch.clamp(steps if zero_point is None else steps + zero_point, -128, 127).to(torch.int8)


def _multiply(x: Tensor, scale: Any, zero_point: Any) -> Tensor:
    steps = (x * (1.0 / scale)).round()
    return (steps if zero_point is None else steps + zero_point).clamp(min=-128).clamp(max=127).to(torch.int8)


def _reciprocal(x: Tensor, scale: Any, zero_point: Any) -> Tensor:
    steps = torch.round(scale.reciprocal() * x)
    return torch.clip(steps if zero_point is None else zero_point.float() + steps, -128, 127).to(torch.int8)


def _clamp_first(x: Tensor, scale: Any, zero_point: Any) -> Tensor:
    return (x / scale).clamp(-128, 127).round().char() if zero_point is None else _divide(x, scale, zero_point)


def _float_steps(q: Tensor, scale: Any, zero_point: Any) -> Tensor:
    return (q.float() if zero_point is None else q.float() - zero_point.float()) * scale


def _int_steps(q: Tensor, scale: Any, zero_point: Any) -> Tensor:
    steps = q.to(torch.int32)
    return scale * (steps if zero_point is None else steps - zero_point).to(torch.float32)


def _by_division(q: Tensor, scale: Any, zero_point: Any) -> Tensor:
    return (q.float() if zero_point is None else q.float() - zero_point) / (1.0 / scale)


def _unchanged_zero_point(q: Tensor, scale: Any, zero_point: Any) -> Tensor:
    return (q.float() if zero_point is None else q.float() - zero_point) * scale


def _weight(w: Tensor, scale: Tensor) -> Tensor:
    return w.float() * scale


PLAIN = (
    Dialect("divide", _divide, _float_steps, _weight),
    Dialect("multiply", _multiply, _int_steps, lambda w, scale: scale * w.to(torch.float32)),
    Dialect("reciprocal", _reciprocal, _by_division, lambda w, scale: w.float() / scale.reciprocal()),
    Dialect("clamp_first", _clamp_first, _unchanged_zero_point, _weight, zero_point_dtype=torch.int8),
    Dialect("numbers_divide", _divide, lambda q, scale, zero_point: (q.float() - (zero_point or 0)) * scale, _weight, per_row=False, numbers=True),
    Dialect("numbers_multiply", _multiply, _int_steps, _weight, per_row=False, numbers=True),
)


# torch.ops.quantized_decomposed ---------------------------------------------------------------------------------------------------


def _per_tensor_quantize(x: Tensor, scale: Any, zero_point: Any) -> Tensor:
    return decomposed.quantize_per_tensor.tensor(x, scale, _or_zeros(zero_point, scale), *INT8)


def _per_tensor_dequantize(q: Tensor, scale: Any, zero_point: Any) -> Tensor:
    return decomposed.dequantize_per_tensor.tensor(q, scale, _or_zeros(zero_point, scale), *INT8)


def _tokens(x: Tensor, vector: Tensor) -> Tensor:
    return vector.expand(*x.shape[:-1], 1)


def _per_token_quantize(x: Tensor, scale: Any, zero_point: Any) -> Tensor:
    return decomposed.quantize_per_token(x, _tokens(x, scale), _tokens(x, _or_zeros(zero_point, scale)), *INT8)


def _per_token_dequantize(q: Tensor, scale: Any, zero_point: Any) -> Tensor:
    return decomposed.dequantize_per_token(q, _tokens(q, scale), _tokens(q, _or_zeros(zero_point, scale)), *INT8, torch.float32)


def per_channel(w: Tensor, scale: Tensor) -> Tensor:
    return decomposed.dequantize_per_channel(w, scale.reshape(-1), None, 0, -127, 127, torch.int8)


def per_channel_with_zeros(w: Tensor, scale: Tensor) -> Tensor:
    zeros = torch.zeros(len(w), dtype=torch.int64, device=w.device)
    return decomposed.dequantize_per_channel(w, scale.reshape(-1), zeros, 0, -127, 127, torch.int8)


DECOMPOSED = (
    Dialect("per_tensor", _per_tensor_quantize, _per_tensor_dequantize, per_channel, per_row=False),
    Dialect("per_token", _per_token_quantize, _per_token_dequantize, per_channel_with_zeros),
    Dialect(
        "numbers_per_tensor",
        lambda x, scale, zero_point: decomposed.quantize_per_tensor(x, scale, zero_point or 0, *INT8),
        lambda q, scale, zero_point: decomposed.dequantize_per_tensor(q, scale, zero_point or 0, *INT8),
        per_channel, per_row=False, numbers=True,
    ),
)  # fmt: skip


# torchao --------------------------------------------------------------------------------------------------------------------------


def _block_size(x: Tensor, scale: Tensor) -> tuple[int, ...]:
    return tuple(x.shape) if scale.numel() == 1 else (*[1] * (x.ndim - 1), x.shape[-1])


def _affine_quantize(x: Tensor, scale: Any, zero_point: Any) -> Tensor:
    from torchao.quantization.quant_primitives import quantize_affine

    return quantize_affine(x, _block_size(x, scale), scale, _or_zeros(zero_point, scale), torch.int8, -128, 127)


def _affine_dequantize(q: Tensor, scale: Any, zero_point: Any) -> Tensor:
    from torchao.quantization.quant_primitives import dequantize_affine

    return dequantize_affine(q, _block_size(q, scale), scale, zero_point, torch.int8, -128, 127)


TORCHAO = Dialect("torchao", _affine_quantize, _affine_dequantize, lambda w, scale: _affine_dequantize(w, scale, None))


# All of them ----------------------------------------------------------------------------------------------------------------------


def _parameter(dialect: Dialect) -> Any:
    missing = dialect is TORCHAO and find_spec("torchao") is None
    return pytest.param(dialect, id=dialect.name, marks=[pytest.mark.skipif(missing, reason="torchao is not installed")])


DIALECTS = (*PLAIN, *DECOMPOSED, TORCHAO)
every_dialect = pytest.mark.parametrize("dialect", [_parameter(each) for each in DIALECTS])
DEFAULT = PLAIN[0]


def int8(*shape: int, seed: int = 0, low: int = -127) -> Tensor:
    """Random int8 values."""
    return torch.randint(low, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Random float32 values in [0.5, 1.5)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def near(q: Tensor, scale: Tensor | float, zero_point: Tensor | int = 0, seed: int = 0) -> Tensor:
    """A float32 tensor that quantizes to `q` beyond doubt: within 0.3 steps of its exact value."""
    jitter = (torch.rand(q.shape, generator=torch.Generator().manual_seed(seed)) - 0.5) * 0.6
    return ((q.double() - zero_point + jitter) * scale).float()


def weight(n: int = N, k: int = K, seed: int = 1, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """An int8 weight [N, K], its scales [N, 1] and a bias [N]."""
    return int8(n, k, seed=seed).to(device), (rand(n, 1, seed=seed + 1) * 0.01).to(device), (rand(n, seed=seed + 2) - 1).to(device)


def scheme(zero_point: bool, per_row: bool, rows: tuple[int, ...] = (M,), device: str = "cpu") -> tuple[Tensor, Tensor | None]:
    """An activation's scale and zero point, by rows or for all."""
    shape = (*rows, 1) if per_row else (1,)
    scale = rand(*shape, seed=4) * 0.02
    shift = (torch.arange(scale.numel(), dtype=torch.int32) * 7 % 200 - 100).reshape(shape) if zero_point else None
    return scale.to(device), None if shift is None else shift.to(device)
