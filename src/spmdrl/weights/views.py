"""`TensorViews`: the views of a cell in this rank's source and target tensors.

`MergedReader`: source tensors with an adapter merged into them.

Whole tensors on one rank, one after the other, from any layout, for Hugging Face exports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.models.adapter_weights import merged
from spmdrl.models.adapters import Adapter
from spmdrl.models.local_shards import LocalTensors, WeightLayout, local_box
from spmdrl.models.tensors import Slice
from spmdrl.weights.cells import Cell
from spmdrl.weights.layout import key

Read = Callable[[Tensor], Tensor]
"""Returns a source tensor's current values: on the device, or on the host while it is away."""

_Place = tuple[Tensor, Slice, tuple[slice, ...]]
"""A local tensor, a slice in it, and a cell's index in the slice's box."""


class MergedReader:
    """A `Read` that returns W + scale B A in place of each W that is a target of an adapter.

    It is computed for the whole local tensor, so that every box of it has the same bits whoever
    reads it. The last two are kept until `forget`, since boxes of one tensor are read in turn.

    Args:
        tensors: this rank's source tensors, the adapter's among them.
        read: see `Read`.
    """

    def __init__(self, adapter: Adapter, tensors: LocalTensors, read: Read) -> None:
        self._adapter, self._tensors, self._read = adapter, tensors, read
        places = {piece.name: n for n, (_, slices) in tensors.items() for piece in slices}
        self._needed: dict[int, tuple[tuple[Slice, ...], tuple[str, ...]]] = {}
        """Identity of a tensor -> its slices, and the local names of the A and B to merge."""
        for tensor, slices in tensors.values():
            targets = [piece.name for piece in slices if piece.name in adapter.targets]
            own = [places[name] for target in targets for name in adapter.factors(target)]
            if own:
                self._needed[id(tensor)] = (slices, tuple(dict.fromkeys(own)))
        self._kept: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        key = id(tensor)
        if key not in self._needed:
            return self._read(tensor)
        if key not in self._kept:
            for oldest in list(self._kept)[:-1]:  # first, so that its memory is free
                del self._kept[oldest]
            self._kept[key] = self._merge(tensor)
        return self._kept[key]

    def forget(self) -> None:
        """Free the results; values of source tensors may change until the next read."""
        self._kept.clear()

    def _merge(self, tensor: Tensor) -> Tensor:
        slices, names = self._needed[id(tensor)]
        weight = self._read(tensor)
        own = {}
        for name in names:
            value, held = self._tensors[name]
            # the adapter's part may be on the device while the base's is away
            own[name] = (self._read(value).to(weight.device), held)
        return merged(weight, slices, self._adapter, own)


class TensorViews:
    """This rank's side of a sync.

    Args:
        source: the tensors to read; empty outside the source role.
        target: the tensors to write, without the shared ones.
        read: see `Read`.
    """

    def __init__(self, source: LocalTensors, target: LocalTensors, read: Read) -> None:
        self._read = read
        self._source = _by_name(source)
        self._target = _by_name(target)
        self._source_at: dict[tuple[str, Cell], _Place | None] = {}
        self._target_at: dict[tuple[str, Cell], tuple[Tensor, ...]] = {}

    def source_slices(self, name: str) -> tuple[Slice, ...]:
        """The slices of a global tensor in the source's tensors here."""
        return tuple(piece for _, piece in self._source.get(name, ()))

    def target_slices(self, name: str) -> tuple[Slice, ...]:
        """The slices of a global tensor in the target's tensors here."""
        return tuple(piece for _, piece in self._target.get(name, ()))

    def source(self, name: str, cell: Cell) -> Tensor | None:
        """The cell in the source's tensors here, in their dtype; None if they do not hold it."""
        key = (name, cell)
        if key not in self._source_at:
            found = _find(self._source.get(name, ()), cell)
            self._source_at[key] = found[0] if found else None
        at = self._source_at[key]
        if at is None:
            return None
        tensor, piece, index = at
        return local_box(self._read(tensor), piece)[index]

    def target(self, name: str, cell: Cell) -> tuple[Tensor, ...]:
        """The views to fill here: several if one tensor serves as two (tied embeddings)."""
        key = (name, cell)
        if key not in self._target_at:
            found = _find(self._target.get(name, ()), cell)
            self._target_at[key] = tuple(local_box(t, piece)[index] for t, piece, index in found)
        return self._target_at[key]

    def value(self, name: str, cell: Cell) -> Tensor:
        """The cell to pass on: the source's, or the one that the target has received."""
        own = self.source(name, cell)
        if own is not None:
            return own
        return max(self.target(name, cell), key=lambda view: view.dtype.itemsize)

    def forget(self) -> None:
        """Free what was computed for reading, before source tensors change."""
        if isinstance(self._read, MergedReader):
            self._read.forget()


