"""`python -m benchmarks.experts`: a layer of experts in int8 and int4 against torch._grouped_mm, each result checked beside its time."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from int8_inductor.experts import layouts, ops

from . import common, plot, tables
from .common import ERROR, OK, REFUSED, WRONG, Budget, say
from .roofline import floor_ms
from .timing import rotation, time_call, time_graph

CHECKED_TOKENS = 64
"""How many tokens of a result are checked: the reference is a loop over their experts."""
COSINE = {"w8a8": 0.9998, "w4a8": 0.9998, "w4a16": 0.9999, "float": 0.9999}
"""Least cosine to the same weights, dequantized, in float32 arithmetic."""
LOW_BITS = {"w8a8": 8, "w4a8": 4, "w4a16": 4}

Routed = tuple[Tensor, Tensor, Tensor]
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
Weights = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A layer of `experts` experts, `slots` of them a token, between `hidden` and `inner` columns; int4 in groups of `group`."""

    tokens: int
    experts: int
    slots: int
    hidden: int
    inner: int
    group: int = 128

    @property
    def sizes(self) -> str:
        return f"{self.experts} experts, top {self.slots}, {self.hidden} x {self.inner}"

    @property
    def label(self) -> str:
        return f"{self.sizes}, {self.tokens} tokens"

    @property
    def operations(self) -> int:
        return 6 * self.tokens * self.slots * self.hidden * self.inner

    def bytes_moved(self, layout: str, float_bytes: int, active: int) -> int:
        """Fewest bytes: the weights of the active experts, and their scales, read once; input, hidden values and output once each way."""
        weights = 3 * self.hidden * self.inner
        bits = LOW_BITS.get(layout, 8 * float_bytes)
        scales = 4 * weights // self.group if layout.startswith("w4") else 4 * (2 * self.inner + self.hidden) if layout == "w8a8" else 0
        return active * (weights * bits // 8 + scales) + 2 * self.tokens * self.hidden * float_bytes


def _cases(*tokens: int, sizes: tuple[int, ...]) -> tuple[Case, ...]:
    return tuple(Case(each, *sizes) for each in tokens)


QWEN, MIXTRAL = (256, 8, 2048, 512), (8, 2, 4096, 14336)
CASE_SETS: dict[str, tuple[Case, ...]] = {
    "table": (*_cases(1, 64, 1024, 4096, sizes=QWEN), *_cases(1, 16, 1024, 4096, sizes=MIXTRAL)),
    "qwen": _cases(1, 4, 16, 64, 256, 1024, 4096, 8192, sizes=QWEN),
    "small": tuple(Case(tokens, 4, 2, 64, 64, 32) for tokens in (1, 7)),
}


@dataclass(frozen=True)
class Peer:
    """One way to compute a layer: `layout` says which weights it takes, `build` what computes with them."""

    name: str
    group: str
    layout: str
    build: Callable[[tuple[Tensor, ...]], Layer]
    compiles: bool = False


def _ours(weight_only: bool = False) -> Callable[[tuple[Tensor, ...]], Layer]:
    def build(weights: tuple[Tensor, ...]) -> Layer:
        return lambda x, index, routing: ops.moe_experts(x, *weights, index, routing, weight_only=weight_only)

    return build


def _grouped_mm(weights: tuple[Tensor, ...]) -> Layer:
    """What transformers runs: sort, gather, two grouped products, weights, and the sum, without a wait for the device."""
    gate_up, down = (weight.transpose(-2, -1) for weight in weights)
    count = len(gate_up)

    def layer(x: Tensor, index: Tensor, routing: Tensor) -> Tensor:
        expert, order = torch.sort(index.reshape(-1))
        per_expert = torch.histc(expert.float() if x.device.type == "cpu" else expert.int(), bins=count, min=0, max=count - 1)
        offs = torch.cumsum(per_expert, 0, dtype=torch.int32)
        gate, up = torch._grouped_mm(x[order // index.shape[1]], gate_up, offs=offs).chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, down, offs=offs) * routing.reshape(-1)[order, None]
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=x.device)
        return y[place].reshape(*index.shape, -1).sum(1).to(x.dtype)

    return layer


def _compiled(weights: tuple[Tensor, ...]) -> Layer:
    compiled: Layer = torch.compile(_grouped_mm(weights), dynamic=False)
    return compiled


PEERS = (
    Peer("ours-w4a8", "ours", "w4a8", _ours()),
    Peer("ours-w8a8", "ours", "w8a8", _ours()),
    Peer("ours-w4a16", "ours", "w4a16", _ours(weight_only=True)),
    Peer("grouped-mm-eager", "stock", "float", _grouped_mm),
    Peer("grouped-mm-compiled", "stock", "float", _compiled, compiles=True),
)


def draw_weights(case: Case, device: torch.device) -> Weights:
    """The same experts in every layout; `float` holds what the int4 ones dequantize to."""
    dtype, rows = common.float_dtype(device), ((2 * case.inner, case.hidden), (case.hidden, case.inner))
    parts: dict[str, list[Tensor]] = {"w8a8": [], "w4a8": [], "float": []}
    for n, k in rows:
        weight = [torch.randn(n, k, device=device) / k**0.5 for _ in range(case.experts)]
        packed, int8 = (
            [quantize(each) for each in weight] for quantize in (lambda w: layouts.quantize_weight_int4(w, case.group), layouts.quantize_weight_int8)
        )
        for name, each in (("w4a8", packed), ("w8a8", int8)):
            parts[name] += [torch.stack(part) for part in zip(*each, strict=True)]
        parts["float"].append(torch.stack([layouts.dequantize_weight(*each).to(dtype) for each in packed]))
    return {name: tuple(each) for name, each in parts.items()} | {"w4a16": tuple(parts["w4a8"])}


def draw_routed(case: Case, device: torch.device) -> Routed:
    """Tokens, and for each the experts with the largest of random logits, weighted by their softmax."""
    dtype = common.float_dtype(device)
    logits, index = torch.randn(case.tokens, case.experts, device=device).topk(case.slots)
    return torch.randn(case.tokens, case.hidden, device=device).to(dtype), index, logits.softmax(-1).to(dtype)


def cosine(case: Case, layout: str, weights: tuple[Tensor, ...], routed: Routed, got: Tensor) -> float:
    """Of the first tokens to the same weights in float32 arithmetic."""
    x, index, routing = (t[:CHECKED_TOKENS] for t in routed)
    want = torch.zeros(len(x), case.hidden, device=x.device)
    gate_up, down = weights[:2] if layout == "float" else (weights[:2], weights[2:])
    for expert in index.unique().tolist():
        both, last = (
            each[expert].float() if isinstance(each, Tensor) else layouts.dequantize_weight(*(t[expert] for t in each)) for each in (gate_up, down)
        )
        token, slot = (index == expert).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ both.t()).chunk(2, -1)
        want.index_add_(0, token, (F.silu(gate) * up) @ last.t() * routing[token, slot, None].float())
    return float(F.cosine_similarity(got[:CHECKED_TOKENS].double().flatten(), want.double().flatten(), 0))


def measure(peer: Peer, case: Case, weights: tuple[Tensor, ...], sets: list[Routed], device: torch.device) -> dict[str, Any]:
    """Build, check, time: the measured part of a row."""
    start = time.monotonic()
    layer = peer.build(weights)
    got = layer(*sets[0])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    row: dict[str, Any] = {"first_call_s": time.monotonic() - start, "cosine": cosine(case, peer.layout, weights, sets[0], got)}
    if not row["cosine"] >= COSINE[peer.layout]:
        return row | {"status": WRONG, "reason": f"cosine {row['cosine']:.6f} is below {COSINE[peer.layout]}"}
    timing = time_call(lambda: layer(*sets[0]), device)
    if device.type == "cuda":
        timing = time_graph(layer, sets, timing.ms)
    return row | {"status": OK, "reason": None} | timing.record()


def run_peer(peer: Peer, place: tuple[int, int], case: Case, weights: Weights, sets: list[Routed], device: torch.device) -> dict[str, Any]:
    """One row: what a peer did with a case, whatever it was."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    active = len(sets[0][1].unique())
    floor = floor_ms(name, case.operations, case.bytes_moved(peer.layout, common.FLOAT_BYTES[common.dtype_name(device)], active))
    row: dict[str, Any] = {
        "workload": case.label, "variant": peer.name, "group": peer.group, "workload_index": place[0], "variant_index": place[1],
        "label": f"{case.label}, {peer.name}", "layout": peer.layout, "tokens": case.tokens, "active": active, "floor_ms": floor, "ms": None,
    }  # fmt: skip
    if peer.compiles and device.type != "cuda":
        return row | {"status": REFUSED, "reason": "is measured on a GPU alone"}
    torch._dynamo.reset()
    try:
        row |= measure(peer, case, weights[peer.layout], sets, device)
    except common.peer_errors() as error:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return row | {"status": ERROR, "reason": common.one_line(error)}
    row["roofline_share"] = floor / row["ms"] if floor is not None and row["ms"] is not None else None
    return row


def run(cases: list[Case], peers: list[Peer], device: torch.device, budget: Budget, path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """All peers on all cases, until the budget is spent; the result is written after every case. Cases of one size share their weights."""
    result: dict[str, Any] = {"kind": "experts", "environment": record, "float": common.dtype_name(device), "rows": [], "left_out": []}
    drawn: tuple[str, Weights] = ("", {})
    with torch.no_grad():
        for index, case in enumerate(cases):
            if budget.spent():
                result["left_out"] = [each.label for each in cases[index:]]
                say(f"{budget.seconds:.0f} s are spent: {len(result['left_out'])} cases left out")
                break
            if drawn[0] != case.sizes:
                drawn = ("", {})  # the old ones go before the new ones come
                drawn = (case.sizes, draw_weights(case, device))
            moved = case.bytes_moved("w4a8", 2, min(case.experts, case.tokens * case.slots))
            sets = [draw_routed(case, device) for _ in range(rotation(moved, device) if device.type == "cuda" else 1)]
            rows = [run_peer(peer, (index, i), case, drawn[1], sets, device) for i, peer in enumerate(peers)]
            result["rows"] += rows
            cells = [f"{row['variant']} {row['ms'] * 1e3:.1f}" if row["ms"] is not None else f"{row['variant']} {row['status']}" for row in rows]
            say(f"[{budget.elapsed:5.0f} s] {case.label} us: {', '.join(cells)}")
            common.write_json(path, result)
    result["seconds"] = budget.elapsed
    common.write_json(path, result)
    return result


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__)
    parser.add_argument("--cases", choices=list(CASE_SETS), help="a set of cases (default: table on a GPU, small on the CPU)")
    parser.add_argument("--peers", help=f"comma-separated, from {', '.join(peer.name for peer in PEERS)} (default: all)")
    common.add_arguments(parser, seconds=180)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, peers: tuple[Peer, ...] = PEERS) -> int:
    """Run, print the table, write JSON and PNG. 1 when any result was wrong or failed."""
    argv = common.program(argv)
    options = arguments(argv)
    device = torch.device(options.device)
    cases = CASE_SETS[options.cases or ("table" if device.type == "cuda" else "small")]
    names = common.choose(options.peers, [peer.name for peer in peers], "--peers")
    budget = Budget(options.seconds)
    record = common.environment(device, "benchmarks.experts", argv, options.commit)
    path = common.result_path("experts", record, options.out)
    result = run(list(cases), [peer for peer in peers if peer.name in names], device, budget, path, record)
    plot.draw(path)
    say(tables.text(*tables.experts(result)))
    say("\n".join(tables.left_out(result, "label")))
    say(f"wrote {path.name} and {path.with_suffix('.png').name} in {budget.elapsed:.0f} s")
    return common.exit_code(result["rows"])


if __name__ == "__main__":
    sys.exit(main())
