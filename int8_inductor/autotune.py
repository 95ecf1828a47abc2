"""Which config of which template: those worth timing, timed once a process for each kind of product, and the fastest remembered.

Inductor renders and times every choice for every call; a model's layers are mostly alike, so for one that was seen only the winner is rendered.
Its clock is not used either: Inductor times a kernel behind 20 us of other work on the GPU, and where the host takes longer than that to launch
(a kernel with tensor descriptors: an allocation and a Python launcher) it times the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from ._compat import chosen, select_choice
from .templates.problem import Device, Problem
from .templates.tail import Tail

__all__ = ["autotune"]

WARMUP_MS, REPEAT_MS = 2, 10
"""How long each choice runs: long enough for the median of some 100 launches, each behind a cleared L2."""

_WINNERS: dict[tuple[Any, ...], tuple[Any, Any]] = {}
"""What was timed -> (template module, config)."""


def _median_ms(choice: Any, *args: Any, out: Any) -> float:
    """Milliseconds that a choice's kernel takes: the signature and unit of Inductor's ChoiceCaller.benchmark."""
    from triton.testing import do_bench

    run: Callable[[], None] = choice.bmreq.make_run_fn(*args, out=out)
    return float(do_bench(run, warmup=WARMUP_MS, rep=REPEAT_MS, return_mode="median"))


def _candidates(templates: Sequence[Any], problem: Problem, gpu: Device, tail: Tail, *, thorough: bool) -> list[tuple[Any, Any]]:
    return [(module, config) for module in templates for config in module.candidates(problem, gpu, tail, thorough=thorough)]


def autotune(
    name: str,
    templates: tuple[Any, ...],
    tail: Tail,
    problem: Problem,
    gpu: Device,
    inputs: list[Any],
    layout: Any,
    mutated: list[Any],
    literals: dict[str, str],
    *,
    thorough: bool,
) -> Any:
    """The TensorBox of the fastest choice's kernel.

    templates: the product's. inputs: realized operands: a and b, what else the main loops read, the tail's. mutated: those of them that the kernel
    writes. literals: constants of the tail. thorough: time all.
    """
    on_cpu = layout.device.type == "cpu"
    key = (templates, tail, problem, gpu, layout.dtype, thorough, *((box.get_dtype(), tuple(box.get_stride())) for box in inputs))
    pairs = [_WINNERS[key]] if key in _WINNERS else _candidates(templates, problem, gpu, tail, thorough=thorough)
    if on_cpu:
        pairs = pairs[:1]  # times in the interpreter say nothing
    choices: list[Any] = []
    for module, config in pairs:
        constants = literals | module.constants(config, problem, gpu, tail)
        declined = module.template(tail).maybe_append_choice(
            choices, input_nodes=tuple(inputs), layout=layout, mutated_inputs=mutated or None, **constants
        )
        if declined is not None:
            raise declined
        choices[-1].benchmark = functools.partial(_median_ms, choices[-1])
    result = select_choice(name, choices, inputs, layout)
    if not on_cpu:
        _WINNERS[key] = pairs[chosen(result, choices)]
    return result
