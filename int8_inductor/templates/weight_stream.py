"""The stream template of int4 weights beside activations in floats, for few rows: the weight goes from memory into registers, and nowhere else.

A warp loads whole groups of the weight, 16 bytes a thread, and multiplies them as they lie: in the order along K in which its threads come to hold
them. Both operands of a product have that order, so the activation, which is small, is read to match, and no value of the weight is moved between
threads or through shared memory. Warps have groups of their own, and add up at the end. On an H200, against cuBLAS in bfloat16 (geometric mean over
Llama's shapes): 2.3 at M = 1 and 2.1 at 4, where the split template has 1.9 and 1.85.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .problem import Device, Problem
from .render import triton_template
from .tail import Tail, indented
from .weight_formats import Weight

__all__ = ["StreamConfig", "WeightStream"]


@dataclass(frozen=True)
class StreamConfig:
    """Tile sizes; warps, and the most groups that each of them loads at a time, all before any is multiplied: as much is under way as registers hold.

    ahead: whether the next step's are loaded before this one's products: memory does not wait for them, and fewer groups will do.
    """

    block_m: int
    block_n: int
    num_warps: int
    groups: int
    ahead: bool = False

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory in which warps add up."""
        return 4 * self.num_warps * self.block_m * self.block_n

    def groups_of(self, total: int) -> int:
        """How many groups a warp loads at a time, of so many in all: no more steps than the most would take, and those of one size."""
        steps = -(-total // (self.num_warps * self.groups))
        return -(-total // (self.num_warps * steps))


# On an H200, us, with the first, the third and the fourth: 1 x 6144 x 4096 7.5, 7.8, 8.6; 4 x 4096 x 4096 6.1, 6.7, 8.1; 1 x 28672 x 4096 21.7, 24.1,
# 21.1; 1 x 4096 x 14336 13.6 with the first.
CONFIGS = (
    StreamConfig(8, 16, 4, 8),
    StreamConfig(8, 16, 8, 8),
    StreamConfig(8, 16, 4, 2, ahead=True),
    StreamConfig(8, 16, 4, 2),
    StreamConfig(8, 32, 4, 2),
    StreamConfig(16, 32, 8, 2),
    StreamConfig(16, 32, 4, 1, ahead=True),
)
FEW_ROWS = 16
"""Up to so many rows of an activation."""
GROUP = 128
"""The length of a group: the four threads of a tensor core's row have 16 bytes of it each."""
SCALE_ROWS = 16
"""Scales of so many rows are loaded at a time: for fewer elements than threads Triton loads them where they are needed, else it moves them there."""

# joined: tensors of one stem side by side in further dimensions, in the order of their numbers.
_START = """
{% macro joined(stem, numbers) %}
{%- if numbers | length == 1 %}{{stem}}{{numbers[0]}}{% else %}tl.join({{joined(stem, numbers[::2])}}, {{joined(stem, numbers[1::2])}}){% endif %}
{%- endmacro %}
{{def_kernel(ARGUMENTS)}}
    M = {{size("A", 0)}}
    N = {{size("B", 0)}}
    K = {{size("A", 1)}}
    tile = tl.program_id(0).to(INDEX_DTYPE)
    grid_n = tl.cdiv(N, BLOCK_N)
    pid_m = tile // grid_n
    pid_n = tile % grid_n
    rm = pid_m * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX_DTYPE)
    ram = tl.where(rm < M, rm, 0)
    rbn = tl.where(rn < N, rn, 0)
    # Words of eight values: warp and row, word. With both in one dimension every Triton gives a warp the rows that it multiplies.
    warp = tl.arange(0, 8 * WARPS) // 8
    eighth = tl.arange(0, 8 * WARPS) % 8
    mine = (WARP_GROUPS * warp).to(INDEX_DTYPE)
{% for part in range(BLOCK_N // 8) %}
    row = pid_n * BLOCK_N + {{8 * part}} + eighth
    row = tl.where(row < N, row, 0).to(INDEX_DTYPE)
    b_words_{{part}} = B.to(tl.pointer_type(tl.int32)) + (row * ({{stride("B", 0)}} // 4) + mine * 16)[:, None] + tl.arange(0, 16)[None, :]
{% endfor %}
    # A warp's first group in each step.
    mine_of_warp = WARP_GROUPS * tl.arange(0, WARPS).to(INDEX_DTYPE)
{% for part in range(BLOCK_N // SCALE_ROWS) %}
    scale_row = pid_n * BLOCK_N + {{part}} * SCALE_ROWS + tl.arange(0, SCALE_ROWS)
    scale_row = tl.where(scale_row < N, scale_row, 0).to(INDEX_DTYPE)
    scales_{{part}} = B_SCALE + scale_row[None, :] * {{stride("B_SCALE", 0)}} + mine_of_warp[:, None] * {{stride("B_SCALE", 1)}}
{% endfor %}
    # What a thread's first words are multiplied with: warp and row, 8 values of each of the 4 threads; those of the next words are 8 further.
    each = tl.arange(0, 32)
{% for part in range(BLOCK_M // 8) %}
    a_row = pid_m * BLOCK_M + {{8 * part}} + eighth
    live_{{part}} = (a_row < M)[:, None]
    a_row = tl.where(a_row < M, a_row, 0).to(INDEX_DTYPE)
    a_values_{{part}} = A + (a_row * {{stride("A", 0)}} + mine * 128)[:, None] + ((each // 8) * 32 + each % 8)[None, :]
{% endfor %}
    sums = tl.zeros((WARPS, BLOCK_N, BLOCK_M), dtype=tl.float32)
"""

# NAME receives the words and scales of the groups from FIRST on, as many as there are.
_LOAD = """{% for r in range(WARP_GROUPS) %}
{% for part in range(BLOCK_N // 8) %}
NAME_{{r}}_{{part}} = tl.load(b_words_{{part}} + (FIRST + {{r}}) * 16WORDS_INSIDE, eviction_policy="evict_first")
{% endfor %}
{% for part in range(BLOCK_N // SCALE_ROWS) %}
NAME_scale_{{r}}_{{part}} = tl.load(scales_{{part}} + (FIRST + {{r}}) * {{stride("B_SCALE", 1)}}SCALES_INSIDE)
{% endfor %}
{% endfor %}"""
_WORDS_INSIDE = ", mask=(mine + {{r}} < K // 128 - FIRST)[:, None], other=0"
_SCALES_INSIDE = ", mask=(mine_of_warp + {{r}} < K // 128 - FIRST)[:, None], other=0.0"

# No assembler moves a load past this.
_FENCE = """tl.inline_asm_elementwise(
    "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [tl.arange(0, WARPS)], dtype=tl.int32, is_pure=False, pack=1
)"""

# Along K: word of a thread, i >> 1 & 1, thread, i & 1, i >> 2; nibble i is the value i of its word.
_PRODUCT = """{% for r in range(WARP_GROUPS) %}
{% if not EVEN_STEPS %}
inside = (mine + {{r}} < K // 128 - first)[:, None]
{% endif %}
{% for word in range(4) %}
{% for part in range(BLOCK_M // 8) %}
{% set live = "" if EVEN_M else "live_%d" % part %}
{% set inside = "" if EVEN_STEPS else "inside" %}
{% set mask = ", mask=%s, other=0.0" % [live, inside] | select | join(" & ") if live or inside else "" %}
a_{{word * (BLOCK_M // 8) + part}} = tl.load(a_values_{{part}} + (first + {{r}}) * 128 + {{8 * word}}{{mask}})
{% endfor %}
{% endfor %}
b = tl.reshape({{joined("now_%d_" % r, range(BLOCK_N // 8) | list)}}, (8 * WARPS, 16, BLOCK_N // 8))
CONVERT
w = tl.join(tl.join(tl.join(n0, n4), tl.join(n1, n5)), tl.join(tl.join(n2, n6), tl.join(n3, n7)))
w = tl.reshape(w, (WARPS, 8, 4, 4, BLOCK_N // 8, 2, 2, 2))
w = tl.reshape(tl.permute(w, (0, 4, 1, 3, 7, 2, 6, 5)), (WARPS, BLOCK_N, 128))
a = {{joined("a_", range(BLOCK_M // 2) | list)}}
a = tl.reshape(a, (WARPS, 8, 4, 2, 2, 2, 4, BLOCK_M // 8))
a = tl.reshape(tl.permute(a, (0, 6, 4, 2, 5, 3, 7, 1)), (WARPS, 128, BLOCK_M))
{% if BLOCK_N == SCALE_ROWS %}
scale = now_scale_{{r}}_0
{% else %}
scale = tl.reshape(tl.permute(tl.join(now_scale_{{r}}_0, now_scale_{{r}}_1), (0, 2, 1)), (WARPS, BLOCK_N))
{% endif %}
sums += tl.dot(w, a) * scale[:, :, None]
{% endfor %}"""


_LOOP = """{% if AHEAD %}
LOAD_FIRST
{% endif %}
for first in range(0, K // 128, WARPS * WARP_GROUPS):
{% if AHEAD %}
LOAD_NEXT
{% else %}
LOAD_NOW
{% endif %}
FENCE_HERE
PRODUCT
{% if AHEAD %}
TURN
{% endif %}
dot = tl.trans(tl.sum(sums, axis=0))"""

_TURN = """{% for r in range(WARP_GROUPS) %}
{% for part in range(BLOCK_N // 8) %}
now_{{r}}_{{part}} = next_{{r}}_{{part}}
{% endfor %}
{% for part in range(BLOCK_N // SCALE_ROWS) %}
now_scale_{{r}}_{{part}} = next_scale_{{r}}_{{part}}
{% endfor %}
{% endfor %}"""


def _load(name: str, first: str, always_masked: bool = False) -> str:
    """Statements that load a step of groups, those past the end masked where there are any."""
    masks = [_WORDS_INSIDE, _SCALES_INSIDE]
    if not always_masked:
        masks = [f"{{% if not EVEN_STEPS %}}{mask}{{% endif %}}" for mask in masks]
    return _LOAD.replace("WORDS_INSIDE", masks[0]).replace("SCALES_INSIDE", masks[1]).replace("NAME", name).replace("FIRST", first)


def _loop(ptx: bool) -> str:
    """The main loop, up to the tile `dot`."""
    loop = _LOOP
    parts = {
        "LOAD_FIRST": (_load("now", "0"), 0),
        "LOAD_NEXT": (_load("next", "(first + WARPS * WARP_GROUPS)", always_masked=True), 4),
        "LOAD_NOW": (_load("now", "first"), 4),
        "FENCE_HERE": (_FENCE if ptx else "", 4),
        "PRODUCT": (_PRODUCT.replace("CONVERT", Weight.convert_words(ptx)), 4),
        "TURN": (_TURN, 4),
    }
    for name, (text, spaces) in parts.items():
        loop = loop.replace(name, indented(text.splitlines(), spaces))
    return loop


@dataclass(eq=False)
class WeightStream:
    """The template for int4 beside floats; `configs`: best guesses first."""

    weight: Weight
    configs: tuple[StreamConfig, ...] = CONFIGS

    def is_legal(self, config: StreamConfig, problem: Problem, device: Device, tail: Tail) -> bool:
        """Whether `config` can be built for that problem: few rows of two bytes an element, whole groups of 128, all aligned."""
        whole = problem.groups == (GROUP,) and problem.static_k is not None and problem.static_k % GROUP == 0
        fits = config.shared_memory <= device.shared_memory and (tail.block_size is None or config.block_n % tail.block_size == 0)
        return whole and fits and problem.m <= FEW_ROWS and problem.a_bytes == 2 and problem.tma

    def candidates(self, problem: Problem, device: Device, tail: Tail, *, thorough: bool) -> list[StreamConfig]:
        """The configs worth timing: the lowest tiles that cover all rows."""
        legal = [config for config in self.configs if self.is_legal(config, problem, device, tail) and config.block_m >= problem.m]
        least = min((config.block_m for config in legal), default=0)
        return [config for config in legal if config.block_m == least]

    def source(self, tail: Tail) -> str:
        """The template's text with that tail, for Inductor to render."""
        start = _START.replace("ARGUMENTS", tail.signature(*self.weight.scales))
        return start + indented(_loop(tail.ptx).splitlines(), 4) + "\n" + tail.source(4)

    def template(self, tail: Tail) -> Any:
        """The TritonTemplate with that tail."""
        return triton_template(f"int8_inductor_{self.weight.name}_stream", "mm_grid", self.source(tail), tail)

    def constants(self, config: StreamConfig, problem: Problem, device: Device, tail: Tail) -> dict[str, object]:
        """The compile-time constants of a launch."""
        groups = config.groups_of(problem.k // GROUP)
        return {
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "WARPS": config.num_warps,
            "WARP_GROUPS": groups,
            "SCALE_ROWS": SCALE_ROWS,
            "AHEAD": config.ahead,
            "EVEN_M": problem.static_m is not None and problem.static_m % config.block_m == 0,
            "EVEN_STEPS": problem.static_k is not None and problem.static_k % (GROUP * config.num_warps * groups) == 0,
            "num_stages": 1,
            "num_warps": config.num_warps,
        }
