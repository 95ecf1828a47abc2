"""The only module that knows torch versions apart (2.11 to 2.15) and names torch's private parts.

Everything else imports what it needs of Inductor's internals from here, under one name whatever the version.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch._dynamo.exc import ShortenTraceback
from torch._inductor.custom_graph_pass import CustomGraphPass

__all__ = [
    "SUPPORTED_TORCH",
    "CompileError",
    "as_pass_list",
    "check_torch_version",
    "compile_region",
    "custom_pass_slot",
    "fastest",
    "graph_breaks",
    "has_triton_package",
    "hints",
    "launched_as_dependents",
    "real_tensors",
    "run_apart",
    "run_of",
    "size_hint",
    "triton_version",
    "unchain",
    "without_modes",
    "writes_python",
]

SUPPORTED_TORCH = ((2, 11), (2, 15))
"""First and last torch release (major, minor) that the package is tested with."""


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def check_torch_version(version: str = torch.__version__) -> None:
    """Raise ImportError when `version` is outside SUPPORTED_TORCH."""
    first, last = SUPPORTED_TORCH
    if not first <= _release(version) <= last:
        raise ImportError(
            f"int8_inductor supports torch {first[0]}.{first[1]} to {last[0]}.{last[1]}, got torch {version}: install a release in that range"
        )


class CompileError(ShortenTraceback):
    """A RuntimeError in a compilation that torch.compile hands to its caller as it is, not inside a BackendCompilerFailed."""

    def __init__(self, message: str) -> None:
        here = inspect.currentframe()
        super().__init__(message, first_useful_frame=None if here is None else here.f_back)


def compile_region(name: str | None) -> dict[str, Any]:
    """The keyword argument by which compile_fx takes the `name` given to torch.compile (2.15); earlier there is none."""
    return {} if name is None else {"compile_region_name": name}


def run_apart(fn: Callable[..., Any], backend: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`fn(*args, **kwargs)`, compiled anew with `backend`, so that nothing compiled before or after is changed by it.

    No cache is read or written, automatic dynamic shapes learn nothing from it, and it counts towards nobody's recompile limit: compiled code
    belongs to a code object, so `fn` is inlined into a function whose code is new, and what a graph break leaves of `fn` is compiled in a region
    of its own (from 2.13 on; in 2.11 it counts).
    """
    from torch._dynamo import config as dynamo_config
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config

    def call(fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return fn(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    isolated = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    no_limit = 2**31 - 1
    compile_: Any = torch.compile
    with (
        dynamo_config.patch(recompile_limit=no_limit, accumulated_recompile_limit=no_limit),
        functorch_config.patch(enable_autograd_cache=False),
        inductor_config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        _forgotten_shapes(),
    ):
        return compile_(call, backend=backend, **isolated)(fn, args, kwargs)


@contextmanager
def _forgotten_shapes() -> Iterator[None]:
    """What automatic dynamic shapes have seen is unknown inside the block, and what they see there is forgotten after it."""
    from torch._dynamo import config as dynamo_config
    from torch._dynamo import pgo

    seen = pgo._CODE_STATE
    pgo._CODE_STATE = defaultdict(pgo.CodeState)
    try:
        with dynamo_config.patch(automatic_dynamic_local_pgo=False, automatic_dynamic_remote_pgo=False):
            yield
    finally:
        pgo._CODE_STATE = seen


def graph_breaks() -> Counter[str]:
    """How often Dynamo has broken a graph in this process, by reason."""
    from torch._dynamo.utils import counters

    return Counter({reason.splitlines()[0]: count for reason, count in counters["graph_break"].items()})


def has_triton_package() -> bool:
    """Whether the triton package can be imported."""
    return find_spec("triton") is not None


def as_pass_list(slot: Any) -> list[Callable[[torch.fx.Graph], Any]]:
    """What one of Inductor's custom pass slots holds, as a list: None, one pass (2.11) or a sequence of them (2.13)."""
    if slot is None:
        return []
    if isinstance(slot, Sequence):
        return list(slot)
    return [slot]


class _Chain(CustomGraphPass):
    """Several passes in a slot that takes one. Its uuid is theirs; one without a uuid turns the cache off, as it would alone."""

    def __init__(self, passes: Sequence[Callable[[torch.fx.Graph], Any]]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: torch.fx.Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any | None:
        uuids = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes]
        return None if None in uuids else tuple(uuids)


def custom_pass_slot(passes: Sequence[Callable[[torch.fx.Graph], Any]]) -> Any:
    """A value for a custom pass slot that runs `passes` in order, in every supported torch."""
    chain: list[Callable[[torch.fx.Graph], Any]] = []
    for each in passes:
        chain.extend(each.passes if isinstance(each, _Chain) else [each])
    return chain[0] if len(chain) == 1 else _Chain(chain)


def unchain(slot: Any) -> list[Callable[[torch.fx.Graph], Any]]:
    """The single passes in a slot, chains made by `custom_pass_slot` taken apart."""
    flat: list[Callable[[torch.fx.Graph], Any]] = []
    for each in as_pass_list(slot):
        flat.extend(each.passes if isinstance(each, _Chain) else [each])
    return flat


def fastest(name: str, choices: list[Any], inputs: list[Any], layout: Any) -> Any:
    """Which of `choices`, Inductor's TritonTemplateCallers, its `autotune_select_algorithm` takes, always settled before fusion.

    It returns what the choice makes of itself (in a tuple from 2.13 on), and that is a buffer in the graph, which a choice that is one of several to
    be taken at run time must not leave behind: here each makes itself.
    """
    from torch._inductor.select_algorithm import autotune_select_algorithm

    with ExitStack() as stack:
        for choice in choices:
            stack.enter_context(mock.patch.object(choice, "output_node", functools.partial(_itself, choice)))
        result = autotune_select_algorithm(name, choices, inputs, layout, return_multi_template=False)
    return result[0] if isinstance(result, tuple) else result


def run_of(choice: Any, *args: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
    """What launches the kernel of a TritonTemplateCaller or ExternKernelCaller once."""
    from torch._inductor.select_algorithm import ExternKernelCaller

    if isinstance(choice, ExternKernelCaller):
        return functools.partial(choice.choice.to_callable(), *args, out=out, **choice.kwargs)
    return choice.bmreq.make_run_fn(*args, out=out)  # type: ignore[no-any-return]


def real_tensors() -> AbstractContextManager[Any]:
    """Inside it tensors that are made are real, also while Inductor lowers a graph of fake ones."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def without_modes() -> AbstractContextManager[Any]:
    """The same inside whatever traces, too, which sees nothing of it."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def _itself(choice: Any) -> Any:
    return choice


@contextmanager
def hints(symbols: Mapping[Any, int]) -> Iterator[None]:
    """Inside the block `symbols` have those values wherever Inductor needs one to render, allocate or time; no guard comes of it."""
    import sympy
    from torch._inductor.virtualized import V

    shape_env = V.graph.sizevars.shape_env
    values = {symbol: sympy.Integer(value) for symbol, value in symbols.items()}
    backed = {symbol: value for symbol, value in values.items() if symbol in shape_env.backed_var_to_val}
    # What depends on data has no value of its own but may have a hint; 2.11 lets a hint go before a value.
    with (
        shape_env.suppress_guards(),
        mock.patch.dict(shape_env.backed_var_to_val, backed),
        mock.patch.dict(shape_env.var_to_hint_override, {symbol: int(value) for symbol, value in symbols.items()}),
    ):
        yield


def writes_python() -> bool:
    """Whether Inductor writes the graph in progress as Python, which calls the kernels; C++ (AOTInductor) and FX graphs are written otherwise."""
    from torch._inductor.virtualized import V

    return not V.graph.cpp_wrapper and not V.graph.fx_wrapper


@contextmanager
def launched_as_dependents() -> Iterator[None]:
    """Inside the block Inductor writes kernels that may start before the ones that they follow have ended; each waits for those as its first step.

    Inductor itself (2.11 to 2.15) has a kernel wait where it first touches what the one right before it wrote, and has one that reads nothing not
    wait at all: what comes after such a one may start before what it reads was written.
    """
    from torch._inductor import config
    from torch._inductor.codegen.triton import TritonKernel

    wait, go = TritonKernel.GDC_WAIT, TritonKernel.GDC_LAUNCH

    def waits_first(kernel: TritonKernel, code: Any) -> None:
        if kernel._enable_pdl_codegen():
            others = [line for line in code._lines if not (isinstance(line, str) and line.strip() in (wait, go))]
            code._lines = [wait, go, *others]

    with config.patch({"triton.enable_pdl": True}), mock.patch.object(TritonKernel, "_filter_pdl", waits_first):
        yield


def triton_version() -> str:
    """The installed triton's version, or 'none'."""
    if not has_triton_package():
        return "none"
    import triton

    return str(triton.__version__)


def size_hint(size: Any) -> int:
    """The size that a symbolic expression is compiled for; V.graph.sizevars names it anew after 2.11."""
    from torch._inductor.virtualized import V

    sizevars: Any = V.graph.sizevars
    hint = getattr(sizevars, "optimization_hint", None) or sizevars.size_hint
    return int(hint(size))
