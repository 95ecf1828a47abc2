"""What a model's linears read while it runs: how large each channel of their inputs gets, which of them read one tensor, and which norm made it.

A factor may go into a norm (`Group.norm`) only where nothing but the group's linears reads what the norm gives. That is observed, not guessed
from names: a torch function mode sees every use of the norm's output in the run, and whoever holds it afterwards is seen by its being alive.
Whether a module is such a norm is observed too: one whose output scales with its weight (and bias), channel by channel. That is so for
nn.LayerNorm, nn.RMSNorm and the RMSNorm of most of transformers' models, and not where the weight is an offset from 1.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Group", "Watch"]

_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "is_nested")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.stride, Tensor.__len__),
}
"""Functions of a tensor that do not read its values."""


@dataclass
class Group:
    """Linears that read the same tensors; `magnitude` float32 [K]: max |x| of each channel; `norm`: what may take their factor, if anything."""

    linears: dict[str, nn.Linear]
    magnitude: Tensor
    norm: nn.Module | None = None


@dataclass
class _Reads:
    """What one linear has read: the serial numbers of its inputs, the norms that made them (None: no norm did), and their magnitude."""

    inputs: list[int] = field(default_factory=list)
    makers: set[str | None] = field(default_factory=set)
    magnitude: Tensor | None = None


def _is_candidate(module: nn.Module) -> bool:
    """Whether a module has the form of a norm: a weight [K], perhaps a bias [K], and nothing else of its own, nor hooks that see its output."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    vectors = all(p.ndim == 1 and p.is_floating_point() for p in parameters.values())
    hooks = module._forward_hooks or module._forward_pre_hooks
    return parameters.keys() in ({"weight"}, {"weight", "bias"}) and vectors and not (module._modules or module._buffers or hooks)


def _scales_with_its_parameters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
    """Whether the output [..., K], a tensor of its own, is multiplied by r [K] where weight and bias are, to the bit: the r here are powers of 2."""
    weight = module._parameters["weight"]
    inputs = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    if weight is None or not isinstance(output, Tensor) or output.shape[-1:] != weight.shape or not output.is_floating_point():
        return False
    if output._is_view() or any(output.untyped_storage().data_ptr() == each.untyped_storage().data_ptr() for each in inputs):
        return False
    factors = torch.pow(2.0, torch.arange(len(weight), device=weight.device) % 5 - 2)
    scaled = {name: p * factors.to(p.dtype) for name, p in module.named_parameters()}
    wanted = output * factors.to(output.dtype)
    # Below the smallest normal number a power of 2 rounds too.
    return torch.allclose(functional_call(module, scaled, args, kwargs), wanted, rtol=0.0, atol=4 * torch.finfo(output.dtype).tiny)


class Watch(TorchFunctionMode):
    """Observes `linears` of `model` inside its block; `end_of_batch` after every call of the model, `groups` after the block."""

    def __init__(self, model: nn.Module, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        self._linears = linears
        # A scripted module calls operators that no torch function mode sees.
        scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
        self._norms = {} if scripted else {name: module for name, module in model.named_modules() if _is_candidate(module)}
        self._reads = {name: _Reads() for name in linears}
        self._spoiled: set[str] = set()
        self._made: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._serials: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._count = 0
        self._inside: nn.Module | None = None
        self._trying = False
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        # The fast path of nn.TransformerEncoderLayer reads its linears' weights past their forward.
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        for name, linear in self._linears.items():
            self._handles.append(linear.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self._handles.append(linear.register_forward_hook(self._after, prepend=True))
        for name, norm in self._norms.items():
            self._handles.append(norm.register_forward_hook(self._made_by(name), with_kwargs=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        torch.backends.mha.set_fastpath_enabled(self._fast_path)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_the_linear = func is F.linear and self._inside is not None
        if not self._trying and not is_the_linear and func not in _METADATA:
            for each in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(each, Tensor) and each in self._made:
                    self._spoiled.add(self._made[each])
        return func(*args, **kwargs)

    def _before(self, name: str) -> Any:
        def hook(linear: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            assert isinstance(linear, nn.Linear)
            if isinstance(x, Tensor) and x.ndim and x.shape[-1] == linear.in_features:  # forward, next, says what is wrong with another
                with torch._C.DisableTorchFunction():
                    self._read(name, x)
                self._inside = linear

        return hook

    def _after(self, *_: Any) -> None:
        self._inside = None

    def _read(self, name: str, x: Tensor) -> None:
        reads = self._reads[name]
        if x not in self._serials:
            self._serials[x] = self._count
            self._count += 1
        reads.inputs.append(self._serials[x])
        reads.makers.add(self._made.get(x))
        if x.numel() == 0:
            return
        magnitude = x.detach().reshape(-1, x.shape[-1]).abs().amax(0).float()
        if not bool(torch.isfinite(magnitude).all()):
            raise ValueError(f"batches must give finite activations, got NaN or infinity in the input of {name!r}")
        reads.magnitude = magnitude if reads.magnitude is None else torch.maximum(reads.magnitude, magnitude)

    def _made_by(self, name: str) -> Any:
        def hook(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._trying or name in self._spoiled:
                return
            self._trying = True
            try:
                if _scales_with_its_parameters(norm, args, kwargs, output):
                    self._made[output] = name
                else:
                    self._spoiled.add(name)
            finally:
                self._trying = False

        return hook

    def end_of_batch(self, output: Any) -> None:
        """After a call of the model that gave `output`: what a norm gave and is still alive, somebody may read later."""
        if len(self._made):
            gc.collect()
        self._spoiled.update(self._made.values())
        self._made, self._serials = WeakIdKeyDictionary(), WeakIdKeyDictionary()

    def groups(self) -> list[Group]:
        """The linears, by the tensors that they have read; ValueError for one that no batch has reached."""
        found: dict[Any, list[str]] = {}
        for name, reads in self._reads.items():
            if reads.magnitude is None:
                raise ValueError(f"batches must reach every nn.Linear that is to be smoothed, got none that reaches {name!r}")
            norm = self._norm_of(name)
            found.setdefault(norm or tuple(reads.inputs), []).append(name)
        return [self._group(key, names) for key, names in found.items()]

    def _norm_of(self, name: str) -> str | None:
        """The norm that makes all that a linear reads and whose output nothing but such linears reads."""
        (maker, *others) = self._reads[name].makers
        if maker is None or others or maker in self._spoiled:
            return None
        readers = [each for each, reads in self._reads.items() if maker in reads.makers]
        whole = all(self._reads[each].makers == {maker} and "weight" in self._linears[each]._parameters for each in readers)
        return maker if whole else None

    def _group(self, key: Any, names: list[str]) -> Group:
        magnitudes = [magnitude for name in names if (magnitude := self._reads[name].magnitude) is not None]
        norm = self._norms[key] if isinstance(key, str) else None
        return Group({name: self._linears[name] for name in names}, torch.stack(magnitudes).amax(0), norm)