_Held = Mapping[str, Sequence[tuple[Tensor, Slice]]]


def _by_name(tensors: LocalTensors) -> _Held:
    found: dict[str, list[tuple[Tensor, Slice]]] = {}
    for tensor, slices in tensors.values():
        for piece in slices:
            found.setdefault(piece.name, []).append((tensor, piece))
    return found


def _find(held: Sequence[tuple[Tensor, Slice]], cell: Cell) -> list[_Place]:
    """Every place of the cell. No slice cuts a cell."""
    found = []
    for tensor, piece in held:
        bounds = zip(piece.start, piece.stop, cell.start, cell.stop, strict=True)
        if all(a <= low and high <= b for a, b, low, high in bounds):
            ranges = zip(cell.start, cell.stop, piece.start, strict=True)
            index = tuple(slice(a - first, b - first) for a, b, first in ranges)
            found.append((tensor, piece, index))
    return found


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each (to, from) pair, casting; on CUDA all pairs together, in few kernels."""
    together = [pair for pair in pairs if pair[0].is_cuda and pair[1].is_cuda]
    if together:
        torch._foreach_copy_([to for to, _ in together], [source for _, source in together])
    for to, source in pairs:
        if not (to.is_cuda and source.is_cuda):
            # a pinned host copy is not written before the next call that needs it on the device
            to.copy_(source, non_blocking=to.is_cuda)


@torch.no_grad()
def full_tensors(
    source: WeightLayout, tensors: LocalTensors | None, *, to_rank: int = 0
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield every global tensor in turn on `to_rank` (None elsewhere), assembled on the host.

    All ranks of the world iterate together. At most one whole tensor is in memory at a time.
    """
    rank = dist.get_rank()
    table = tensors or {}
    by_name: dict[str, list[tuple[int, str, Slice]]] = {}
    seen: set[Slice] = set()
    # the receiving rank's own slices first: they need no message
    for holder in sorted(source, key=lambda r: (r != to_rank, r)):
        for local_name, held in source[holder].items():
            for piece in held.slices:
                if key(piece) not in seen:
                    seen.add(key(piece))
                    by_name.setdefault(piece.name, []).append((holder, local_name, piece))
    for name, pieces in by_name.items():
        whole, filled = None, 0
        for holder, local_name, piece in pieces:
            box = local_box(table[local_name][0], piece).cpu() if rank == holder else None
            if box is not None and rank != to_rank:
                dist.send(box.contiguous(), dst=to_rank)
            if rank != to_rank:
                continue
            if box is None:
                box = torch.empty(piece.size, dtype=source[holder][local_name].dtype)
                dist.recv(box, src=holder)
            if whole is None:
                whole = torch.empty(piece.shape, dtype=box.dtype)
            whole[tuple(slice(a, b) for a, b in zip(piece.start, piece.stop, strict=True))] = box
            filled += piece.numel
        assert whole is None or filled == whole.numel(), (name, filled, whole.shape)
        yield name, whole
