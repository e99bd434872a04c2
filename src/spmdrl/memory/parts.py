"""Parts of roles as values: the facts that a plan needs about a role's memory on the device.

A part is memory that a role keeps between its calls: `weights`, `optimizer`, `kv_cache`, `graphs`,
... Working memory (activations, gradients) is not a part; it exists only within a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

PartKey = tuple[str, str]
"""(role, part)."""

Residency = Literal["keep", "host", "drop"]
"""Place of a part while no call needs it: on the device, on the host, or nowhere."""

ResidencyWish = Literal["keep", "host", "drop", "auto"]
"""A residency as configured; `auto` lets the plan decide."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a role on this rank.

    Args:
        role, name: names as in `roles.ROLE.residency.NAME`.
        num_bytes: the part's own bytes on the device, without those it shares with an earlier part.
        on_host: bytes of it that stay on the host and are never on the device as a whole.
        wish: the configured policy.
        droppable: its role recreates it when needed (a cache); its content is never moved.
        frozen: its content never changes, so the host's copy stays valid.
        rests_on: earlier parts that own some of its storages; a call that needs it needs them too.
        fixed: nothing can move it.
        may_lose: `auto` may drop it where every use of it follows a call that overwrites it.
        is_capture: it has captured addresses (CUDA graphs).
        holds: parts whose addresses it has captured and that may come back at others; they may move
            only after it was dropped.

    Raises:
        ValueError: the part cannot have this residency; its setting is named.
    """

    role: str
    name: str
    num_bytes: int
    on_host: int = 0
    wish: ResidencyWish = "auto"
    droppable: bool = False
    frozen: bool = False
    fixed: bool = False
    may_lose: bool = False
    is_capture: bool = False
    rests_on: tuple[PartKey, ...] = ()
    holds: tuple[PartKey, ...] = ()

    def __post_init__(self) -> None:
        assert self.num_bytes >= 0, (self.key, self.num_bytes)
        assert not self.fixed or self.wish == "keep", (self.key, self.wish)
        assert self.droppable or not self.holds, (self.key, self.holds)
        if self.droppable and self.wish == "host":
            raise ValueError(f"{self.setting}=host: it has nothing worth moving, set keep or drop")

    @property
    def key(self) -> PartKey:
        return self.role, self.name

    @property
    def setting(self) -> str:
        """The configuration key that sets the part's policy."""
        return f"roles.{self.role}.residency.{self.name}"

    @property
    def away(self) -> Residency:
        """The residency that `auto` becomes if the part cannot stay."""
        return "drop" if self.droppable else "host"


def by_key(parts: Sequence[Part]) -> dict[PartKey, Part]:
    """The parts by (role, part).

    Raises:
        ValueError: a part occurs twice, or refers to one that does not come before it.
    """
    found: dict[PartKey, Part] = {}
    for part in parts:
        if part.key in found:
            raise ValueError(f"part {dotted(part.key)} exists twice")
        for other in (*part.rests_on, *part.holds):
            if other not in found:
                raise ValueError(
                    f"part {dotted(part.key)} refers to {dotted(other)}, which is not before it: "
                    f"there are {[dotted(name) for name in found]}"
                )
        found[part.key] = part
    return found


def closure(names: Iterable[PartKey], parts: Mapping[PartKey, Part]) -> list[PartKey]:
    """The parts and all parts that they rest on or hold, each once, after those it refers to.

    Raises:
        ValueError: a part is unknown; the known ones are named.
    """
    found: dict[PartKey, None] = {}

    def add(name: PartKey) -> None:
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


def check_captures(parts: Mapping[PartKey, Part], residencies: Mapping[PartKey, Residency]) -> None:
    """Check that captured addresses stay only if the parts that they point into stay.

    Raises:
        ValueError: a part with `holds` is kept but one of these is not; both settings are named.
    """
    for part in parts.values():
        moving = [name for name in closure(part.holds, parts) if residencies[name] != "keep"]
        if residencies[part.key] == "keep" and moving:
            other = parts[moving[0]]
            raise ValueError(
                f"{part.setting}=keep, but {other.setting}={residencies[other.key]}: {part.name} "
                f"hold addresses of {dotted(other.key)}, so set {part.setting}=drop or "
                f"{other.setting}=keep"
            )


def dotted(name: PartKey) -> str:
    return ".".join(name)


def size_text(num_bytes: int) -> str:
    """A size in GB of 10^9 bytes; small sizes in MB or bytes."""
    if num_bytes >= 10**8:
        return f"{num_bytes / 1e9:,.2f} GB"
    if num_bytes >= 10**5:
        return f"{num_bytes / 1e6:,.2f} MB"
    return f"{num_bytes:,} bytes"
