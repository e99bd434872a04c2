"""A dispatch mode that computes on the CPU what kernels of the stand-in device would have.

Each CUDA operation runs as ever: its checks, its allocations and its launches are torch's own.
Then the same operation runs on CPU tensors that lie over the stand-in device's memory. Inside the
capture of a graph nothing is computed; each replay computes, by address, as kernels would.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fake_gpu import races
from fake_gpu.host_operations import OWN
from fake_gpu.races import extent
from fake_gpu.stand_in import has_values, library

PLAIN = (Tensor, torch.nn.Parameter)
"""Subclasses, as DTensor, are left to their own dispatch, which arrives here with plain tensors."""

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


def is_on_device(value: object) -> bool:
    return isinstance(value, Tensor) and type(value) in PLAIN and value.is_cuda


class Mirrors:
    """CPU tensors over the stand-in device's memory."""

    def __init__(self) -> None:
        runtime = library()
        self._base: int = runtime.fake_address_base()
        size = runtime.fake_address_space()
        whole = (ctypes.c_uint8 * size).from_address(runtime.fake_host_base())
        self._bytes = torch.frombuffer(whole, dtype=torch.uint8)
        self._typed: dict[torch.dtype, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """Return the same elements as a CPU tensor.

        Raises:
            RuntimeError: the storage was freed (`resize_(0)`), or its memory is not allocated.
        """
        dtype, address = tensor.dtype, tensor.data_ptr()
        if tensor.numel() == 0:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype)
        whole = self._typed.get(dtype)
        if whole is None:
            whole = self._typed[dtype] = self._bytes.view(dtype)
        if not library().fake_host_address(address, extent(tensor)):
            raise RuntimeError(freed(tensor.shape))
        offset = (address - self._base) // dtype.itemsize
        return whole.as_strided(tensor.shape, tensor.stride(), offset)


def freed(shape: Sequence[int]) -> str:
    return f"freed or unmapped device memory is used: a tensor of {tuple(shape)}"


@cache
def mirrors() -> Mirrors:
    return Mirrors()


@contextmanager
def held_copies() -> Iterator[None]:
    """Keep the runtime's copies of this thread from moving bytes: the result is computed here."""
    library().fake_hold_copies(1)
    try:
        yield
    finally:
        library().fake_hold_copies(0)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let the CPU draw from `seed`, and then from where it was."""
    kept = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(kept)


def place_of(generator: torch.Generator | None) -> int:
    """A seed made of a CUDA generator's seed and offset; those of the default one for None."""
    chosen = generator or torch.cuda.default_generators[torch.cuda.current_device()]
    seed, offset = chosen.get_state().view(torch.int64).tolist()
    return hash((seed, offset)) & 0x7FFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, kw_only=True)
class Calculation:
    """An operation on CPU tensors.

    Args:
        generator: the CUDA generator of a random operation that names one.
    """

    operation: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    generator: torch.Generator | None

    def run(self, turn: int = 0, place: int | None = None) -> Any:
        """Compute.

        Args:
            turn: distinguishes the operations of one replay.
            place: the generator's place before the operation, None for its place now.

        Raises:
            NotImplementedError: neither the CPU nor `host_operations.py` has the operation.
        """
        schema = self.operation._schema
        name = schema.name
        own = OWN.get(name) or OWN.get(f"{name}.{schema.overload_name}")
        try:
            if own is not None:
                return own(self._by_name())
            if torch.Tag.nondeterministic_seeded not in self.operation.tags:
                return self.operation(*self.args, **self.kwargs)
            place = place_of(self.generator) if place is None else place
            with seeded(hash((place, turn)) & 0x7FFF_FFFF_FFFF_FFFF):
                return self.operation(*self.args, **self.kwargs)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{name}.{schema.overload_name}: the CPU lacks it; add it to host_operations.py"
            ) from error

    def _by_name(self) -> dict[str, Any]:
        names = [argument.name for argument in self.operation._schema.arguments]
        return dict(zip(names, self.args, strict=False)) | self.kwargs


def on_host(
    operation: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Calculation:
    """Return the operation with mirrors for tensors, and the CPU for the device."""

    def moved(value: Any) -> Any:
        if is_on_device(value):
            return mirrors().of(value)
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("cpu")
        return None if isinstance(value, torch.Generator) else value

    given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Generator)]
    try:
        args, kwargs = tree_map(moved, args), tree_map(moved, kwargs)
    except RuntimeError as error:
        raise RuntimeError(f"{operation._schema.name}: {error}") from None
    if isinstance(kwargs.get("device"), str):
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    return Calculation(
        operation=operation, args=args, kwargs=kwargs, generator=given[0] if given else None
    )


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Tensors that receive an operation's results, in the order of its outputs.

    Args:
        tensors: None for an output that the operation has written in place.
    """

    name: str
    tensors: tuple[Tensor | None, ...]

    def take(self, result: Any) -> None:
        """Copy the results.

        Raises:
            RuntimeError: a shape differs from what CUDA's operation has returned.
        """
        found = [r for r in tree_leaves(result) if isinstance(r, Tensor)]
        for target, value in zip(self.tensors, found, strict=False):
            if target is None:
                continue
            if target.shape != value.shape:
                raise RuntimeError(
                    f"{self.name}: shape {tuple(target.shape)} on CUDA, {tuple(value.shape)} here"
                )
            target.copy_(value)


def targets_of(name: str, output: Any, inputs: Iterable[object]) -> Targets:
    known = {id(value) for value in inputs}
    outputs = [o for o in tree_leaves(output) if isinstance(o, Tensor)]
    tensors = [
        None if id(o) in known else mirrors().of(o) if is_on_device(o) else o for o in outputs
    ]
    return Targets(name=name, tensors=tuple(tensors))


@dataclass(frozen=True, kw_only=True)
class Span:
    """Device memory of a tensor, by address: a graph holds no storage."""

    address: int
    size: int
    shape: tuple[int, ...]

    def check(self, name: str) -> None:
        if self.size and not library().fake_host_address(self.address, self.size):
            raise RuntimeError(f"{name}: {freed(self.shape)}")


def span_of(tensor: Tensor) -> Span:
    return Span(address=tensor.data_ptr(), size=extent(tensor), shape=tuple(tensor.shape))


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
        turn = self._made = self._made + 1

        def work() -> None:
            for span in used:
                span.check(targets.name)
            targets.take(calculation.run(turn))

        self._work[turn] = work
        library().fake_capture(
            stream,
            ctypes.cast(self._run, ctypes.c_void_p),
            ctypes.cast(self._forget, ctypes.c_void_p),
            self._made,
        )

    def _call(self, number: int) -> int:
        try:
            with torch.utils._python_dispatch._disable_current_modes():
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
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    replays = Replays()
    explain_replays(replays)
    print_from_host()
    races.watch_reads_in_place()
    HostMath(replays).__enter__()
