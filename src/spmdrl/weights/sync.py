"""`WeightSync`: brings the policy's weights to the rollout engine, by the plan.

Rounds overlap: during one round's broadcasts and the next one's messages this rank packs and
unpacks others. Large cells go from tensor to tensor, without staging, if they are dense in memory
and in the dtype that travels; the rest goes through at most `NUM_SLOTS` slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.distributed.groups import ProcessGroups
from spmdrl.distributed.reduce import gather_objects
from spmdrl.models.adapters import Adapter
from spmdrl.models.local_shards import LocalShard, LocalTensors, Table
from spmdrl.weights.cells import Cell
from spmdrl.weights.plan import NUM_SLOTS, SyncPlan
from spmdrl.weights.rank_rounds import Message, RankRound, rank_rounds
from spmdrl.weights.tensor_sums import TensorSums
from spmdrl.weights.views import MergedReader, Read, TensorViews, copy_all

_ALIGNMENT = 16


class Engine(Protocol):
    """The methods of a rollout engine that the sync needs."""

    def adopt(self, local_name: str, tensor: Tensor) -> None: ...

    def allocate(self, local_name: str) -> Tensor: ...


class WeightSync:
    """Lets the engine adopt shared tensors, and moves the rest at every `run()`.

    Every rank of the world constructs and calls it, in the same order.

    Args:
        plan: plan of the two layouts, equal on every rank.
        source, target: this rank's tables of both roles; empty outside them.
        tensors: this rank's source tensors.
        engine: this rank's engine; None outside the target role.
        device: device that messages are sent from; the host if the world has only gloo.
        read: returns a source tensor's current values, by default the tensor itself.
        merged: the source's adapter, if the target gets weights that it is merged into.
        keeps_frozen: the target's frozen tensors last from sync to sync, on every rank, so only the
            first one moves them.
        groups: the groups that meshes may have made already; None: only the sync's.

    Raises:
        ValueError: ranks have different plans.
    """

    def __init__(
        self,
        plan: SyncPlan,
        source: Table,
        target: Table,
        tensors: LocalTensors,
        engine: Engine | None,
        device: torch.device,
        read: Read | None = None,
        *,
        merged: Adapter | None = None,
        keeps_frozen: bool = True,
        groups: ProcessGroups | None = None,
    ) -> None:
        check_equal(plan)
        self.plan = plan
        self.rank = dist.get_rank()
        self.device = device
        self.staging_bytes = 0
        """Staging bytes of the largest run so far."""
        _check_shards(source, tensors)
        own = {} if engine is None else _adopt(plan.shared[self.rank], engine, target, tensors)
        read = (lambda tensor: tensor) if read is None else read
        self.merges = merged is not None
        """Whether the target gets weights that the source computes as they are read."""
        if merged is not None:
            read = MergedReader(merged, tensors, read)
        self.views = TensorViews(tensors, own, read)
        made = ProcessGroups() if groups is None else groups
        self.groups = {ranks: made.over(ranks) for ranks in plan.groups}
        self.frozen_rounds = rank_rounds(plan, plan.frozen_rounds, self.rank)
        self.rounds = rank_rounds(plan, plan.rounds, self.rank)
        self._keeps_frozen, self._has_frozen = keeps_frozen, False
        self._slots = _Slots(device)

    @property
    def leaves_out_frozen(self) -> bool:
        """Whether the next `run` omits frozen tensors."""
        return self._has_frozen and self._keeps_frozen

    @property
    def has_work(self) -> bool:
        """Whether the next `run` moves or copies anything anywhere."""
        return bool(self.plan.rounds or (self.plan.frozen_rounds and not self.leaves_out_frozen))

    @property
    def moved_bytes(self) -> int:
        """Bytes that the next `run` moves, over all receivers."""
        return self.plan.moved_again_bytes if self.leaves_out_frozen else self.plan.moved_bytes

    @cached_property
    def sums(self) -> TensorSums:
        """Checksums of whole tensors, to prove a run."""
        return TensorSums(self.plan, self.views, self.rank, self.device)

    @torch.no_grad()
    def run(self) -> None:
        """Make the engine's weights equal to the trainer's."""
        self._run((*(() if self.leaves_out_frozen else self.frozen_rounds), *self.rounds))

    @torch.no_grad()
    def run_frozen(self) -> None:
        """Move only the frozen tensors, for an engine that gets the others by other means."""
        self._run(self.frozen_rounds)

    def _run(self, rounds: Sequence[RankRound]) -> None:
        self.views.forget()
        slots = self._slots
        in_flight = [_RoundInFlight(self, one, slots) for one in rounds]
        for tick in range(len(in_flight) + 2):
            if tick < len(in_flight):
                in_flight[tick].send()
            if 0 <= tick - 1 < len(in_flight):
                in_flight[tick - 1].cast()
            if 0 <= tick - 2 < len(in_flight):
                in_flight[tick - 2].land()
        self.staging_bytes = max(self.staging_bytes, slots.num_bytes)
        self._has_frozen = True
        self.views.forget()
        if self.device.type != "cpu":
            slots.free()


class _Slots:
    """Staging buffers, one for each round in flight, created when they are first needed.

    On the host they are kept: the first touch of a new page costs ten times a copy into it. On
    CUDA they are freed: the allocator keeps the memory for everybody.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._next = 0
        self.free()

    def free(self) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=self._device)] * NUM_SLOTS

    def take(self, num_bytes: int) -> Tensor:
        """A buffer for the next round; the one that used it before has landed."""
        at, self._next = self._next, (self._next + 1) % NUM_SLOTS
        if self._buffers[at].numel() < num_bytes:
            self._buffers[at] = torch.empty(0, dtype=torch.uint8, device=self._device)  # first free
            self._buffers[at] = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self._buffers[at]

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers)


