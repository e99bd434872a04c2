"""Parts of roles as values: what a plan knows of what a role has on the device.

A part is what stays of a role between its calls: `weights`, `optimizer`, `kv_cache`, `graphs`, ...
Working memory (activations, gradients) is none, it comes and goes within a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

PartName = tuple[str, str]
"""(role, part)."""

PartPolicy = Literal["keep", "host", "drop"]
"""Where a part is while no call needs it: on the device, on the host, nowhere."""

PartWish = Literal["keep", "host", "drop", "auto"]
"""A policy as configured; `auto` leaves it to the plan."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a role on this rank.

    Args:
        role, name: as in `roles.ROLE.memory.NAME`.
        num_bytes: on the device, of the part's own: what it shares with an earlier part is that
            one's.
        wish: the configured policy.
        droppable: its role makes it anew when it needs it (a cache); its content is never moved.
        frozen: its content never changes, so that the host's copy stays good.
        rests_on: earlier parts that own some of its storages: who needs it needs them too.
        fixed: nothing can move it.
        holds: parts whose addresses it has captured (CUDA graphs): they may move only after it was
            dropped.

    Raises:
        ValueError: a policy that the part cannot have, naming it.
    """

    role: str
    name: str
    num_bytes: int
    wish: PartWish = "auto"
    droppable: bool = False
    frozen: bool = False
    fixed: bool = False
    rests_on: tuple[PartName, ...] = ()
    holds: tuple[PartName, ...] = ()

    def __post_init__(self) -> None:
        assert self.num_bytes >= 0, (self.key, self.num_bytes)
        assert not self.fixed or self.wish == "keep", (self.key, self.wish)
        assert self.droppable or not self.holds, (self.key, self.holds)
        if self.droppable and self.wish == "host":
            raise ValueError(f"{self.setting}=host: it has nothing worth moving, set keep or drop")

    @property
    def key(self) -> PartName:
        return self.role, self.name

    @property
    def setting(self) -> str:
        """The configuration key that decides about the part."""
        return f"roles.{self.role}.memory.{self.name}"

    @property
    def away(self) -> PartPolicy:
        """What `auto` means where the part cannot stay."""
        return "drop" if self.droppable else "host"


def by_name(parts: Sequence[Part]) -> dict[PartName, Part]:
    """The parts by (role, part).

    Raises:
        ValueError: a part that is there twice, or refers to one that does not come before it.
    """
    found: dict[PartName, Part] = {}
    for part in parts:
        if part.key in found:
            raise ValueError(f"part {dotted(part.key)} is there twice")
        for other in (*part.rests_on, *part.holds):
            if other not in found:
                raise ValueError(
                    f"part {dotted(part.key)} refers to {dotted(other)}, which is not before it: "
                    f"there are {[dotted(name) for name in found]}"
                )
        found[part.key] = part
    return found


def closure(names: Iterable[PartName], parts: Mapping[PartName, Part]) -> list[PartName]:
    """The parts and all that they rest on or hold, each once, what is referred to first.

    Raises:
        ValueError: an unknown part, naming those there are.
    """
    found: dict[PartName, None] = {}

    def add(name: PartName) -> None:
        if name not in parts:
            raise ValueError(
                f"there is no part {dotted(name)} here: there are {[dotted(p) for p in parts]}"
            )
        for other in (*parts[name].rests_on, *parts[name].holds):
            add(other)
        found[name] = None

    for name in names:
        add(name)
    return list(found)


def check_captures(parts: Mapping[PartName, Part], policies: Mapping[PartName, PartPolicy]) -> None:
    """Captured addresses may stay only where the parts that they point into stay.

    Raises:
        ValueError: a part with `holds` is kept and one of those is not, naming both settings.
    """
    for part in parts.values():
        moving = [name for name in closure(part.holds, parts) if policies[name] != "keep"]
        if policies[part.key] == "keep" and moving:
            other = parts[moving[0]]
            raise ValueError(
                f"{part.setting}=keep, but {other.setting}={policies[other.key]}: {part.name} hold "
                f"addresses of {dotted(other.key)}, so set {part.setting}=drop or "
                f"{other.setting}=keep"
            )


def dotted(name: PartName) -> str:
    return ".".join(name)


def size_text(num_bytes: int) -> str:
    """In GB of 10^9 bytes; small sizes in MB or bytes."""
    if num_bytes >= 10**8:
        return f"{num_bytes / 1e9:,.2f} GB"
    if num_bytes >= 10**5:
        return f"{num_bytes / 1e6:,.2f} MB"
    return f"{num_bytes:,} bytes"
