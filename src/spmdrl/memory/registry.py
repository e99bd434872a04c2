"""`PartRegistry`: the parts of this rank's roles, who holds their memory, and their residencies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from spmdrl.memory.mapped import MappedArena
from spmdrl.memory.mover import Mover
from spmdrl.memory.parts import (
    Part,
    PartKey,
    Residency,
    ResidencyWish,
    by_key,
    check_captures,
    closure,
)
from spmdrl.memory.storages import distinct_storages, is_resident, local_part, storage_key
from spmdrl.memory.tensor_part import ForeignPart, TensorPart


@dataclass(frozen=True, kw_only=True, eq=False)
class Droppable:
    """Memory that its role recreates: `drop` frees it, `num_bytes` returns its present size.

    Args:
        most: bytes up to which it may stay between calls; None: any.
        is_mapped: whether torch's allocator does not know of it, see `MappedMemory`.
    """

    drop: Callable[[], None]
    num_bytes: Callable[[], int]
    most: int | None = None
    is_mapped: bool = False

    @property
    def is_too_large(self) -> bool:
        """Whether a call has made more than may stay."""
        return self.most is not None and self.num_bytes() > self.most


class PartRegistry:
    """The parts by key, in the order of their registration.

    Args:
        mover: what copies the parts' tensors.
    """

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self.by_key: dict[PartKey, Part] = {}
        self.residencies: dict[PartKey, Residency] = {}
        self.tensors: dict[PartKey, TensorPart | ForeignPart] = {}
        self.droppables: dict[PartKey, Droppable] = {}
        self._owners: dict[int, PartKey] = {}
        """Storage -> the part that owns it."""

    def register(
        self,
        role: str,
        part: str,
        *,
        tensors: Iterable[Tensor],
        residency: ResidencyWish = "auto",
        frozen: bool = False,
        memory: MappedArena | None = None,
    ) -> None:
        """Take charge of the tensors' storages, which hold their content now.

        A storage that an earlier part owns stays with that part and its policy. This part then
        rests on that one: a call that needs this part needs all of that one too.

        Args:
            residency: `auto` means `host` until `apply` sets the plan's decision.
            frozen: the content never changes, so it is copied to the host only once.
            memory: that of all storages which no earlier part owns, if they keep their addresses.

        Raises:
            ValueError: the part exists already; a storage is freed and owned by no part; or a
                storage cannot be freed (its memory is not torch's) and the residency is not `keep`.
        """
        tensors = list(tensors)
        given = {storage_key(s): s for s in distinct_storages(tensors)}
        shared = [self._owners[key] for key in given if key in self._owners]
        own = {k: s for k, s in given.items() if k not in self._owners and s.nbytes() > 0}
        freed = [t for t in tensors if not is_resident(t) and self.owner(t) is None]
        if freed:
            raise ValueError(
                f"part {role}.{part}: {len(freed)} of its tensors are freed, and no other part has "
                "them: register that part before this one"
            )
        fixed = [storage for storage in own.values() if not storage.resizable()]
        if fixed and memory is None and residency != "keep":
            raise ValueError(
                f"roles.{role}.residency.{part}={residency}: {len(fixed)} of its storages cannot "
                "be freed, their memory is not torch's: copy the tensors, or set keep"
            )
        held = TensorPart(list(own.values()), self._mover, memory)
        self._add(
            Part(
                role=role,
                name=part,
                num_bytes=held.num_bytes,
                wish=residency,
                frozen=frozen,
                rests_on=tuple(dict.fromkeys(shared)),
            )
        )
        self.tensors[role, part] = held
        self._owners.update(dict.fromkeys(own, (role, part)))

    def register_foreign(
        self,
        role: str,
        part: str,
        *,
        num_bytes: int,
        leave: Callable[[bool], None],
        bring: Callable[[], None],
        residency: ResidencyWish,
    ) -> None:
        """Take charge of memory of another allocator, which is on the device now.

        Args:
            leave: frees it, and keeps its content elsewhere if its argument is True.
            bring: makes it usable again at the same addresses.

        Raises:
            ValueError: the part exists already.
        """
        self._add(Part(role=role, name=part, num_bytes=num_bytes, wish=residency))
        self.tensors[role, part] = ForeignPart(num_bytes, leave, bring)

    def register_fixed(self, role: str, part: str, *, num_bytes: int) -> None:
        """Count memory that always stays on the device and that nothing can move."""
        self._add(Part(role=role, name=part, num_bytes=num_bytes, wish="keep", fixed=True))
        self.tensors[role, part] = ForeignPart(num_bytes, lambda keeps: None, lambda: None)

    def register_droppable(
        self,
        role: str,
        part: str,
        *,
        drop: Callable[[], None],
        num_bytes: Callable[[], int],
        most: int | None = None,
        is_mapped: bool = False,
        residency: ResidencyWish = "auto",
        holds: Sequence[PartKey] = (),
    ) -> None:
        """Take charge of memory that the role recreates whenever it needs it.

        Args:
            drop: frees it; does nothing if there is nothing to free.
            num_bytes: returns its present size on the device.
            most: the plan's size: if a call makes more, it goes once a call does not need it,
                whatever the residency. None: it may stay.
            residency: `auto` means `drop` until `apply` sets the plan's decision.
            is_mapped: see `Droppable`.
            holds: earlier parts whose addresses it captures; it is dropped before they move.

        Raises:
            ValueError: the part exists already; residency `host`, or `keep` over parts that are not
                kept.
        """
        self._add(
            Part(
                role=role,
                name=part,
                num_bytes=num_bytes(),
                wish=residency,
                droppable=True,
                holds=tuple(holds),
            )
        )
        self.droppables[role, part] = Droppable(
            drop=drop, num_bytes=num_bytes, most=most, is_mapped=is_mapped
        )

    def parts(self) -> tuple[Part, ...]:
        """The input of `make_plan`; droppable parts have their present size."""
        return tuple(replace(part, num_bytes=self.size(n)) for n, part in self.by_key.items())

    def apply(self, residencies: Mapping[PartKey, Residency]) -> None:
        """Take over the decisions of a plan. Nothing moves before the next `prepare`.

        Raises:
            ValueError: a part is unknown, or captures are to be kept over parts that move.
        """
        decided = self.residencies | dict(residencies)
        closure(decided, self.by_key)
        assert all(decided[name] != "host" for name in self.droppables), decided
        check_captures(self.by_key, decided)
        self.residencies = decided

    def owner(self, tensor: Tensor) -> PartKey | None:
        """Return the part that owns the tensor's storage."""
        return self._owners.get(storage_key(local_part(tensor).untyped_storage()))

    def drops(self, role: str, part: str) -> bool:
        """Whether the part's content is lost when it leaves the device."""
        return self.residencies.get((role, part)) == "drop"

    def size(self, key: PartKey) -> int:
        """Return the part's present bytes."""
        droppable = self.droppables.get(key)
        return self.tensors[key].num_bytes if droppable is None else droppable.num_bytes()

    def resident_bytes(self) -> int:
        """Return the bytes of all parts that are on the device or coming."""
        return sum(
            self.size(key)
            for key in self.by_key
            if key in self.droppables or not self.tensors[key].is_away
        )

    def mapped_bytes(self) -> int:
        """Return the bytes on the device of which torch's allocator does not know."""
        droppables = [held.num_bytes() for held in self.droppables.values() if held.is_mapped]
        return sum(droppables) + sum(held.mapped_bytes for held in self.tensors.values())

    def _add(self, part: Part) -> None:
        parts = by_key([*self.by_key.values(), part])
        wishes: dict[PartKey, Residency] = {}
        for key, each in parts.items():
            unknown: Residency = "drop" if each.holds else "keep"
            wishes[key] = unknown if each.wish == "auto" else each.wish
        check_captures(parts, wishes)
        self.by_key = parts
        self.residencies[part.key] = part.away if part.wish == "auto" else part.wish
