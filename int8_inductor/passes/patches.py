"""The patch embedding beside int8 products: a convolution of patches that do not overlap, as the linear that it is.

    convolution(x [B, C, H, W], w [O, C, p, q], bias, stride=(p, q))   ->   addmm(bias, patches [B * H/p * W/q, C * p * q], w.view(O, -1).t())

The same products and sums, in the same dtype; nothing is quantized. cuDNN has no fast convolution of images whose channels do not fill 16 bytes: a
vision transformer's takes 230 us there (ViT-B/16, batch 32, bfloat16, on an H200), and 90 more for turning the image around and back, where all the
linears of a layer take 120 in int8. Graphs without an int8 product stay as they are, and so do convolutions that cuDNN does well. Each that is
rewritten has a line in the report.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops
from ..explain import PATCHES, REWRITTEN, Entry
from ..kernels import runs_triton
from .base import argument, aten, make, source_of, val

__all__ = ["embed_patches"]

ALIGNED = 8
"""Channels of 16 bits that a tensor core's convolution loads at a time."""


def embed_patches(graph: Graph) -> list[Entry]:
    """Rewrite every such convolution of a graph that has one of our products; an entry for each."""
    if not any(graph.find_nodes(op="call_function", target=target) for target in ops.OPERATORS):
        return []
    found = [node for node in graph.find_nodes(op="call_function", target=aten.convolution.default) if _is_patches(node)]
    return [_rewrite(graph, node) for node in found]


def _is_patches(node: Node) -> bool:
    """Whether a convolution is of whole patches beside one another, in 16 bits, with few channels, on a GPU."""
    given = {each.name: argument(node, each.name) for each in aten.convolution.default._schema.arguments}
    x, weight = val(given["input"]), val(given["weight"])
    if x.ndim != 4 or given["transposed"] or given["groups"] != 1 or any(given["padding"]) or any(each != 1 for each in given["dilation"]):
        return False
    patch, image = list(weight.shape[2:]), list(x.shape[2:])
    static = all(isinstance(size, int) for size in (*weight.shape, *x.shape[1:]))
    beside = static and list(given["stride"]) == patch and all(size % step == 0 for size, step in zip(image, patch, strict=True))
    slow = beside and x.shape[1] % ALIGNED != 0 and x.dtype in (torch.bfloat16, torch.float16) and runs_triton(x.device)
    return bool(slow) and weight.is_contiguous() and val(node).is_contiguous()


def _rewrite(graph: Graph, node: Node) -> Entry:
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    kernel, epilogue = ("aten.mm", "") if bias is None else ("aten.addmm", "bias")
    entry = Entry(PATCHES, node.name, REWRITTEN, kernel=kernel, epilogue=epilogue, source=source_of(node))
    outputs, channels, *patch = val(weight).shape
    rows, columns = (size // step for size, step in zip(val(x).shape[2:], patch, strict=True))

    def step(target: Any, *args: Any, **kwargs: Any) -> Node:
        return make(graph, node, target, *args, **kwargs)

    with graph.inserting_before(node):
        cut = step(aten.view.default, x, [-1, channels, rows, patch[0], columns, patch[1]])
        apart = step(aten.clone.default, step(aten.permute.default, cut, [0, 2, 4, 1, 3, 5]), memory_format=torch.contiguous_format)
        patches = step(aten.view.default, apart, [-1, channels * math.prod(patch)])
        flat = step(aten.permute.default, step(aten.view.default, weight, [outputs, -1]), [1, 0])
        product = step(aten.mm.default, patches, flat) if bias is None else step(aten.addmm.default, bias, patches, flat)
        image = step(aten.permute.default, step(aten.view.default, product, [-1, rows, columns, outputs]), [0, 3, 1, 2])
        node.replace_all_uses_with(step(aten.clone.default, image, memory_format=torch.contiguous_format))
    graph.erase_node(node)
    return entry
