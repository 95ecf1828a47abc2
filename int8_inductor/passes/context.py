"""What the passes of one run over one graph share: the ledger and the kernel preference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from ..kernels import KernelPreference, resolve
from .base import Ledger

__all__ = ["Context", "current", "running"]


@dataclass
class Context:
    """One run of PASSES over one graph."""

    preference: KernelPreference
    ledger: Ledger = field(default_factory=Ledger)

    def check_kernel(self, device: torch.device) -> None:
        """KernelPreferenceError, before the graph is touched, where the preference cannot be met on `device`."""
        resolve(self.preference, device)


_current: ContextVar[Context] = ContextVar("int8_inductor_pass_context")


def current() -> Context:
    """The context of the run in progress."""
    return _current.get()


@contextmanager
def running(context: Context) -> Iterator[Context]:
    """Make `context` the current one inside the block."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
