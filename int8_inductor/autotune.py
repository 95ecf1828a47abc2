"""Which config of which template: those worth timing, timed once a process for each kind of product, and the fastest remembered.

Inductor renders and times every choice for every call; a model's layers are mostly alike, so for one that was seen only the winner is rendered.
Its clock is not used either: Inductor times a kernel behind 20 us of other work on the GPU, and where the host takes longer than that to launch
(a kernel with tensor descriptors: an allocation and a Python launcher) it times the host.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import launching
from ._compat import fastest, real_tensors, run_of
from .branches import branch
from .compile_workers import start_compiling, wait_for_compile_workers
from .gluon import program
from .gluon.template import is_gluon
from .ranges import Range
from .templates.problem import Device, Problem
from .templates.rivals import Rival
from .templates.tail import Tail

__all__ = ["Kernel", "autotune", "compile_ahead", "is_beaten"]

log = logging.getLogger("int8_inductor")

WARMUP_MS, REPEAT_MS = 2, 10
"""How long each choice runs: long enough for the median of some 100 launches, each behind a cleared L2."""

HANDICAP = 1.03
"""A kernel in Gluon has to be faster by this, as Inductor fuses nothing into it that follows."""
SHORT_MS, LAUNCH_MS = 0.06, 0.03
"""What a launch of one in Gluon costs the host more than one of Inductor's; where no CUDA graph takes it away, kernels so short wait for the host
(ViT-B/16, batch 32, in the default mode on an H200: 3.9 ms with twelve such launches of 52 us, 3.1 with Inductor's of 57)."""

LIBRARY_HANDICAP = 1.05
"""A library's kernels have to be faster by this: what follows them was timed as a copy."""

_WINNERS: dict[tuple[Any, ...], tuple[Any, Any]] = {}
"""What was timed -> (template module, config)."""
_TIMES: dict[tuple[Any, ...], float] = {}
"""What was timed -> milliseconds of the winner."""
_BEATEN: dict[tuple[Any, ...], bool] = {}
"""What was timed against a library's kernels -> whether those are faster."""


def _clock(run: Callable[[], Any]) -> float:
    """Milliseconds that what `run` launches takes."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=WARMUP_MS, rep=REPEAT_MS, return_mode="median"))


def _clock_recorded(make: Callable[[], Callable[[], Any]]) -> float:
    """The same of what `make` makes, launched as the compiled code will be: where CUDA graphs launch that, by one.

    A launch from Python can take the host longer than the clear of the L2 takes the GPU: on one host of several, and beside other work on the same
    cores, the clock showed the 27 us of a linear of ViT-B/16 as 32, and chose 2.44 ms for the model where 2.31 were to be had. Inductor's launches go
    to the stream that was current when they were made, so they are made for the one that records.
    """
    if not launching.by_cuda_graphs():
        return _clock(make())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = make()
        run()  # loads the kernel, which is not to be recorded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    ms = _clock(graph.replay)
    torch.cuda.synchronize()
    graph.reset()
    return ms


def _median_ms(choice: Any, *args: Any, out: Any) -> float:
    """What a choice's kernel counts as: the signature and unit of Inductor's ChoiceCaller.benchmark."""
    ms = _clock_recorded(functools.partial(run_of, choice, *args, out=out))
    return _with_launch(ms) if is_gluon(choice) else ms


def _timed(times: dict[Any, float], choice: Any, *args: Any, out: Any) -> float:
    """The same, kept in `times`."""
    times[choice] = _median_ms(choice, *args, out=out)
    return times[choice]


def _with_launch(ms: float) -> float:
    """What a kernel in Gluon counts as beside Inductor's."""
    waits = ms < SHORT_MS and not launching.by_cuda_graphs()
    return ms * HANDICAP + (LAUNCH_MS if waits else 0.0)


@dataclass(frozen=True)
class Kernel:
    """A kernel to be chosen: of which templates, with which tail, for which problem, on which operands.

    templates: the product's. inputs: realized operands: a and b, what else the main loops read, the tail's. layout: of the result. mutated: those of
    the inputs that the kernel writes. literals: constants of the tail. thorough: every legal config is a candidate. ranges: of M, where each is to
    have a kernel; of one kernel, the one that it is for.
    """

    name: str
    templates: tuple[Any, ...]
    tail: Tail
    problem: Problem
    device: Device
    inputs: list[Any]
    layout: Any
    mutated: list[Any]
    literals: dict[str, str]
    thorough: bool
    ranges: tuple[Range, ...] = ()

    def parts(self) -> list[Kernel]:
        """The kernel for each range; this one where M has none."""
        if not self.ranges:
            return [self]
        return [replace(self, problem=replace(self.problem, m=each.rows), ranges=(each,)) for each in self.ranges]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What its time depends on: kernels of one kind have the same winner."""
        operands = ((box.get_dtype(), tuple(box.get_stride())) for box in self.inputs)
        return (self.templates, self.tail, self.problem, self.device, self.layout.dtype, self.thorough, launching.by_cuda_graphs(), *operands)

    def candidates(self) -> list[tuple[Any, Any]]:
        """(template module, config) of those worth timing, or of the winner alone where it is known."""
        if self.kind in _WINNERS:
            return [_WINNERS[self.kind]]
        make = [(module, module.candidates(self.problem, self.device, self.tail, thorough=self.thorough)) for module in self.templates]
        pairs = [(module, config) for module, configs in make for config in configs]
        return pairs[:1] if self.layout.device.type == "cpu" else pairs  # times in the interpreter say nothing

    def stands(self) -> contextlib.AbstractContextManager[None]:
        """Inside it Inductor renders and times for the M that stands for the one range of this kernel."""
        return self.ranges[0].stands() if self.ranges else contextlib.nullcontext()

    def choices(self, candidates: list[tuple[Any, Any]], times: dict[Any, float] | None = None) -> list[Any]:
        """The candidates rendered, as Inductor's choices; `times` receives what each takes when it is timed."""
        choices: list[Any] = []
        times = {} if times is None else times
        for module, config in candidates:
            constants = self.literals | module.constants(config, self.problem, self.device, self.tail)
            template = module.template(self.tail)
            if self.device.dependent:
                constants |= {"DEPENDENT": True, "triton_meta": {"launch_pdl": True}}
            declined = template.maybe_append_choice(
                choices, input_nodes=tuple(self.inputs), layout=self.layout, mutated_inputs=self.mutated or None, **constants
            )
            if declined is not None:
                raise declined
            choices[-1].benchmark = functools.partial(_timed, times, choices[-1])
        return choices


def autotune(kernel: Kernel) -> tuple[Any, tuple[int | None, ...]]:
    """The TensorBox of the fastest candidate, or of the fastest for each range of M; and where the ranges end that have kernels of their own."""
    winners: list[tuple[int | None, tuple[Any, Any]]] = []
    for part in kernel.parts():
        winner = _winner(part)
        if winners and winners[-1][1] == winner:
            winners.pop()
        winners.append((part.ranges[0].last if part.ranges else None, winner))
    choices = [(last, *kernel.choices([winner])) for last, winner in winners]
    return branch(choices, kernel.layout.size[0]), tuple(last for last, _ in winners)


def _winner(kernel: Kernel) -> tuple[Any, Any]:
    """The fastest candidate."""
    candidates = kernel.candidates()
    if len(candidates) > 1:
        with kernel.stands():
            times: dict[Any, float] = {}
            choices = kernel.choices(candidates, times)
            chosen = fastest(kernel.name, choices, kernel.inputs, kernel.layout)
            winner = candidates[choices.index(chosen)]
            if chosen in times:
                _TIMES[kernel.kind] = times[chosen]
    else:
        (winner,) = candidates
    if kernel.layout.device.type != "cpu":
        _WINNERS[kernel.kind] = winner
    return winner


def is_beaten(kernel: Kernel, rival: Rival) -> bool:
    """Whether a library's kernels take less time than the best of `kernel`, of a static M. One that was not timed, as there is one candidate, is
    not beaten.
    """
    if kernel.problem.static_m is None or kernel.layout.device.type == "cpu":
        return False
    if kernel.kind not in _BEATEN:
        _winner(kernel)
        _BEATEN[kernel.kind] = kernel.kind in _TIMES and _rival_ms(kernel, rival) * LIBRARY_HANDICAP < _TIMES[kernel.kind]
    return _BEATEN[kernel.kind]


def _rival_ms(kernel: Kernel, rival: Rival) -> float:
    """Milliseconds that a library's kernels take; infinity where it does not take the operands, or they do not fit into memory once more."""
    with real_tensors():
        try:
            run = rival(kernel.problem, kernel.inputs[0].get_dtype(), kernel.layout.dtype, kernel.layout.device)
            return float("inf") if run is None else _clock_recorded(lambda: run)
        except torch.OutOfMemoryError:
            log.info("%s: no memory to time %s beside the templates", kernel.name, rival.__name__)
            return float("inf")


def compile_ahead(kernels: Iterable[Kernel]) -> None:
    """Hand the candidates of every kind among `kernels` to Inductor's compile workers, and wait for none of them.

    Inductor compiles the choices of one product, waits, times them and goes on to the next. With those of all kinds under way at once the workers
    are busy until the last is compiled: ViT-B/16 has five kinds of eight choices, each 4 s of one core.
    """
    wait_for_compile_workers()
    seen = set(_WINNERS)
    for kernel in itertools.chain.from_iterable(each.parts() for each in kernels):
        if kernel.kind not in seen:
            seen.add(kernel.kind)
            with kernel.stands():
                for choice in kernel.choices(kernel.candidates()):
                    if is_gluon(choice):
                        program.start_compiling(kernel.layout.device, **choice.kwargs)
                        continue
                    start_compiling(choice)
