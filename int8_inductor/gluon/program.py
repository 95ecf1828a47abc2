"""A Gluon kernel at run time: its text and launch, compiled once a process, found in Triton's cache by the next."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..compile_workers import share_triton_cache, submit_to_compile_workers
from . import compiling

__all__ = ["CAPABILITY", "Box", "Launch", "compile_program", "run", "start_compiling"]

CAPABILITY = (9, 0)
"""The compute capability that has wgmma."""
ALIGNMENT = 16
KERNEL, FINISH = "kernel", "finish"
"""The kernels of a module; the second adds up what the first has left of a split product."""
TRITON_NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Box:
    """What one tensor descriptor copies at a time: rows and columns of elements of a dtype (by its name in torch), swizzled over `swizzle` bytes."""

    rows: int
    columns: int
    dtype: str
    swizzle: int

    @functools.cached_property
    def element(self) -> torch.dtype:
        """The dtype that the tensor is viewed as."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @functools.cache  # noqa: B019  boxes are few
    def layout(self) -> Any:
        """The layout of a box in shared memory."""
        from triton.experimental.gluon.language import NVMMASharedLayout

        return NVMMASharedLayout(swizzle_byte_width=self.swizzle, element_bitwidth=8 * self.element.itemsize, rank=2)


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched. Its arguments are a descriptor for each of `boxes`, the other tensors, the result, and M.

    arguments: dtypes of the other tensors and of the result, by torch's names. tile: rows and columns of the result that a program takes at a time.
    columns: of the result. programs: how many share a multiprocessor. max_registers: a thread's, or None for what fits. unpacked: bytes that the
    second operand, packed int4, is unpacked to before; 0 where it is not. dependent: whether it is launched before the kernel that it follows has
    ended. splits: parts of K, each of which has sums of its own in float32; with more than one the kernel `finish` adds them up, `last_tile` of the
    result at a time.
    """

    boxes: tuple[Box, ...]
    arguments: tuple[str, ...]
    tile: tuple[int, int]
    columns: int
    programs: int
    max_registers: int | None = None
    unpacked: int = 0
    dependent: bool = False
    splits: int = 1
    last_tile: tuple[int, int] = (1, 1)

    def sums(self, rows: int) -> int:
        """Elements of the sums of all parts of K, whole tiles of them, for a result of so many rows."""
        return self.splits * math.prod(-(-size // side) * side for size, side in zip((rows, self.columns), self.tile, strict=True))

    def to_json(self) -> str:
        """As a constant in generated code."""
        return json.dumps(asdict(self))

    @classmethod
    @functools.cache
    def from_json(cls, text: str) -> Launch:
        """What `to_json` wrote."""
        fields = json.loads(text)
        boxes = tuple(Box(**each) for each in fields.pop("boxes"))
        fields |= {name: tuple(fields[name]) for name in ("arguments", "tile", "last_tile")}
        return cls(boxes=boxes, **fields)


def _arguments(source: str, launch: str, name: str) -> tuple[Any, ...]:
    """Those of compile_kernel. Only what is allocated for it, the result and sums, is promised to begin at a multiple of 16 bytes."""
    how = Launch.from_json(launch)
    boxes = [f"tensordesc<{TRITON_NAMES[box.element]}[{box.rows}, {box.columns}],{box.layout()!r}>" for box in how.boxes]
    others = [f"*{TRITON_NAMES[getattr(torch, dtype)]}" for dtype in how.arguments]
    sums = "*fp32"
    if name == FINISH:
        types, allocated = [sums, *others], [0, len(others)]
    else:
        types = [*boxes, *others[:-1], others[-1] if how.splits == 1 else sums]
        allocated = [len(types) - 1]
    options: dict[str, Any] = {"num_warps": 4, "launch_pdl": how.dependent}
    if name == KERNEL and how.max_registers is not None:
        options["maxnreg"] = how.max_registers
    signature = {str(index): each for index, each in enumerate([*types, "i32"])}
    return source, name, signature, dict.fromkeys(allocated, ALIGNMENT), 10 * CAPABILITY[0] + CAPABILITY[1], options


def _names(launch: str) -> tuple[str, ...]:
    """The kernels of a launch, in their order."""
    return (KERNEL,) if Launch.from_json(launch).splits == 1 else (KERNEL, FINISH)


def compile_program(source: str, launch: str) -> list[Any]:
    """Compile the kernels of a launch, on any machine."""
    return [compiling.compile_kernel(*_arguments(source, launch, name)) for name in _names(launch)]


_UNDER_WAY: dict[tuple[str, str], list[Future[None]]] = {}
"""What compile workers were given and nobody has asked for yet."""


def start_compiling(device: torch.device, source: str, launch: str) -> None:
    """Hand a kernel to Inductor's compile workers, where there are any."""
    if (source, launch) not in _UNDER_WAY:
        calls = [f"compile_kernel{_arguments(source, launch, name)!r}" for name in _names(launch)]
        futures = [submit_to_compile_workers(inspect.getsource(compiling), call, device) for call in calls]
        _UNDER_WAY[source, launch] = [future for future in futures if future is not None]


@functools.cache
def _compiled(source: str, launch: str, device: torch.device) -> tuple[list[Any], Launch, int]:
    """The kernels, loaded on `device`; their launch; how many multiprocessors there are."""
    share_triton_cache(device)
    for under_way in _UNDER_WAY.pop((source, launch), ()):
        under_way.result()
    properties: Any = torch.cuda.get_device_properties(device)
    return compile_program(source, launch), Launch.from_json(launch), int(properties.multi_processor_count)


def _descriptor(t: Tensor, box: Box) -> Any:
    """Triton's tensor descriptor, without the checks of its constructor, which take 20 us: a lowering has made them (operands.fits_tma)."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    viewed = t if t.dtype == box.element else t.view(box.element)
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides = viewed, list(viewed.shape), [viewed.stride(0), 1]
    descriptor.block_shape, descriptor.layout, descriptor.padding = [box.rows, box.columns], box.layout(), "zero"
    return descriptor


def run(*operands: Tensor, source: str, launch: str, out: Tensor) -> Tensor:
    """Launch the kernel `source` on its operands, those that descriptors name first; writes and returns `out` [M, N].

    ValueError when `out` does not begin at a multiple of 16 bytes.
    """
    if out.numel() == 0:
        return out
    if out.data_ptr() % ALIGNMENT:
        raise ValueError(f"out must begin at a multiple of {ALIGNMENT} bytes, got address {out.data_ptr():#x}")
    (main, *finish), how, multiprocessors = _compiled(source, launch, out.device)
    m, count = out.shape[0], len(how.boxes)
    programs = how.programs * multiprocessors
    with torch.cuda.device(out.device) if out.device.index != torch.cuda.current_device() else contextlib.nullcontext():
        if how.unpacked:
            from ..expand_int4 import expand_int4

            operands = (operands[0], expand_int4(operands[1], dependent=how.dependent), *operands[2:])
        descriptors = [_descriptor(*pair) for pair in zip(operands[:count], how.boxes, strict=True)]
        into = torch.empty(how.sums(m), dtype=torch.float32, device=out.device) if finish else out
        main[(min(how.splits * _tiles(m, how.columns, how.tile), programs), 1, 1)](*descriptors, *operands[count:], into, m)
        for kernel in finish:
            kernel[(_tiles(m, how.columns, how.last_tile), 1, 1)](into, *operands[count:], out, m)
    return out


def _tiles(rows: int, columns: int, tile: tuple[int, int]) -> int:
    return -(-rows // tile[0]) * -(-columns // tile[1])
