"""The two doors: `torch.compile(model, backend="int8_inductor")`, and `config.register_passes`, which puts the same passes into stock Inductor."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, get_origin

import torch
from torch._inductor import config as inductor_config

from . import config
from ._compat import CompileError, compile_region, custom_pass_slot, unchain
from .choices import with_own_choices
from .kernels import parse, runs_triton
from .launching import launches
from .passes import Int8Pass
from .passes.dialects.decomposed import choose_qparams_per_token

__all__ = ["OptionError", "int8_inductor"]

log = logging.getLogger("int8_inductor")

SLOT = "joint_custom_pre_pass"
"""Inductor's slot for passes over the joint graph, before its own: after them (freezing, pad_mm) the patterns are gone."""

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

OWN_OPTIONS: dict[str, Callable[[Any], Any]] = {"kernel_preference": parse}
"""Options of this backend beside Inductor's, and what checks each: it returns the value to use, or raises ValueError."""


class OptionError(CompileError):
    """A mode or an option given to torch.compile that this backend does not take."""


def _check_mode(mode: str | None) -> None:
    if mode is not None and mode not in MODES:
        raise OptionError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")


def _check_options(options: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ours, Inductor's), checked as torch.compile checks Inductor's own."""
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    known = inductor_config.get_config_copy()
    for key, value in (options or {}).items():
        name = key.replace("-", "_")
        if name in OWN_OPTIONS:
            try:
                ours[name] = OWN_OPTIONS[name](value)
            except ValueError as error:
                raise OptionError(f"option {error}") from None
            continue
        if name not in known:
            own = ", ".join(sorted(OWN_OPTIONS))
            raise OptionError(f"unknown option {key!r}: allowed are {own} and those of torch._inductor.list_options()")
        wanted = inductor_config.get_type(name)  # type: ignore[attr-defined]
        if isinstance(wanted, type) and wanted is not Any and get_origin(wanted) is None and not isinstance(value, wanted):
            raise OptionError(f"option {key!r} must be {wanted.__name__}, got {type(value).__name__} {value!r}")
        theirs[name] = value
    return ours, theirs


def _why_passes_are_off(patches: dict[str, Any]) -> str | None:
    """Why, with `patches` on top of Inductor's config, none of the joint-graph passes runs, or None when they do."""
    name = "use_joint_graph_passes"
    if patches.get(name, getattr(inductor_config, name)):
        return None
    return f"Inductor's option {name} is False (mode 'lite' sets it), and the passes of int8_inductor run among the joint-graph passes"


def int8_inductor(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    name: str | None = None,
) -> Any:
    """Compile a Dynamo graph with Inductor and the INT8 passes.

    mode: "default", "reduce-overhead", "max-autotune" or "max-autotune-no-cudagraphs", as for inductor.
    options: Inductor's, and `kernel_preference` ("auto", "triton", "torch" or a KernelPreference).
    name: of the compiled region, as for inductor.

    Raises:
        OptionError: a mode or option that is unknown, of the wrong type, or that turns the passes off.
        KernelPreferenceError: the kernel preference cannot be met on the graph's device.
        LeftBehindError: config.strict is on and something int8 was not rewritten.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    _check_mode(mode)
    ours, theirs = _check_options(options)
    patches = {**(list_mode_options(mode) if mode else {}), **theirs}
    if (why := _why_passes_are_off(patches)) is not None:
        raise OptionError(why)
    patches[SLOT] = _beside(patches.get(SLOT, inductor_config.joint_custom_pre_pass), Int8Pass(ours.get("kernel_preference")))
    return compile_fx(gm, list(example_inputs), config_patches=patches, **compile_region(name))


def _reset() -> None:
    """Dynamo calls this on torch._dynamo.reset(), as it does for inductor: drop recorded CUDA graphs."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


int8_inductor.reset = _reset  # type: ignore[attr-defined]


def _beside(slot: Any, own_pass: Int8Pass) -> Any:
    """The slot's passes with ours first, once."""
    return custom_pass_slot([own_pass, *(each for each in unchain(slot) if not isinstance(each, Int8Pass))])


def _int8_devices(gm: torch.fx.GraphModule) -> set[torch.device]:
    """The devices on which a graph holds int8."""
    values = [node.meta.get("example_value", node.meta.get("val")) for node in gm.graph.nodes]
    return {value.device for value in values if isinstance(value, torch.Tensor) and value.dtype == torch.int8}


class _Decompositions(dict[Any, Callable[..., Any]]):
    """A table of decompositions that pickles as its origin: Inductor puts it into the key of its cache, and some decompositions cannot be pickled."""

    def __reduce__(self) -> tuple[Callable[[], _Decompositions], tuple[()]]:
        return _decompositions, ()


def _decompositions() -> _Decompositions:
    """Inductor's, less those that turn a product with M = 1 into mul and sum, and one more for an operator whose meta function is wrong."""
    from torch._inductor.decomposition import select_decomp_table

    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
    table = _Decompositions((op, decomposition) for op, decomposition in select_decomp_table().items() if op not in products)
    if hasattr(torch.ops.quantized_decomposed, "choose_qparams_per_token"):  # there once torch.ao.quantization was imported
        table[torch.ops.quantized_decomposed.choose_qparams_per_token.default] = choose_qparams_per_token
    return table


def install_in_stock_inductor() -> None:
    """Wrap Inductor's compile_fx, so that it asks at each compilation whether the passes are to run, and compiles for them where they are.

    The slot alone would not do: a custom pass that the user sets after config.register_passes would overwrite ours. Here the slot is read when a
    graph is compiled, so that the user's passes stand whenever they were set, and nothing is left behind when the flag is off.
    """
    from torch._inductor import compile_fx as module

    stock = module.compile_fx
    if getattr(stock, "_int8_inductor", False):
        return
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def compile_fx(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        if call.arguments.get("config_patches"):
            return stock(*args, **kwargs)  # it puts them in force and calls this function again
        if any(isinstance(each, Int8Pass) for each in unchain(inductor_config.joint_custom_pre_pass)):
            return _compile_int8(stock, call)
        if config.register_passes and _passes_run():
            call.arguments["config_patches"] = {SLOT: _beside(inductor_config.joint_custom_pre_pass, Int8Pass())}
        return stock(*call.args, **call.kwargs)

    compile_fx._int8_inductor = True  # type: ignore[attr-defined]
    module.compile_fx = compile_fx


def _compile_int8(stock: Callable[..., Any], call: inspect.BoundArguments) -> Any:
    """Inductor's compile_fx, with the passes in force."""
    model = call.arguments["model_"]
    devices = _int8_devices(model) if isinstance(model, torch.fx.GraphModule) else set()
    if devices and call.arguments.get("decompositions") is None:
        call.arguments["decompositions"] = _decompositions()
    with with_own_choices(triton=any(map(runs_triton, devices))), launches(devices):
        return stock(*call.args, **call.kwargs)


def _passes_run() -> bool:
    """Whether Inductor runs joint-graph passes; where it does not, the flag register_passes is of no effect, which a warning says."""
    why = _why_passes_are_off({})
    if why is None:
        return True
    if config.strict:
        raise OptionError(why)
    log.warning("nothing was rewritten: %s", why)
    return False
