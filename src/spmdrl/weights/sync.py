"""`WeightSync`: brings the policy's weights to the rollout engine, by the plan.

This is the plain form: one broadcast per source slice that some rank lacks. Tensors that trainer
and engine hold alike on the same rank are one storage and never move.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.models.sharding import Slice
from spmdrl.weights.layout import Held, WeightLayout, local_box, overlap, within
from spmdrl.weights.plan import SyncPlan, Transfer, key, plan_sync

LocalTensors = Mapping[str, tuple[Tensor, tuple[Slice, ...]]]


class Engine(Protocol):
    """What the sync needs of a rollout engine."""

    def adopt(self, local_name: str, tensor: Tensor) -> None: ...

    def allocate(self, local_name: str) -> Tensor: ...


class WeightSync:
    """Plans once, adopts what can be shared, and moves the rest at every `run()`.

    Args:
        source, target: the two layouts, equal on every rank.
        tensors: this rank's source tensors; None outside the source role.
        engine: this rank's engine; None outside the target role.
        device: where staging buffers live.
    """

    def __init__(
        self,
        source: WeightLayout,
        target: WeightLayout,
        tensors: LocalTensors | None,
        engine: Engine | None,
        device: torch.device,
    ) -> None:
        self.plan: SyncPlan = plan_sync(source, target)
        self._rank = dist.get_rank()
        self._device = device
        self._tensors = {} if tensors is None else tensors
        _check_held(source.get(self._rank, {}), self._tensors)
        self._here = {
            key(piece): (local_name, piece)
            for local_name, held in source.get(self._rank, {}).items()
            for piece in held.slices
        }
        self._wanted: dict[str, list[tuple[Tensor, Slice]]] = {}
        """Hugging Face name -> this rank's target tensors, and the slice of each to fill."""
        if engine is not None:
            self._prepare(engine, target[self._rank])

    def _prepare(self, engine: Engine, table: Mapping[str, Held]) -> None:
        shared = self.plan.shared[self._rank]
        for local_name, held in table.items():
            if local_name in shared:
                engine.adopt(local_name, self._tensors[local_name][0])
                continue
            tensor = engine.allocate(local_name)
            assert tuple(tensor.shape) == held.shape, (local_name, tensor.shape, held.shape)
            for piece in held.slices:
                self._wanted.setdefault(piece.name, []).append((tensor, piece))

    @torch.no_grad()
    def run(self) -> None:
        """Make the engine's weights equal to the trainer's. Every rank of the world calls it."""
        for transfer in self.plan.transfers:
            value = self._fetch(transfer)
            for tensor, held in self._wanted.get(transfer.piece.name, []):
                ranges = overlap(transfer.piece, held)
                if value is not None and ranges is not None:
                    box = local_box(tensor, held)
                    box[within(ranges, held)].copy_(value[within(ranges, transfer.piece)])

    def _fetch(self, transfer: Transfer) -> Tensor | None:
        """The transfer's slice on this rank, if it is here or comes here."""
        piece = transfer.piece
        mine = None
        if piece in self._here:
            local_name, held = self._here[piece]
            mine = local_box(self._tensors[local_name][0], held)
        if not transfer.receivers:
            return mine
        if self._rank == transfer.owner:
            assert mine is not None
            buffer = mine.to(transfer.dtype).contiguous()
        else:
            buffer = torch.empty(piece.size, dtype=transfer.dtype, device=self._device)
        dist.broadcast(buffer, src=transfer.owner)
        return buffer


def _check_held(table: Mapping[str, Held], tensors: LocalTensors) -> None:
    """The layout is computed, the tensors are there: both must say the same."""
    for local_name, held in table.items():
        tensor, slices = tensors[local_name]
        found = Held(shape=tuple(tensor.shape), dtype=tensor.dtype, slices=slices)
        assert found == held, (local_name, found, held)


@torch.no_grad()
def full_tensors(
    source: WeightLayout, tensors: LocalTensors | None, *, to_rank: int = 0
) -> Iterator[tuple[str, Tensor | None]]:
    """Every global tensor in turn on `to_rank` (None elsewhere), assembled on the host.

    All ranks of the world iterate together. At most one whole tensor is held at a time.
    """
    rank = dist.get_rank()
    table = tensors or {}
    by_name: dict[str, list[tuple[int, str, Slice]]] = {}
    seen: set[Slice] = set()
    # the receiving rank's own slices first: what it holds needs no message
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
