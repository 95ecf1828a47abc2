"""The kernels of one call, in order. Sizes of launches depend on the shapes alone: nothing waits for the device, and CUDA graphs can record it."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ..templates.problem import INTERPRETER
from . import configs, kernels
from .layouts import is_int4
from .reference import ACT_BLOCK

__all__ = ["moe_experts", "scaled_grouped_mm"]

PAIRS, COMPARISONS = 256, 16384
"""Pairs that a program of `place` puts in their place; comparisons of tiles with experts that a program makes."""
COMBINE_COLUMNS = 1024
GROUP_M = 8
"""Tiles of rows that share tiles of weights in scaled_grouped_mm."""
ALIGNMENT = 16
"""Bytes of which Triton wants to know whether a tensor begins at a multiple of them."""


def _power(n: int) -> int:
    return int(triton.next_power_of_2(n))


def _most_tiles(rows: int, experts: int, block_m: int) -> int:
    """The most tiles of block_m rows that so many rows of so many experts can make."""
    return min(rows, rows // block_m + experts)


def _experts_and_tiles(experts: int) -> tuple[int, int]:
    """For the kernels that cut rows into tiles: a power of 2 that covers the experts, and how many tiles a program takes."""
    power = max(_power(experts), 16)
    return power, max(COMPARISONS // power, 1)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block can have."""
    if device.type == "cpu":
        return INTERPRETER.shared_memory
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@functools.cache
def _hopper(device: torch.device) -> bool:
    """Whether programs are made for Hopper's tensor cores; Triton's interpreter takes what they do."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] == 9


def _tile(config: configs.GroupedConfig, rows: int, columns: int, group: int, activation: Tensor, weight: Tensor) -> dict[str, Any]:
    """`config` as launch constants, for `rows` rows of weights and `columns` of activations a step, in the shared memory that there is."""
    int4 = is_int4(weight)
    block_k = configs.step_int4(group) if int4 else configs.BLOCK_K
    bytes_of_k = rows / (2 if int4 else 1) + columns * activation.element_size()
    fitted = configs.fitted(config, int(block_k * bytes_of_k), _shared_memory(weight.device))
    return {
        "BLOCK_N": fitted.block_n, "BLOCK_K": block_k,
        "num_warps": fitted.num_warps, "num_stages": fitted.num_stages, "maxnreg": fitted.registers,
    }  # fmt: skip


_COMPILED: dict[tuple[Any, ...], Any] = {}
"""What was launched -> the compiled kernel."""


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """Launch a kernel with its arguments and then, by name and in the kernel's order, its constants.

    Triton's own launcher takes 30 us for so many constants, which is more than these kernels run for a few tokens. Here it compiles, and
    afterwards the compiled kernel is found by what it was compiled for: types, alignment of the tensors, and constants.
    """
    if not isinstance(kernel, triton.JITFunction):
        kernel[grid](*args, **constants)  # Triton's interpreter
        return
    kinds = tuple((each.dtype, each.data_ptr() % ALIGNMENT == 0) if isinstance(each, Tensor) else None for each in args)
    key = (kernel.__name__, args[0].device, kinds, num_warps, num_stages, maxnreg, *constants.values())
    if (compiled := _COMPILED.get(key)) is None:
        _COMPILED[key] = kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)
    else:
        compiled[(*grid, 1, 1)[:3]](*args, *constants.values())


def _prepare(x: Tensor, top_k_index: Tensor, experts: int, *, int4: bool, int8_x: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x as the products take it and its scales; how many pairs each expert has, and each pair's place among them."""
    (tokens, k), slots, half = x.shape, top_k_index.shape[1], _power(triton.cdiv(x.shape[1], 2))
    q, q_scale = torch.empty_like(x, dtype=torch.int8 if int8_x else x.dtype), torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    counts = torch.zeros(experts, dtype=torch.int32, device=x.device)
    rank = torch.empty(tokens * slots, dtype=torch.int32, device=x.device)
    _launch(
        kernels.prepare, (tokens,), (x, q, q_scale, top_k_index, counts, rank),
        K=k, E=experts, TOP_K=slots, SLOTS=_power(slots), HALF=half, SPLIT=int4, INT8_X=int8_x, PTX=x.device.type == "cuda",
        num_warps=4 if half <= 2048 else 8,
    )  # fmt: skip
    return q, q_scale, counts, rank


