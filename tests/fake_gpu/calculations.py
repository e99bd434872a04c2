"""One CUDA operation as a calculation on the CPU, and where its results go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fake_gpu.host_operations import OWN
from fake_gpu.mirrors import is_on_device, mirrors


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
