"""A dispatch mode that computes on the CPU what kernels of the stand-in device would have.

Each CUDA operation runs as ever: its checks, its allocations and its launches are torch's own.
Then the same operation runs on CPU tensors that lie over the stand-in device's memory. Inside the
capture of a graph nothing is computed; each replay computes, by address, as kernels would.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum, auto
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fake_gpu import races
from fake_gpu.calculations import Calculation, Targets, on_host, place_of, targets_of
from fake_gpu.mirrors import PLAIN, Span, is_on_device, mirrors, span_of
from fake_gpu.stand_in import has_values, library

MEMORY_ONLY = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "set_",
    "resize_",
    "record_stream",
    "is_pinned",
    "pin_memory",
    "_pin_memory",
    "_local_scalar_dense",
    "_has_compatible_shallow_copy_type",
    "_fused_sdp_choice",
}
"""Operations that compute no values, or whose copies are values enough."""

READS_ON_HOST = {torch.ops.aten._local_scalar_dense.default}

COLLECTIVES = ("c10d", "_c10d_functional", "symm_mem")
"""Namespaces of what NCCL computes."""

COMPOSITE = "CompositeImplicitAutograd"


class Way(Enum):
    """The way in which an operation is handled."""

    AS_IT_IS = auto()
    COMPOSED = auto()
    """Calls other operations, which are handled one by one, as outside of inference mode."""
    COMPUTED = auto()
    DECIDES = auto()
    """Returns a value of the host that depends on values on the device."""
    SIZED_BY_VALUES = auto()
    """Returns tensors whose shapes depend on values: CUDA's own run would wait for them."""


@cache
def way_of(operation: torch._ops.OpOverload) -> Way:
    schema = operation._schema
    space, name = schema.name.split("::")
    aliases = [r.alias_info for r in schema.returns if r.alias_info is not None]
    if torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), COMPOSITE):
        return Way.COMPOSED
    if space in COLLECTIVES or name in MEMORY_ONLY or any(not a.is_write for a in aliases):
        return Way.AS_IT_IS
    if torch.Tag.data_dependent_output in operation.tags:
        return Way.DECIDES
    if torch.Tag.dynamic_output_shape in operation.tags:
        return Way.SIZED_BY_VALUES
    return Way.COMPUTED


@contextmanager
def held_copies() -> Iterator[None]:
    """Keep the runtime's copies of this thread from moving bytes: the result is computed here."""
    library().fake_hold_copies(1)
    try:
        yield
    finally:
        library().fake_hold_copies(0)


class Replays:
    """Work of captured graphs: C calls with the number of a piece of work, and drops it later."""

    def __init__(self) -> None:
        self._work: dict[int, Callable[[], None]] = {}
        self._made = 0
        self._run = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t)(self._call)
        self._forget = ctypes.CFUNCTYPE(None, ctypes.c_size_t)(self._drop)
        self.error: BaseException | None = None

    def add(
        self, stream: int, calculation: Calculation, targets: Targets, used: Sequence[Span]
    ) -> None:
        """Keep a calculation for the replays of the graph that `stream` captures.

        Args:
            used: memory of the operation's inputs and outputs.
        """
        self._made += 1
        turn = library().fake_capture(
            stream,
            ctypes.cast(self._run, ctypes.c_void_p),
            ctypes.cast(self._forget, ctypes.c_void_p),
            self._made,
        )

        def work() -> None:
            for span in used:
                span.check(targets.name)
            targets.take(calculation.run(turn))

        self._work[self._made] = work

    def _call(self, number: int) -> int:
        try:
            # Inference mode writes to tensors of its own and to all others.
            with torch.inference_mode(), torch.utils._python_dispatch._disable_current_modes():
                self._work[number]()
        except Exception as error:
            self.error = error
            return 1
        return 0

    def _drop(self, number: int) -> None:
        self._work.pop(number, None)