def _sort(counts: Tensor, rank: Tensor, top_k_index: Tensor, block_m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs sorted by expert, where each expert's end, and expert and first place of each tile: int32."""
    (experts,), pairs, device = counts.shape, rank.numel(), counts.device
    most = _most_tiles(pairs, experts, block_m)
    order, ends = torch.empty(pairs, dtype=torch.int32, device=device), torch.empty_like(counts)
    tile_expert, tile_first = (torch.empty(most, dtype=torch.int32, device=device) for _ in range(2))
    power, tiles = _experts_and_tiles(experts)
    programs = max(triton.cdiv(pairs, PAIRS), triton.cdiv(most, tiles))
    _launch(
        kernels.place, (programs,), (top_k_index, counts, rank, order, ends, tile_expert, tile_first, pairs, most),
        E=experts, EXPERTS=power, BLOCK_M=block_m, PAIRS=PAIRS, TILES=tiles, num_warps=8,
    )  # fmt: skip
    return order, ends, tile_expert, tile_first


def moe_experts(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    activation: str,
    weight_only: bool,
) -> Tensor:
    """See ops.py."""
    (tokens, k), slots, (experts, n, _), inner = x.shape, top_k_index.shape[1], down.shape, gate_up.shape[1] // 2
    if tokens == 0:
        return x.new_empty(0, n)
    x, top_k_index, top_k_weights = x.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous()
    int4, int8_x, pairs, ptx = is_int4(gate_up), not weight_only, tokens * slots, x.device.type == "cuda"
    q, q_scale, counts, rank = _prepare(x, top_k_index, experts, int4=int4, int8_x=int8_x)
    groups = k // gate_up_scale.shape[2], inner // down_scale.shape[2]
    tight = _hopper(x.device) and not (int4 and min(groups) < configs.LEAST_STEP)
    config = configs.choose(gate_up.dtype, q.dtype, pairs, experts, tight=tight)
    block_m = config.block_m
    schedule = _sort(counts, rank, top_k_index, block_m)
    tiles = schedule[-1].numel()
    hidden = torch.empty(pairs, inner, dtype=q.dtype, device=x.device)
    hidden_scale = torch.empty(pairs, triton.cdiv(inner, ACT_BLOCK), dtype=torch.float32, device=x.device)
    tile = _tile(config.gate_up, 2 * config.gate_up.block_n, block_m, groups[0], q, gate_up)
    _launch(
        kernels.gate_up, (tiles * triton.cdiv(inner, config.gate_up.block_n),),
        (q, q_scale, gate_up, gate_up_scale, hidden, hidden_scale, *schedule),
        K=k, INNER=inner, GROUP=groups[0], TOP_K=slots, INT4=int4, INT8_X=int8_x, ACTIVATION=getattr(kernels, activation), PTX=ptx,
        GROUP_M=config.group_m, PARTS=config.gate_up.parts, BLOCK_M=block_m, **tile,
    )  # fmt: skip

    y = torch.empty(pairs, n, dtype=x.dtype, device=x.device)
    tile = _tile(config.down, config.down.block_n, block_m, groups[1], q, down)
    _launch(
        kernels.down, (tiles * triton.cdiv(n, config.down.block_n),), (hidden, hidden_scale, down, down_scale, y, top_k_weights, *schedule),
        N=n, K=inner, GROUP=groups[1], H_BLOCK=ACT_BLOCK, INT4=int4, INT8_X=int8_x, PTX=ptx,
        GROUP_M=config.group_m, PARTS=config.down.parts, BLOCK_M=block_m, **tile,
    )  # fmt: skip
    return _combine(y, top_k_index, experts)


def _combine(y: Tensor, top_k_index: Tensor, experts: int) -> Tensor:
    """[tokens, N] from the weighted results of pairs [tokens * slots, N]."""
    (tokens, slots), n = top_k_index.shape, y.shape[1]
    out, block_n = y.new_empty(tokens, n), min(_power(n), COMBINE_COLUMNS)
    _launch(kernels.combine, (tokens, triton.cdiv(n, block_n)), (y, top_k_index, out), N=n, E=experts, TOP_K=slots, BLOCK_N=block_n)
    return out


def scaled_grouped_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, offs: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """See ops.py."""
    (rows, k), (experts, n, _) = a.shape, b.shape
    y = torch.empty(rows, n, dtype=out_dtype, device=a.device)
    if rows == 0:
        return y
    a, a_scale, b_scale, offs = a.contiguous(), a_scale.contiguous(), b_scale.contiguous(), offs.contiguous()
    block_m, config = configs.choose_grouped(rows, experts)
    most = _most_tiles(rows, experts + 1, block_m)
    ends = torch.empty(experts + 1, dtype=torch.int32, device=a.device)
    tile_expert, tile_first = (torch.empty(most, dtype=torch.int32, device=a.device) for _ in range(2))
    power, tiles = _experts_and_tiles(experts + 1)
    _launch(
        kernels.schedule, (triton.cdiv(most, tiles),), (offs, ends, tile_expert, tile_first, rows, most),
        E=experts, EXPERTS=power, BLOCK_M=block_m, TILES=tiles, num_warps=8,
    )  # fmt: skip
    tile = _tile(config, config.block_n, block_m, k, a, b)
    _launch(
        kernels.grouped, (most * triton.cdiv(n, config.block_n),), (a, a_scale, b, b_scale, y, ends, tile_expert, tile_first),
        N=n, K=k, E=experts, A_SCALE_STEP=int(a_scale.numel() > 1), GROUP_M=GROUP_M, BLOCK_M=block_m, **tile,
    )  # fmt: skip
    return y
