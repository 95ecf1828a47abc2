"""`Int8BlockLinear`: a linear layer with int8 values in blocks, a scale for each 1 x B of the activation and each B x B of the weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .granularity import PerBlock, square_block
from .quantized_linear import QuantizedLinear, check_features, check_weight_scale, divided_weight

__all__ = ["Int8BlockLinear"]

BlockGranularity = tuple[PerBlock, PerBlock]
DEFAULT = (PerBlock(1, 128), PerBlock(128, 128))


class Int8BlockLinear(QuantizedLinear):
    """y = dequantize(quantize(x)) @ dequantize(weight).T + bias, in float32, cast to x's dtype. A drop-in for nn.Linear.

    After Jetfire (arXiv 2403.12422) and the FP8 recipe of DeepSeek-V3 (arXiv 2412.19437), on int8. Buffers: `weight` int8 [N, K]; `weight_scale`
    float32 [ceil(N / B), ceil(K / B)]; `bias` [N] or None; `act_pre_scale` float32 [K] or None. The activation's scales are chosen from each input.
    A block of zeros has the scale 0.

    Args:
        in_features, out_features: K and N; need not be multiples of B.
        bias: whether there is one.
        granularity: (PerBlock(1, B), PerBlock(B, B)), of the activation and the weight; B is 32, 64 or 128.
        act_pre_scale: whether there is one. A state dict that is loaded decides it anew, as the pre-scale belongs to the weight.
        device, dtype: of the buffers; `dtype` is the bias's.
    """

    ZERO_SCALES = True

    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        granularity: BlockGranularity = DEFAULT,
        act_pre_scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.block_size = square_block(granularity)
        check_features(in_features, out_features)
        self.in_features, self.out_features = in_features, out_features
        blocks = (-(-out_features // self.block_size), -(-in_features // self.block_size))
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(blocks, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        self.act_pre_scale = torch.ones(in_features, dtype=torch.float32, device=device) if act_pre_scale else None

    @property
    def granularity(self) -> BlockGranularity:
        """Of the activation and the weight."""
        return PerBlock(1, self.block_size), PerBlock(self.block_size, self.block_size)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, granularity: BlockGranularity = DEFAULT, act_pre_scale: Tensor | None = None) -> Int8BlockLinear:
        """Quantize `linear`'s weight to int8; the bias is copied as it is. ValueError for a weight that is not finite.

        act_pre_scale: float [K], finite and positive: multiply x by it, and divide the weight by it before that is quantized. By default that which
        `smooth_quant` has left on `linear`, if it has.
        """
        weight, pre_scale = divided_weight(linear, act_pre_scale)
        has_bias = linear.bias is not None
        self = cls(
            linear.in_features, linear.out_features, has_bias, granularity=granularity, act_pre_scale=pre_scale is not None, device="meta",
            dtype=linear.bias.dtype if has_bias else None,
        )  # fmt: skip
        self.act_pre_scale = pre_scale
        q, scale = reference.quantize_blocks(weight, (self.block_size, self.block_size))
        check_weight_scale(scale)
        # Buffers of their own, with K contiguous: what quantize_blocks returns of a ragged weight is a part of a larger one.
        self.weight, self.weight_scale = q.contiguous(), scale.contiguous()
        self.bias = linear.bias.detach().clone() if has_bias else None
        return self.train(linear.training)

    def dequantized_weight(self) -> Tensor:
        """float32 [N, K]."""
        return reference.dequantize_blocks(self.weight, self.weight_scale, (self.block_size, self.block_size))

    def _linear(self, x: Tensor) -> Tensor:
        # In whole blocks, the last filled up with zeros on both sides: Inductor's C++ computes a wrong scale[i // block] where the size of i is no
        # multiple of the block (torch 2.11 to 2.15, try_loop_split). The pass drops the zeros.
        size = self.block_size
        q, scale = reference.quantize_blocks(reference.whole_blocks(x, size), size)
        weight = reference.dequantize_blocks(reference.whole_blocks(self.weight, size), self.weight_scale, (size, size))
        bias = None if self.bias is None else self.bias.float()
        return F.linear(reference.dequantize_blocks(q, scale, size), weight, bias)

    def extra_repr(self) -> str:
        activation, weight = self.granularity
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation=dynamic {activation!r}, weight={weight!r}" + (", act_pre_scale=True" if self.act_pre_scale is not None else "")
        )