@dataclass
class _RoundInFlight:
    """A round in flight: `send`, then `cast`, then `land`."""

    sync: WeightSync
    round: RankRound
    slots: _Slots
    _works: list[dist.Work] = field(default_factory=list)
    _arriving: list[tuple[Message, Tensor]] = field(default_factory=list)
    """Messages to unpack when they have arrived."""
    _casts: list[tuple[Message, Tensor, bool]] = field(default_factory=list)
    """Broadcasts, with their bytes and whether they are staged."""

    def send(self) -> None:
        """Start the messages between two ranks; meanwhile make the local copies."""
        if self.round.is_empty:
            return
        outgoing = [(m, self._dense(m, out=True)) for m in self.round.sends]
        incoming = [(m, self._dense(m, out=False)) for m in self.round.receives]
        casts = [(m, self._dense(m, out=m.peer == self.sync.rank)) for m in self.round.casts]
        staged = [m for m, dense in (*outgoing, *incoming, *casts) if dense is None]
        buffers = iter(_cut(self.slots.take(sum(_padded(m) for m in staged)), staged))
        ops = []
        for message, dense in outgoing:
            value = next(buffers) if dense is None else dense
            if dense is None:
                self._pack(message, value)
            ops.append(dist.P2POp(dist.isend, value, message.peer, tag=message.tag))
        for message, dense in incoming:
            value = next(buffers) if dense is None else dense
            if dense is None:
                self._arriving.append((message, value))
            ops.append(dist.P2POp(dist.irecv, value, message.peer, tag=message.tag))
        for message, dense in casts:
            value = next(buffers) if dense is None else dense
            self._casts.append((message, value, dense is None))
        self._works = dist.batch_isend_irecv(ops) if ops else []
        self._copy()

    def cast(self) -> None:
        """Unpack the messages, and start the broadcasts, some of them of what has arrived."""
        self._finish()
        for message, value, staged in self._casts:
            if staged and message.peer == self.sync.rank:
                self._pack(message, value)
            elif staged:
                self._arriving.append((message, value))
            assert message.group is not None
            group = self.sync.groups[message.group]
            work = dist.broadcast(value, src=message.peer, group=group, async_op=True)
            assert work is not None
            self._works.append(work)

    def land(self) -> None:
        """Unpack the broadcasts."""
        self._finish()

    def _finish(self) -> None:
        for work in self._works:
            work.wait()
        pairs = []
        for message, value in self._arriving:
            for (name, cell), box in _boxes(message, value):
                pairs += [(view, box) for view in self.sync.views.target(name, cell)]
        copy_all(pairs)
        self._works, self._arriving = [], []

    def _copy(self) -> None:
        pairs: list[tuple[Tensor, Tensor]] = []
        last = None
        for name, cell in self.round.copies:
            # values that are computed to be read live only until they are copied
            if self.sync.merges and name != last:
                copy_all(pairs)
                pairs.clear()
            last = name
            value = self.sync.views.source(name, cell)
            assert value is not None, (name, cell)
            pairs += [(view, value) for view in self.sync.views.target(name, cell)]
        copy_all(pairs)

    def _pack(self, message: Message, value: Tensor) -> None:
        boxes = _boxes(message, value)
        copy_all([(box, self.sync.views.value(name, cell)) for (name, cell), box in boxes])

    def _dense(self, message: Message, *, out: bool) -> Tensor | None:
        """The message's only cell in place, as bytes; None if it must be staged."""
        if len(message.cells) > 1:
            return None
        [(name, cell)] = message.cells
        if out:
            view = self.sync.views.value(name, cell)
        else:
            view, *others = self.sync.views.target(name, cell)
            if others:
                return None
        fits = view.dtype == cell.dtype and view.device == self.sync.device
        return view.view(-1).view(torch.uint8) if fits and view.is_contiguous() else None