class HostMath(TorchDispatchMode):
    """Computes the values of CUDA operations; see the module."""

    def __init__(self, replays: Replays) -> None:
        super().__init__()
        self._replays = replays

    def __torch_dispatch__(
        self,
        operation: torch._ops.OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        watches, way = races.is_watching(), way_of(operation)
        if not self._is_mine(leaves, kwargs):
            return self._on_host(operation, way, args, kwargs, watches)
        with races.named(operation) if watches else nullcontext():
            return self._on_device(operation, way, args, kwargs, leaves)

    def _on_device(
        self,
        operation: torch._ops.OpOverload,
        way: Way,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[Any],
    ) -> Any:
        """Run a CUDA operation, and then compute its values or keep that for the replays."""
        if way is Way.SIZED_BY_VALUES and not waits_for_values(operation, kwargs, leaves):
            way = Way.COMPUTED
        if way is Way.AS_IT_IS:
            return operation(*args, **kwargs)
        if way is Way.COMPOSED:
            with self:
                return operation.decompose(*args, **kwargs)
        stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
        calculation = on_host(operation, args, kwargs)
        if way is Way.SIZED_BY_VALUES:
            result = sized_by_values(calculation)
            if races.is_watching():
                races.touch_device(operation, stream, args, kwargs, result)
            return result
        place = self._place(calculation)
        with held_copies():
            output = operation(*args, **kwargs)
        if races.is_watching():
            races.touch_device(operation, stream, args, kwargs, output)
        if way is Way.DECIDES:
            return calculation.run()
        targets = targets_of(operation._schema.name, output, leaves)
        if library().fake_is_capturing(stream):
            used = [span_of(x) for x in leaves + tree_leaves(output) if is_on_device(x)]
            self._replays.add(stream, calculation, targets, used)
        else:
            targets.take(calculation.run(place=place))
        return output

    def _on_host(
        self,
        operation: torch._ops.OpOverload,
        way: Way,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        watches: bool,
    ) -> Any:
        """Run an operation that the stand-in device has no part in."""
        if watches and way is Way.COMPOSED:
            with self:
                return operation.decompose(*args, **kwargs)
        if watches and (way is not Way.AS_IT_IS or operation in READS_ON_HOST):
            races.touch_host(operation, args, kwargs)
        return operation(*args, **kwargs)

    @staticmethod
    def _is_mine(leaves: Sequence[object], kwargs: dict[str, Any]) -> bool:
        if any(isinstance(x, Tensor) and type(x) not in PLAIN for x in leaves):
            return False
        device = kwargs.get("device")
        made_there = device is not None and torch.device(device).type == "cuda"
        return made_there or any(map(is_on_device, leaves))

    @staticmethod
    def _place(calculation: Calculation) -> int | None:
        if torch.Tag.nondeterministic_seeded not in calculation.operation.tags:
            return None
        return place_of(calculation.generator)


def waits_for_values(
    operation: torch._ops.OpOverload, kwargs: dict[str, Any], leaves: Sequence[object]
) -> bool:
    """Whether this call's output shape depends on values."""
    name = operation._schema.name
    if name == "aten::index":
        masks = (torch.bool, torch.uint8)
        return any(isinstance(x, Tensor) and x.dtype in masks for x in leaves[1:])
    return not (name == "aten::repeat_interleave" and kwargs.get("output_size") is not None)


def sized_by_values(calculation: Calculation) -> Any:
    """Compute first, and allocate what came out; wait as CUDA's operation would."""
    torch.cuda.current_stream().synchronize()
    result = calculation.run()

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=torch.cuda.current_device()
        )
        mirrors().of(made).copy_(value)
        return made

    return tree_map(placed, result)


def explain_replays(replays: Replays) -> None:
    """Make a failed replay raise what failed in it, and not only CUDA's error."""
    plain = torch.cuda.CUDAGraph.replay

    def replay(self: torch.cuda.CUDAGraph) -> None:
        try:
            plain(self)
        except RuntimeError as error:
            cause, replays.error = replays.error, None
            if cause is None:
                raise
            raise cause from error

    torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign]


def print_from_host() -> None:
    """Print tensors of the device from a copy: printing switches dispatch modes off."""
    plain = torch._tensor_str._str

    def text(self: Tensor, *, tensor_contents: str | None = None) -> str:
        shown = self.detach().cpu() if is_on_device(self) else self
        return plain(shown, tensor_contents=tensor_contents)

    torch._tensor_str._str = text


def install() -> None:
    """Prepare torch in this process; called once, right after torch is imported."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not has_values():
        return
    # its kernels would leave their results undefined: torch's operations compute in their place
    sys.modules["triton"] = None  # type: ignore[assignment]
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    replays = Replays()
    explain_replays(replays)
    print_from_host()
    races.watch_reads_in_place()
    HostMath(replays).__enter__()
