"""Operands of operations for the vector clocks of `libraries/races.cpp`.

The runtime knows copies, events and waits; which memory a kernel reads and writes is known here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fake_gpu.stand_in import library

OWN_FILES = (str(Path(__file__).parent / "host_math.py"), __file__)
TORCH = "/torch/"
"""Part of the paths of torch's own files."""


def is_watching() -> bool:
    return bool(library().fake_is_watching())


@contextmanager
def watching_races() -> Iterator[None]:
    """Watch within the block; FAKE_GPU_RACES=1 watches the whole process."""
    torch.cuda.synchronize()
    library().fake_watch_races(1)
    try:
        yield
    finally:
        library().fake_watch_races(0)


def extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element; strides are not negative."""
    if tensor.numel() == 0:
        return 0
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


@contextmanager
def named(operation: torch._ops.OpOverload) -> Iterator[None]:
    """Say which operation this thread runs in the block, and from which line of the caller."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file not in OWN_FILES and TORCH not in file and "contextlib" not in file:
            break
        frame = frame.f_back
    place = "the backward" if frame is None else f"{Path(file).name}:{frame.f_lineno}"
    library().fake_label(f"{operation._schema.name} at {place}".encode())
    try:
        yield
    finally:
        library().fake_label(b"")


def touch_device(
    operation: torch._ops.OpOverload,
    stream: int,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    """Tell which memory of the device an operation has read and written.

    Raises:
        RuntimeError: nothing orders an access after an earlier one.
    """
    read, written = _operands(operation, args, kwargs)
    known = {id(x) for x in read + written}
    written += [x for x in tree_leaves(output) if isinstance(x, Tensor) and id(x) not in known]
    for tensors, is_write in ((read, 0), (written, 1)):
        for x in tensors:
            if x.is_cuda and x.numel():
                found = library().fake_touch(stream, x.data_ptr(), extent(x), is_write, b"")
                _raise(found)


def touch_host(
    operation: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    """Tell which host memory an operation on the CPU reads and writes; raises as `touch_device`."""
    name = operation._schema.name.encode()
    for tensors, is_write in zip(_operands(operation, args, kwargs), (0, 1), strict=True):
        for x in tensors:
            touch_host_tensor(x, is_write, name)


def touch_host_tensor(tensor: Tensor, is_write: int, name: bytes) -> None:
    is_plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
    if is_plain and type(tensor) in (Tensor, torch.nn.Parameter) and tensor.numel():
        address = tensor.data_ptr()
        _raise(library().fake_touch_by_host(address, extent(tensor), is_write, name))


def _raise(found: bytes | None) -> None:
    if found is not None:
        raise RuntimeError(found.decode())


def _operands(
    operation: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors among the arguments: those only read, and those written."""
    read: list[Tensor] = []
    written: list[Tensor] = []
    arguments = operation._schema.arguments
    given = [(a, args[i]) for i, a in enumerate(arguments) if i < len(args)]
    given += [(a, kwargs[a.name]) for a in arguments if a.name in kwargs]
    for argument, value in given:
        info = argument.alias_info
        where = written if info is not None and info.is_write else read
        where += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return read, written


def watch_reads_in_place() -> None:
    """See reads of pinned memory that are no operations: `tolist` and `numpy`."""
    for name in ("tolist", "numpy"):
        plain = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, _plain: Any = plain, _name: str = name) -> Any:
            if is_watching():
                touch_host_tensor(self, 0, _name.encode())
            return _plain(self, *args)

        setattr(Tensor, name, read)