def _padded(message: Message) -> int:
    return -(-message.num_bytes // _ALIGNMENT) * _ALIGNMENT


def _cut(buffer: Tensor, messages: Sequence[Message]) -> Iterator[Tensor]:
    """A part of the buffer for each message."""
    start = 0
    for message in messages:
        yield buffer[start : start + message.num_bytes]
        start += _padded(message)


def _boxes(message: Message, value: Tensor) -> Iterator[tuple[tuple[str, Cell], Tensor]]:
    """The message's cells as views of its bytes."""
    start = 0
    for item in message.cells:
        _, cell = item
        size = [b - a for a, b in zip(cell.start, cell.stop, strict=True)]
        yield item, value[start : start + cell.num_bytes].view(cell.dtype).view(size)
        start += cell.num_bytes


def check_equal(plan: SyncPlan) -> None:
    """ValueError on every rank unless all ranks of the world have the same plan."""
    digests = gather_objects(plan.digest)
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        raise ValueError(
            f"weight sync: ranks {odd} made other plans than rank 0: do all ranks read the same "
            "configuration and models, with the same versions of spmdrl and torch?"
        )


def _adopt(
    shared: frozenset[str], engine: Engine, table: Table, tensors: LocalTensors
) -> LocalTensors:
    """Give the engine the shared tensors; returns its own tensors."""
    own = {}
    for local_name, held in table.items():
        if local_name in shared:
            engine.adopt(local_name, tensors[local_name][0])
            continue
        tensor = engine.allocate(local_name)
        assert tuple(tensor.shape) == held.shape, (local_name, tensor.shape, held.shape)
        own[local_name] = (tensor, held.slices)
    return own


def _check_shards(table: Table, tensors: LocalTensors) -> None:
    """Assert that the computed layout agrees with the tensors that exist."""
    for local_name, held in table.items():
        tensor, slices = tensors[local_name]
        found = LocalShard(shape=tuple(tensor.shape), dtype=tensor.dtype, slices=slices)
        assert found.is_like(held), (local_name, found, held)
