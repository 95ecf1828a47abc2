"""`QuantizedExperts`: stacked experts whose int8 or int4 weights and float32 scales are ordinary buffers, and which modules it replaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..epilogues import EPILOGUES
from ..quantized_linear import QuantizedModule
from . import ops
from .layouts import GROUP_SIZES, dequantize_weight, quantize_weight_int4, quantize_weight_int8

__all__ = ["QuantizedExperts", "is_experts"]

_FLAGS = {"has_gate": True, "has_bias": False, "is_transposed": False}
_LATER_FLAGS = {"is_concatenated": True, "has_post_expert_norm": False}
"""What transformers' use_experts_implementation says of a module of stacked experts -> what it must say here. It says the second since 5.4."""
_WEIGHTS = ("gate_up_proj", "down_proj")
_ACT_FN_RANGE, _ACT_FN_STEPS = 8.0, 4097


class QuantizedExperts(QuantizedModule):
    """y[token] = sum of routing * down(activation(gate(x)) * up(x)) over the experts chosen for a token. A drop-in for MixtralExperts and its like.

    Buffers: `gate_up_proj`, gate rows before up rows, and `down_proj`: int8 [E, 2 I, K] and [E, K, I], or, with a `group_size`, two int4 a byte,
    uint8 [E, 2 I, K / 2] and [E, K, I / 2], low nibble first, value + 8; `gate_up_proj_scale` and `down_proj_scale`: float32, one a row,
    [E, rows, 1], or one a group, [E, rows, columns / group_size]. The eager definition is experts/reference.py.

    Args:
        num_experts, hidden_dim, intermediate_dim: E, K and I.
        group_size: None for int8; 32, 64 or 128, which divides K and I, for int4.
        weight_only: activations stay as they are (int4 alone), else they are quantized to int8 at run time.
        activation: of the gate, one of EPILOGUES.
        device: of the buffers.
    """

    SCALES = ("gate_up_proj_scale", "down_proj_scale")

    gate_up_proj: Tensor
    gate_up_proj_scale: Tensor
    down_proj: Tensor
    down_proj_scale: Tensor

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        intermediate_dim: int,
        *,
        group_size: int | None = None,
        weight_only: bool = False,
        activation: str = "silu",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(num_experts, hidden_dim, intermediate_dim, group_size)
        if activation not in EPILOGUES:
            raise ValueError(f"activation must be one of {', '.join(EPILOGUES)}, got {activation!r}")
        if weight_only and group_size is None:
            raise ValueError("weight_only must be False for int8 experts, got True: give a group_size for int4")
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_dim, intermediate_dim
        self.group_size, self.weight_only, self.activation = group_size, weight_only, activation
        dtype, pack = (torch.int8, 1) if group_size is None else (torch.uint8, 2)
        self.INTEGERS = dict.fromkeys(_WEIGHTS, dtype)  # type: ignore[misc]  # of this layer, not of its class
        for name, rows, k in (("gate_up_proj", 2 * intermediate_dim, hidden_dim), ("down_proj", hidden_dim, intermediate_dim)):
            groups = 1 if group_size is None else k // group_size
            self.register_buffer(name, torch.zeros(num_experts, rows, k // pack, dtype=dtype, device=device))
            self.register_buffer(f"{name}_scale", torch.ones(num_experts, rows, groups, dtype=torch.float32, device=device))

    @classmethod
    def from_experts(
        cls, experts: nn.Module, *, group_size: int | None = None, weight_only: bool = False, device: torch.device | str | int | None = None
    ) -> QuantizedExperts:
        """Quantize stacked experts, as transformers' MixtralExperts and Qwen3MoeExperts are. They stay where they are, or go to `device`.

        TypeError for a module that is not of that kind or computes something else; ValueError for a weight that is not finite.
        """
        activation = _check_experts(experts)
        gate_up, down = (getattr(experts, name).detach() for name in _WEIGHTS)
        where = gate_up.device if device is None else torch.device(device)
        self = cls(*down.shape, group_size=group_size, weight_only=weight_only, activation=activation, device=where)
        for name, weight in zip(_WEIGHTS, (gate_up, down), strict=True):
            for expert in range(self.num_experts):  # one at a time: all as float32 may be more than there is memory for
                values, scale = self._quantize(weight[expert].to(where))
                if not scale.is_meta and not bool(torch.isfinite(scale).all()):
                    raise ValueError(f"experts.{name} must be finite, got NaN or infinity in expert {expert}")
                getattr(self, name)[expert] = values
                getattr(self, f"{name}_scale")[expert] = scale
        return self.train(experts.training)

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_weight_int8(weight) if self.group_size is None else quantize_weight_int4(weight, self.group_size)

    def dequantized_weights(self) -> tuple[Tensor, Tensor]:
        """float32 gate and up [E, 2 I, K], and down [E, N, I]."""
        return dequantize_weight(self.gate_up_proj, self.gate_up_proj_scale), dequantize_weight(self.down_proj, self.down_proj_scale)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x [M, K] float32, bfloat16 or float16 -> [M, K] of the same dtype (autocast's, where autocast is on).

        top_k_index [M, k], int32 or int64: the experts chosen for each token; one that is not in [0, E) counts for nothing. top_k_weights [M, k].
        """
        x, device_type = hidden_states, hidden_states.device.type
        if not x.is_meta and torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        y: Tensor = ops.moe_experts(
            x, self.gate_up_proj, self.gate_up_proj_scale, self.down_proj, self.down_proj_scale, top_k_index, top_k_weights,
            activation=self.activation, weight_only=self.weight_only,
        )  # fmt: skip
        return y

    def extra_repr(self) -> str:
        kind = "int8" if self.group_size is None else f"int4 in groups of {self.group_size}"
        inputs = "as it is" if self.weight_only else "int8"
        sizes = f"num_experts={self.num_experts}, hidden_dim={self.hidden_dim}, intermediate_dim={self.intermediate_dim}"
        return f"{sizes}, activation={self.activation}, weight={kind}, input={inputs}"


def _check_sizes(num_experts: int, hidden_dim: int, intermediate_dim: int, group_size: int | None) -> None:
    sizes = {"num_experts": num_experts, "hidden_dim": hidden_dim, "intermediate_dim": intermediate_dim}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if hidden_dim > reference.MAX_K:
        raise ValueError(f"hidden_dim must be at most {reference.MAX_K}, or int32 could overflow; got {hidden_dim}")
    if group_size is None:
        return
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be None or one of {', '.join(map(str, GROUP_SIZES))}, got {group_size}")
    for name in ("hidden_dim", "intermediate_dim"):
        if sizes[name] % group_size:
            raise ValueError(f"{name} must be a multiple of group_size {group_size}, got {sizes[name]}")


def is_experts(module: nn.Module) -> bool:
    """Whether `module` looks like stacked experts of transformers: gate_up_proj and down_proj of three dimensions, and flags with them."""
    weights = [getattr(module, name, None) for name in _WEIGHTS]
    return all(isinstance(w, nn.Parameter) and w.ndim == 3 for w in weights) and all(hasattr(module, flag) for flag in _FLAGS)


def _check_experts(experts: nn.Module) -> str:
    """The name of the activation of stacked experts that QuantizedExperts can compute; TypeError otherwise."""
    kind = type(experts).__name__
    if not isinstance(experts, nn.Module) or not is_experts(experts):
        raise TypeError(f"experts must be stacked experts as transformers has them (gate_up_proj [E, 2 I, K], down_proj [E, K, I]), got {kind}")
    for flag, wanted in (_FLAGS | _LATER_FLAGS).items():
        if (actual := getattr(experts, flag, wanted)) is not wanted:
            raise TypeError(f"{kind} says {flag}={actual}, and {flag}={wanted} alone can be quantized")
    gate: Any = getattr(type(experts), "_apply_gate", None)
    if (getattr(gate, "__module__", None), getattr(gate, "__name__", None)) != ("transformers.integrations.moe", "_default_apply_gate"):
        raise TypeError(f"{kind} combines gate and up in a way of its own, not as act_fn(gate) * up")
    for name in _WEIGHTS:
        if (dtype := getattr(experts, name).dtype) not in reference.OUT_DTYPES:
            raise TypeError(f"experts.{name} must be one of {', '.join(map(str, reference.OUT_DTYPES))}, got {dtype}")
    gate_up, down = (list(getattr(experts, name).shape) for name in _WEIGHTS)
    if down != [gate_up[0], gate_up[2], gate_up[1] // 2] or gate_up[1] % 2:
        raise TypeError(f"{kind}: gate_up_proj [E, 2 I, K] and down_proj [E, K, I] do not go together, got {gate_up} and {down}")
    return _activation(experts)


def _activation(experts: nn.Module) -> str:
    """Which of EPILOGUES act_fn computes, found by its values: transformers has several classes for one function."""
    act_fn: Any = getattr(experts, "act_fn", None)
    x = torch.linspace(-_ACT_FN_RANGE, _ACT_FN_RANGE, _ACT_FN_STEPS)
    plain = callable(act_fn) and not (isinstance(act_fn, nn.Module) and any(True for _ in act_fn.parameters()))
    if plain:
        with torch.no_grad():
            y = act_fn(x)
        for name, epilogue in EPILOGUES.items():
            if torch.allclose(y, epilogue.eager(x), rtol=1e-6, atol=1e-6):
                return name
    raise TypeError(f"{type(experts).__name__}.act_fn must be one of {', '.join(EPILOGUES)}, got {act_fn!r}")
