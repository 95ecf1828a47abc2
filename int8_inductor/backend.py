"""The two doors: `torch.compile(model, backend="int8_inductor")`, and `config.register_passes`, which puts the same passes into stock Inductor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import config as inductor_config

from . import config
from ._compat import custom_pass_slot, unchain
from .kernels import parse
from .passes import Int8Pass

__all__ = ["int8_inductor"]

SLOT = "joint_custom_pre_pass"
"""Inductor's slot for passes over the joint graph, before its own: after them (freezing, pad_mm) the patterns are gone."""

OWN_OPTIONS: dict[str, Callable[[Any], Any]] = {"kernel_preference": parse}
"""Options of this backend beside Inductor's, and what checks each."""


def _check_options(options: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ours, Inductor's), checked as torch.compile checks Inductor's own."""
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    known = inductor_config.get_config_copy()
    for key, value in (options or {}).items():
        name = key.replace("-", "_")
        if name in OWN_OPTIONS:
            ours[name] = OWN_OPTIONS[name](value)
            continue
        if name not in known:
            own = ", ".join(sorted(OWN_OPTIONS))
            raise RuntimeError(f"Unexpected optimization option {key}, known options are {own} and those of torch._inductor.list_options()")
        wanted = inductor_config.get_type(name)
        if isinstance(wanted, type) and not isinstance(value, wanted):
            raise RuntimeError(f"Unexpected type of attr {key}, got {type(value).__name__} should be {wanted.__name__}")
        theirs[name] = value
    return ours, theirs


def int8_inductor(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Any:
    """Compile a Dynamo graph with Inductor and the INT8 passes.

    mode: "default", "reduce-overhead", "max-autotune" or "max-autotune-no-cudagraphs", as for inductor.
    options: Inductor's, and `kernel_preference` ("auto", "triton", "torch" or a KernelPreference). Unknown ones raise RuntimeError.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    ours, theirs = _check_options(options)
    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **theirs}
    own_pass = Int8Pass(ours.get("kernel_preference"))
    patches[SLOT] = _beside(patches.get(SLOT, inductor_config.joint_custom_pre_pass), own_pass)
    return compile_fx(gm, list(example_inputs), config_patches=patches, **_decompositions(gm, patches))


def _beside(slot: Any, own_pass: Int8Pass) -> Any:
    """The slot's passes with ours first, once."""
    return custom_pass_slot([own_pass, *(each for each in unchain(slot) if not isinstance(each, Int8Pass))])


def _holds_int8(gm: torch.fx.GraphModule) -> bool:
    for node in gm.graph.nodes:
        value = node.meta.get("example_value", node.meta.get("val"))
        if isinstance(value, torch.Tensor) and value.dtype == torch.int8:
            return True
    return False


def _decompositions(gm: torch.fx.GraphModule, patches: dict[str, Any]) -> dict[str, Any]:
    """compile_fx's decompositions without those that turn a product with M = 1 into mul and sum, where there is int8 to match."""
    from torch._inductor.decomposition import select_decomp_table

    if not _holds_int8(gm):
        return {}
    with inductor_config.patch({key: value for key, value in patches.items() if key != SLOT}):
        table = dict(select_decomp_table())
    for op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
        table.pop(op, None)
    return {"decompositions": table}


def install_in_stock_inductor() -> None:
    """Let Inductor's compile_fx ask, at each compilation, whether config.register_passes is on.

    The slot alone would not do: a custom pass that the user sets afterwards would overwrite ours. Here the slot is read when a graph is
    compiled, so that the user's passes stand whenever they were set, and nothing is left behind when the flag is off.
    """
    from torch._inductor import compile_fx as module

    stock = module.compile_fx
    if getattr(stock, "_int8_inductor", False):
        return

    @functools.wraps(stock)
    def compile_fx(model_: Any, example_inputs_: Any, *args: Any, **kwargs: Any) -> Any:
        patches = dict(kwargs.get("config_patches") or {})
        slot = patches.get(SLOT, inductor_config.joint_custom_pre_pass)
        if not config.register_passes or any(isinstance(each, Int8Pass) for each in unchain(slot)):
            return stock(model_, example_inputs_, *args, **kwargs)
        patches[SLOT] = _beside(slot, Int8Pass())
        if isinstance(model_, torch.fx.GraphModule) and "decompositions" not in kwargs and len(args) < 3:
            kwargs |= _decompositions(model_, patches)
        return stock(model_, example_inputs_, *args, **{**kwargs, "config_patches": patches})

    compile_fx._int8_inductor = True  # type: ignore[attr-defined]
    module.compile_fx = compile_fx


