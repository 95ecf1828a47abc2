"""Each way of writing quantize and dequantize that the passes read, as functions that a test strings into a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # noqa: F401 - defines torch.ops.quantized_decomposed
from torch import Tensor

decomposed = torch.ops.quantized_decomposed
INT8 = (-128, 127, torch.int8)


@dataclass(frozen=True)
class Dialect:
    """One way to write it. Scales are float32 [1] or, where `per_row`, [M, 1]; zero points int32 of the same shape, or None.

    quantize(x, scale, zero_point), dequantize(q, scale, zero_point): of an activation.
    weight(w, scale): dequantizes a weight [N, K] with one scale a row, [N, 1].
    per_row: whether it can quantize an activation by rows.
    """

    name: str
    quantize: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    dequantize: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    weight: Callable[[Tensor, Tensor], Tensor]
    per_row: bool = True

    def __str__(self) -> str:
        return self.name


def _shifted(steps: Tensor, zero_point: Tensor | None) -> Tensor:
    return steps if zero_point is None else steps + zero_point


def _divide(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return torch.clamp(_shifted(torch.round(x / scale), zero_point), -128, 127).to(torch.int8)


def _multiply(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return _shifted((x * (1.0 / scale)).round(), zero_point).clamp(min=-128).clamp(max=127).to(torch.int8)


def _reciprocal(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    inverse = scale.reciprocal()
    steps = torch.round(inverse * x)
    return torch.clip(steps if zero_point is None else zero_point.float() + steps, -128, 127).to(torch.int8)


def _clamp_first(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    if zero_point is not None:
        return _divide(x, scale, zero_point)
    return (x / scale).clamp(-128, 127).round().char()


def _numbers_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    number, shift = scale.tolist()[0], None if zero_point is None else zero_point.tolist()[0]
    return torch.clamp(torch.round(x / number) + (shift or 0), -128, 127).to(torch.int8)


def _numbers_dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    number, shift = scale.tolist()[0], None if zero_point is None else zero_point.tolist()[0]
    return (q.float() if shift is None else q.to(torch.int32).sub(shift).float()) * number


def _float_steps(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return (q.float() if zero_point is None else q.float() - zero_point.float()) * scale


def _int_steps(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return scale * (q.to(torch.int32) if zero_point is None else q.to(torch.int32) - zero_point).to(torch.float32)


def _by_division(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return (q.float() if zero_point is None else q.float() - zero_point) / (1.0 / scale)


def _weight(w: Tensor, scale: Tensor) -> Tensor:
    return w.float() * scale


PLAIN = (
    Dialect("divide", _divide, _float_steps, _weight),
    Dialect("multiply", _multiply, _int_steps, lambda w, scale: scale * w.to(torch.float32)),
    Dialect("reciprocal", _reciprocal, _by_division, lambda w, scale: w.float() / scale.reciprocal()),
    Dialect("clamp_first", _clamp_first, _float_steps, _weight),
)


# The scales of these are numbers in the graph, so the function closes over tensors that it does not compile: see `constants`.
NUMBERS = Dialect("numbers", _numbers_quantize, _numbers_dequantize, _weight, per_row=False)


def _per_tensor_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    shift = torch.zeros(1, dtype=torch.int32, device=x.device) if zero_point is None else zero_point
    return decomposed.quantize_per_tensor.tensor(x, scale, shift, *INT8)


def _per_tensor_dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    shift = torch.zeros(1, dtype=torch.int32, device=q.device) if zero_point is None else zero_point
    return decomposed.dequantize_per_tensor.tensor(q, scale, shift, *INT8)


def _per_token_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    scale, shift = _tokens(x, scale), _tokens(x, torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point)
    return decomposed.quantize_per_token(x, scale, shift, *INT8)


def _per_token_dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    scale, shift = _tokens(q, scale), _tokens(q, torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point)
    return decomposed.dequantize_per_token(q, scale, shift, *INT8, torch.float32)


def _tokens(x: Tensor, vector: Tensor) -> Tensor:
    return vector.expand(*x.shape[:-1], 1)


def _per_channel(w: Tensor, scale: Tensor) -> Tensor:
    return decomposed.dequantize_per_channel(w, scale.reshape(-1), None, 0, -127, 127, torch.int8)


def _per_channel_with_zeros(w: Tensor, scale: Tensor) -> Tensor:
    zeros = torch.zeros(len(w), dtype=torch.int64, device=w.device)
    return decomposed.dequantize_per_channel(w, scale.reshape(-1), zeros, 0, -127, 127, torch.int8)


def _numbers_per_tensor_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return decomposed.quantize_per_tensor(x, scale.tolist()[0], 0 if zero_point is None else zero_point.tolist()[0], *INT8)


def _numbers_per_tensor_dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return decomposed.dequantize_per_tensor(q, scale.tolist()[0], 0 if zero_point is None else zero_point.tolist()[0], *INT8)


DECOMPOSED = (
    Dialect("per_tensor", _per_tensor_quantize, _per_tensor_dequantize, _per_channel, per_row=False),
    Dialect("per_token", _per_token_quantize, _per_token_dequantize, _per_channel_with_zeros),
)
DECOMPOSED_NUMBERS = Dialect("per_tensor_numbers", _numbers_per_tensor_quantize, _numbers_per_tensor_dequantize, _per_channel, per_row=False)


def _block_size(x: Tensor, scale: Tensor) -> tuple[int, ...]:
    return tuple(x.shape) if scale.numel() == 1 else (*[1] * (x.ndim - 1), x.shape[-1])


def _affine_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    from torchao.quantization.quant_primitives import quantize_affine

    return quantize_affine(x, _block_size(x, scale), scale, torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point, torch.int8, -128, 127)


def _affine_dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    from torchao.quantization.quant_primitives import dequantize_affine

    return dequantize_affine(q, _block_size(q, scale), scale, zero_point, torch.int8, -128, 127)


def _affine_weight(w: Tensor, scale: Tensor) -> Tensor:
    return _affine_dequantize(w, scale.reshape(-1), None)


TORCHAO = Dialect("torchao", _affine_quantize, _affine_dequantize, _affine_weight)


def _parameter(dialect: Dialect) -> Any:
    if dialect is not TORCHAO:
        return pytest.param(dialect, id=dialect.name)
    missing = torch._inductor.utils.import_module is None if False else _lacks_torchao()
    return pytest.param(dialect, id=dialect.name, marks=pytest.mark.skipif(missing, reason="torchao is not installed"))


def _lacks_torchao() -> bool:
    from importlib.util import find_spec

    return find_spec("torchao") is None


TENSOR_DIALECTS = (*PLAIN, *DECOMPOSED, TORCHAO)
NUMBER_DIALECTS = (NUMBERS, DECOMPOSED_NUMBERS)
every_dialect = pytest.mark.parametrize("dialect", [_parameter(d) for d in (*TENSOR_DIALECTS, *NUMBER_DIALECTS)])
every_tensor_dialect = pytest.mark.parametrize("dialect", [_parameter(d) for d in TENSOR_DIALECTS])
