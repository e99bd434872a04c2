"""`Residency`: owns the memory of this rank's roles on its device.

`prepare` precedes every call, and moves parts out before it moves others in. Parts that a call
leaves on the device stay until a call that does not need them, so consecutive calls of one role
move nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spmdrl.memory.foreign_part import ForeignPart
from spmdrl.memory.meter import Meter
from spmdrl.memory.mover import Mover
from spmdrl.memory.parts import (
    Part,
    PartName,
    PartPolicy,
    PartWish,
    by_name,
    check_captures,
    closure,
    dotted,
)
from spmdrl.memory.storages import distinct_storages, is_resident, local_part, storage_key
from spmdrl.memory.tensor_part import TensorPart


@dataclass(frozen=True, kw_only=True, eq=False)
class _Droppable:
    drop: Callable[[], None]
    num_bytes: Callable[[], int]


class Residency:
    """The parts of this rank's roles, and their moves.

    Args:
        device: device of the parts.
        capacity: bytes that parts and working memory may take with prefetches; None prevents these.
        staging_bytes: see `Mover`.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        capacity: int | None = None,
        staging_bytes: int | None = None,
    ) -> None:
        self._capacity = capacity
        self._mover = Mover(device, staging_bytes=staging_bytes)
        self._parts: dict[PartName, Part] = {}
        self._policies: dict[PartName, PartPolicy] = {}
        self._tensors: dict[PartName, TensorPart | ForeignPart] = {}
        self._droppables: dict[PartName, _Droppable] = {}
        self._owners: dict[int, PartName] = {}
        """Storage -> the part that owns it."""
        self._pins: list[frozenset[PartName]] = []
        self._meter = Meter()

    # Registration

    def register(
        self,
        role: str,
        part: str,
        *,
        tensors: Iterable[Tensor],
        policy: PartWish = "auto",
        frozen: bool = False,
    ) -> None:
        """Take charge of the tensors' storages, which hold their content now.

        A storage that an earlier part owns stays with that part and its policy. This part then
        rests on that one: a call that needs this part needs all of that one too.

        Args:
            policy: `auto` means `host` until `apply` sets the plan's decision.
            frozen: the content never changes, so it is copied to the host only once.

        Raises:
            ValueError: the part exists already; a storage is freed and owned by no part; or a
                storage cannot be freed (its memory is not torch's) and the policy is not `keep`.
        """
        tensors = list(tensors)
        given = {storage_key(s): s for s in distinct_storages(tensors)}
        shared = [self._owners[key] for key in given if key in self._owners]
        own = {k: s for k, s in given.items() if k not in self._owners and s.nbytes() > 0}
        freed = [t for t in tensors if not is_resident(t) and not self._is_owned(t)]
        if freed:
            raise ValueError(
                f"part {role}.{part}: {len(freed)} of its tensors are freed, and no other part has "
                "them: register that part before this one"
            )
        fixed = [storage for storage in own.values() if not storage.resizable()]
        if fixed and policy != "keep":
            raise ValueError(
                f"roles.{role}.memory.{part}={policy}: {len(fixed)} of its storages cannot be "
                "freed, their memory is not torch's: copy the tensors, or set keep"
            )
        held = TensorPart(list(own.values()), self._mover)
        self._add(
            Part(
                role=role,
                name=part,
                num_bytes=held.num_bytes,
                wish=policy,
                frozen=frozen,
                rests_on=tuple(dict.fromkeys(shared)),
            )
        )
        self._tensors[role, part] = held
        self._owners.update(dict.fromkeys(own, (role, part)))
        self._note_peak()

    def register_foreign(
        self,
        role: str,
        part: str,
        *,
        num_bytes: int,
        leave: Callable[[bool], None],
        bring: Callable[[], None],
        policy: PartWish,
    ) -> None:
        """Take charge of memory of another allocator, which is on the device now.

        Args:
            leave: frees it, and keeps its content elsewhere if its argument is True.
            bring: makes it usable again at the same addresses.

        Raises:
            ValueError: the part exists already.
        """
        self._add(Part(role=role, name=part, num_bytes=num_bytes, wish=policy))
        self._tensors[role, part] = ForeignPart(num_bytes, leave, bring)
        self._note_peak()

    def register_fixed(self, role: str, part: str, *, num_bytes: int) -> None:
        """Count memory that always stays on the device and that nothing can move."""
        self._add(Part(role=role, name=part, num_bytes=num_bytes, wish="keep", fixed=True))
        self._tensors[role, part] = ForeignPart(num_bytes, lambda keeps: None, lambda: None)

    def register_droppable(
        self,
        role: str,
        part: str,
        *,
        drop: Callable[[], None],
        num_bytes: Callable[[], int],
        policy: PartWish = "auto",
        holds: Sequence[PartName] = (),
    ) -> None:
        """Take charge of memory that the role recreates whenever it needs it.

        Args:
            drop: frees it; does nothing if there is nothing to free.
            num_bytes: returns its present size on the device.
            policy: `auto` means `drop` until `apply` sets the plan's decision.
            holds: earlier parts whose addresses it captures; it is dropped before they move.

        Raises:
            ValueError: the part exists already; policy `host`, or `keep` over parts that are not
                kept.
        """
        self._add(
            Part(
                role=role,
                name=part,
                num_bytes=num_bytes(),
                wish=policy,
                droppable=True,
                holds=tuple(holds),
            )
        )
        self._droppables[role, part] = _Droppable(drop=drop, num_bytes=num_bytes)

    def parts(self) -> tuple[Part, ...]:
        """The input of `make_plan`; droppable parts have their present size."""
        return tuple(replace(part, num_bytes=self._size(n)) for n, part in self._parts.items())

    def apply(self, policies: Mapping[PartName, PartPolicy]) -> None:
        """Take over the decisions of a plan. Nothing moves before the next `prepare`.

        Raises:
            ValueError: a part is unknown, or captures are to be kept over parts that move.
        """
        decided = self._policies | dict(policies)
        closure(decided, self._parts)
        assert all(decided[name] != "host" for name in self._droppables), decided
        check_captures(self._parts, decided)
        self._policies = decided

    # Moves

    def prepare(
        self, needs: Sequence[PartName], *, fills: Sequence[PartName] = (), alone: bool = True
    ) -> None:
        """Bring the parts that a call needs, after sending away the others that may go.

        Pinned and kept parts stay. The current stream must be the one that the call computes on.

        Args:
            needs: the parts of the call; parts that they rest on or hold come too.
            fills: parts whose whole content the call writes; it calls `filled` when it has.
            alone: send the others away; without it everything stays, see `has_room`.

        Raises:
            ValueError: a part is unknown, or was dropped and not filled since.
        """
        wanted = closure((*needs, *fills), self._parts)
        for name in wanted:
            if name in self._tensors and name not in fills and not self._tensors[name].is_filled:
                raise ValueError(
                    f"role {name[0]!r}: its {name[1]} were dropped, and nothing has filled them "
                    f"since: sync them before this call, or set {self._parts[name].setting}=host"
                )
        self._exchange(wanted, written=fills, alone=alone)

    def has_room(self, needs: Sequence[PartName], working_bytes: int) -> bool:
        """Whether these parts fit in addition to all resident ones; False without a capacity."""
        if self._capacity is None:
            return False
        missing = sum(self._size(name) for name in self._missing(needs))
        return self.resident_bytes() + working_bytes + missing <= self._capacity

    def _missing(self, needs: Sequence[PartName]) -> list[PartName]:
        wanted = [name for name in closure(needs, self._parts) if name in self._tensors]
        return [name for name in wanted if self._tensors[name].is_away]

    def prefetch(self, needs: Sequence[PartName], *, working_bytes: int = 0) -> bool:
        """Start bringing a later call's parts while the current call runs, if there is room.

        Call it between the current call's `prepare` and its computation: the copies wait for the
        work that the device has queued before. The later call's `prepare` waits for the copies.

        Args:
            working_bytes: bytes that the current call has yet to allocate.

        Returns: whether there was room; without it, or without a capacity, nothing moves.
        """
        if not self.has_room(needs, working_bytes):
            return False
        for name in self._missing(needs):
            self._bring(name)
        self._note_peak()
        return True

    @contextmanager
    def resident(self, role: str, *parts: str) -> Iterator[None]:
        """Bring these parts, and keep them during all calls inside the `with` block.

        Parts that were dropped come too, with undefined content, so that they can be filled.

        Raises:
            ValueError: a part is unknown, or none is named.
        """
        if not parts:
            raise ValueError(f"resident({role!r}): name the parts to hold")
        wanted = closure([(role, part) for part in parts], self._parts)
        pin = frozenset(wanted)
        self._pins.append(pin)
        try:
            self._exchange(wanted)
            yield
        finally:
            self._pins.remove(pin)

    def filled(self, role: str, part: str) -> None:
        """Note that the part's whole content was written after it had been dropped.

        Raises:
            ValueError: the part is unknown, has no tensors, or is not on the device.
        """
        held = self._tensors.get((role, part))
        if held is None or held.is_away:
            raise ValueError(
                f"filled({role!r}, {part!r}): no tensors of that part are on the device; parts "
                f"with tensors are {[dotted(name) for name in self._tensors]}"
            )
        held.filled()

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor with the current values: itself, or the host's copy while its part is away.

        Checkpoints read and write through it without a move: values that are written to the host's
            copy
        come to the device with the part.

        Raises:
            ValueError: the part was dropped.
        """
        if local_part(tensor).numel() == 0:  # an empty shard, whatever its storage is padded to
            return tensor
        name = self._owners.get(storage_key(local_part(tensor).untyped_storage()))
        if is_resident(tensor):
            if name is not None:  # it may be coming, and a writer would outdate the host's copy
                self._tensors[name].hand_out(read_only=self._parts[name].frozen, stays=False)
            return tensor
        assert name is not None, tuple(tensor.shape)
        if not self._tensors[name].is_filled:
            raise ValueError(f"part {dotted(name)} was dropped, and nothing has filled it since")
        return self._tensors[name].host_view(local_part(tensor))

    def drops(self, role: str, part: str) -> bool:
        """Whether the part's content is lost when it leaves the device."""
        return self._policies.get((role, part)) == "drop"

    def settle(self) -> None:
        """Send away all parts that are not kept or pinned.

        Called after each role was built, it keeps the peak of building below the sum of all roles.
        """
        self._note_peak()
        self._send_away(frozenset())

    def resident_bytes(self) -> int:
        """Bytes of all parts that are on the device or coming."""
        return sum(
            self._size(name)
            for name in self._parts
            if name in self._droppables or not self._tensors[name].is_away
        )

    def take_metrics(self) -> dict[str, float]:
        """Bytes and seconds of moves since the last call; see `Meter.take`."""
        return self._meter.take(self.resident_bytes())

    def _exchange(
        self, wanted: Sequence[PartName], written: Sequence[PartName] = (), *, alone: bool = True
    ) -> None:
        """Let the current stream use `wanted`; if `alone`, send away all parts that may go."""
        self._note_peak()  # with the memory that the last call has allocated
        if alone:
            self._send_away(frozenset(wanted))
        tensors = [name for name in wanted if name in self._tensors]
        for name in tensors:
            if self._tensors[name].is_away:
                self._bring(name)
        for name in tensors:
            read_only = self._parts[name].frozen and name not in written
            stays = self._policies[name] == "keep"
            self._tensors[name].hand_out(read_only=read_only, stays=stays)
        self._note_peak()

    def _send_away(self, wanted: frozenset[PartName]) -> None:
        stay = wanted.union(*self._pins)
        leaving = {n for n, policy in self._policies.items() if policy != "keep"} - stay
        # Captures are dropped before the parts that they point into, which were registered earlier.
        for name, droppable in reversed(self._droppables.items()):
            targets = closure(self._parts[name].holds, self._parts)
            if name in leaving or leaving.intersection(targets):
                assert name not in stay, (name, sorted(stay))
                droppable.drop()
        going = [n for n in self._tensors if n in leaving and not self._tensors[n].is_away]
        for name in going:
            if self._policies[name] == "drop":
                self._tensors[name].lose()
        hosted = [self._tensors[name] for name in going if self._policies[name] == "host"]
        started = [(held, held.start_leaving()) for held in hosted]
        for held, ticket in started:
            if ticket is not None:
                ticket.finish()
                self._meter.copied("to_host", ticket)
            held.leave()

    def _bring(self, name: PartName) -> None:
        ticket = self._tensors[name].bring()
        if ticket is not None:
            self._meter.copied("to_device", ticket)

    # Bookkeeping

    def _add(self, part: Part) -> None:
        parts = by_name([*self._parts.values(), part])
        wishes: dict[PartName, PartPolicy] = {}
        for name, each in parts.items():
            unknown: PartPolicy = "drop" if each.holds else "keep"
            wishes[name] = unknown if each.wish == "auto" else each.wish
        check_captures(parts, wishes)
        self._parts = parts
        self._policies[part.key] = part.away if part.wish == "auto" else part.wish

    def _is_owned(self, tensor: Tensor) -> bool:
        return storage_key(local_part(tensor).untyped_storage()) in self._owners

    def _size(self, name: PartName) -> int:
        if name in self._droppables:
            return self._droppables[name].num_bytes()
        return self._tensors[name].num_bytes

    def _note_peak(self) -> None:
        self._meter.resident(self.resident_bytes())
