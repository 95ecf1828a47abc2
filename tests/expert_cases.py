"""Layers of experts, drawn; and their float64 results, with how far from them float32 arithmetic may end.

The bounds are derived as those of support.py are. A product over K is summed from stretches whose int8 dot is exact: an error of (stretches + 4) U
times the sum of the magnitudes (of K + 4 where the activation is a float). The hidden value h = activation(gate) * up carries the errors of both. Its
int8 steps t = h / scale may be rounded either way where t lies within its error of a tie: that is worth scale * |weight| a value. A pair's result
is rounded to the dtype of x before the sum over slots. The int8 of x itself has no error: the kernels' is that of the definition on a CPU, to the bit
(test_activations_become_the_int8_of_the_definition). Eager torch on a GPU divides by 127 by multiplying, so for it the definition runs there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from support import EVALUATION, FLOATS, LIPSCHITZ, SUBNORMAL, Bounded, U, ulp
from torch import Tensor

from int8_inductor import reference
from int8_inductor.epilogues import EPILOGUES
from int8_inductor.experts import layouts
from int8_inductor.experts.reference import ACT_BLOCK, quantize_activation

LAYOUTS = ("w8a8", "w4a8", "w4a16")
GROUPS = layouts.GROUP_SIZES


@dataclass
class ExpertCase:
    """Operands of moe_experts, from a seed. group: of int4; K and I are multiples of it then. magnitudes: of the tokens in turn."""

    layout: str = "w8a8"
    experts: int = 3
    k: int = 64
    inner: int = 64
    n: int = 33
    tokens: int = 7
    slots: int = 2
    group: int = 32
    dtype: torch.dtype = torch.float32
    activation: str = "silu"
    seed: int = 0
    magnitudes: tuple[float, ...] = (1.0,)
    index_dtype: torch.dtype = torch.int64
    device: str = "cpu"

    @property
    def weight_only(self) -> bool:
        return self.layout == "w4a16"

    def options(self) -> dict[str, Any]:
        return {"activation": self.activation, "weight_only": self.weight_only}

    def operands(self) -> tuple[Tensor, ...]:
        """The tensors of the operator, in order, on the CPU; the same at every call. Some chosen experts are none: -1, or past the last."""
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        x = randn(self.tokens, self.k)
        for token in range(self.tokens):
            x[token] *= self.magnitudes[token % len(self.magnitudes)]
        weights = (randn(self.experts, 2 * self.inner, self.k) * 0.1, randn(self.experts, self.n, self.inner) * 0.1)
        index = torch.randint(-1, self.experts + 1, (self.tokens, self.slots), generator=generator, dtype=self.index_dtype)
        routing = torch.rand(self.tokens, self.slots, generator=generator).to(self.dtype)
        gate_up, down = (self.quantized(weight) for weight in weights)
        return x.to(self.dtype), *gate_up, *down, index, routing

    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.layout == "w8a8":
            return layouts.quantize_weight_int8(weight)
        return layouts.quantize_weight_int4(weight, self.group)

    def on_device(self) -> tuple[Tensor, ...]:
        return tuple(t.to(self.device) for t in self.operands())

    def want(self, kernel: str = "triton") -> Bounded:
        """The float64 result. kernel: the preference, whose int8 of x it is."""
        x, gate_up, gate_up_scale, down, down_scale, index, routing = self.operands()
        value, error = (torch.zeros(self.tokens, self.n, dtype=torch.float64) for _ in range(2))
        for token in range(self.tokens):
            for slot in range(self.slots):
                expert = int(index[token, slot])
                if not 0 <= expert < self.experts:
                    continue
                weights = (gate_up[expert], gate_up_scale[expert], down[expert], down_scale[expert])
                y = self._expert(x[token : token + 1], *weights, self.device if kernel == "torch" else "cpu")
                weight = float(routing[token, slot])
                pair = y.value[0] * weight
                value[token] += pair
                error[token] += y.error[0] * abs(weight) + 2 * U * pair.abs() + ulp(pair, self.dtype)
        return Bounded(value, error + self.slots * U * value.abs() + SUBNORMAL)

    def _expert(self, x: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor, quantized_on: str) -> Bounded:
        up_weight, down_weight = (
            layouts.dequantize_weight(w, s.double()) if w.dtype == torch.uint8 else w.double() * s.double()
            for w, s in ((gate_up, gate_up_scale), (down, down_scale))
        )
        if self.weight_only:
            both = product64(Bounded(x.double(), torch.zeros_like(x, dtype=torch.float64)), up_weight, self.k)
        else:
            q, scale = (t.cpu() for t in quantize_activation(x.to(quantized_on), None))
            exact = q.double() * scale.double()
            both = product64(Bounded(exact, torch.zeros_like(exact)), up_weight, -(-self.k // 32))
        hidden = self._hidden(both)
        if self.weight_only:
            rounded = Bounded(hidden.value, hidden.error + ulp(hidden.value, self.dtype))
            return product64(rounded, down_weight, self.inner)
        return product64(requantized64(hidden), down_weight, -(-self.inner // 32))

    def _hidden(self, both: Bounded) -> Bounded:
        (gate, up), (gate_error, up_error) = both.value.chunk(2, -1), both.error.chunk(2, -1)
        activated = EPILOGUES[self.activation].eager(gate)
        error = LIPSCHITZ * gate_error + EVALUATION * U * gate.abs() + SUBNORMAL
        value = activated * up
        return Bounded(value, error * up.abs() + activated.abs() * up_error + error * up_error + 2 * U * value.abs() + SUBNORMAL)


def product64(x: Bounded, weight: Tensor, terms: int) -> Bounded:
    """x @ weight.T for exact weights, summed in float32 from so many terms."""
    magnitude = weight.abs()
    error = x.error @ magnitude.t() + (terms + 4) * U * ((x.value.abs() + x.error) @ magnitude.t())
    return Bounded(x.value @ weight.t(), error + SUBNORMAL)


def requantized64(h: Bounded) -> Bounded:
    """h [R, I] as int8 in blocks, dequantized; where rounding could go either way, the error is a step."""
    rows, inner = h.value.shape
    pad = (0, -inner % ACT_BLOCK)
    value, error = (torch.nn.functional.pad(t, pad).reshape(rows, -1, ACT_BLOCK) for t in (h.value, h.error))
    scale = (value.abs().amax(-1, keepdim=True) / 127).clamp(min=reference.SMALLEST_SCALE)
    scale_error = error.amax(-1, keepdim=True) / 127 + 2 * U * scale
    t = value / scale
    e = error / scale + t.abs() * (scale_error / scale + 6 * U)
    low, high = (torch.clamp((t + shift).round(), -127, 127) for shift in (-e, e))
    q = t.round().clamp(-127, 127)
    wrong = (high - low) * scale + q.abs() * scale_error
    return Bounded(*((r.reshape(rows, -1)[:, :inner]) for r in (q * scale, wrong)))


@st.composite
def expert_cases(draw: st.DrawFn, layout: str | None = None) -> ExpertCase:
    """Sizes of 1, odd, prime and around the tiles; int4 in every group; tokens of 0, tiny and large magnitude; experts that nobody chose."""
    chosen = layout or draw(st.sampled_from(LAYOUTS))
    group = draw(st.sampled_from(GROUPS))
    if chosen == "w8a8":
        k, inner = (draw(st.sampled_from([1, 2, 7, 33, 64, 127, 129, 200])) for _ in range(2))
    else:
        k, inner = (group * draw(st.integers(1, 256 // group)) for _ in range(2))
    return ExpertCase(
        chosen,
        experts=draw(st.sampled_from([1, 2, 3, 5, 17])),
        k=k,
        inner=inner,
        n=draw(st.sampled_from([1, 3, 33, 64, 130])),
        tokens=draw(st.sampled_from([1, 2, 5, 17, 40])),
        slots=draw(st.integers(1, 8)),
        group=group,
        dtype=draw(st.sampled_from(FLOATS)),
        activation=draw(st.sampled_from(sorted(EPILOGUES))),
        seed=draw(st.integers(0, 99)),
        magnitudes=draw(st.sampled_from([(1.0,), (0.0, 1.0), (1e-4, 1.0, 20.0)])),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
    )
