"""Where roles live: from the configuration to ranks and degrees. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from spmdrl.config import Config, RoleSection
from spmdrl.distributed.mesh import check_ranks, format_ranks


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One role's ranks (mesh order) and degrees (dp_replicate, dp_shard, cp, tp)."""

    ranks: tuple[int, ...]
    degrees: Mapping[str, int]

    @property
    def num_replicas(self) -> int:
        """Replicas that see different rows."""
        return self.degrees["dp_replicate"] * self.degrees["dp_shard"]

    def describe(self) -> str:
        axes = " x ".join(f"{axis}={n}" for axis, n in self.degrees.items())
        return f"ranks {format_ranks(self.ranks)}: {axes}"


def place_roles(config: Config, world_size: int) -> dict[str, Placement]:
    """Every role's placement, in the configuration's order.

    With `model.tiny` a configuration for more ranks is folded into the world: so that any
    configuration can be debugged on a laptop.

    Raises:
        ValueError: ranks outside the world, or degrees that do not multiply to the ranks.
    """
    needed = _ranks_needed(config, world_size)
    if config.model.tiny and needed > world_size:
        return _fold(place_roles(config, needed), needed, world_size)
    placements: dict[str, Placement] = {}
    for name, section in config.roles.items():
        ranks = _ranks(name, section, config, world_size)
        placements[name] = Placement(ranks=ranks, degrees=_degrees(name, section, len(ranks)))
        check_ranks(name, ranks, placements[name].degrees, world_size)
    return placements


def _ranks(name: str, section: RoleSection, config: Config, world_size: int) -> tuple[int, ...]:
    text = str(section.ranks).strip()
    seen = [name]
    while text.startswith("same as "):
        other = text.removeprefix("same as ").strip()
        if other not in config.roles or other in seen:
            raise ValueError(
                f"roles.{name}.ranks={section.ranks!r}: {other!r} is not another role; "
                f"there are {sorted(config.roles)}"
            )
        seen.append(other)
        text = str(config.roles[other].ranks).strip()
    if text == "all":
        return tuple(range(world_size))
    ranks: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(
                f"roles.{name}.ranks={section.ranks!r}: write all, 0-3, 0,2 or same as ROLE"
            )
        ranks += range(int(first), int(last if dash else first) + 1)
    return tuple(ranks)


def _degrees(name: str, section: RoleSection, num_ranks: int) -> dict[str, int]:
    """Fill in what is left open: dp_shard `all`, then dp_replicate."""
    inner = section.cp * section.tp
    if section.dp_shard == "all":
        shard = max(1, num_ranks // (inner * (section.dp_replicate or 1)))
    else:
        shard = section.dp_shard
    replicate = section.dp_replicate or max(1, num_ranks // (inner * shard))
    degrees = {"dp_replicate": replicate, "dp_shard": shard, "cp": section.cp, "tp": section.tp}
    if math.prod(degrees.values()) != num_ranks:
        shown = " x ".join(f"roles.{name}.{axis}={n}" for axis, n in degrees.items() if n > 1)
        raise ValueError(
            f"{shown or 'degrees of 1'} make {math.prod(degrees.values())} ranks, but "
            f"roles.{name}.ranks={section.ranks!r} are {num_ranks}"
        )
    return degrees


def _ranks_needed(config: Config, world_size: int) -> int:
    """The smallest world in which every role has room."""
    needed = 1
    for name, section in config.roles.items():
        ranks = _ranks(name, section, config, world_size)
        shard = 1 if section.dp_shard == "all" else section.dp_shard
        least = shard * section.cp * section.tp * (section.dp_replicate or 1)
        spread = section.ranks == "all" or str(section.ranks).startswith("same as ")
        needed = max(needed, least if spread else max(ranks) + 1)
    return needed


def _fold(
    placements: Mapping[str, Placement], needed: int, world_size: int
) -> dict[str, Placement]:
    """Ranks scaled down in proportion; degrees cut, tp kept longest, then cp, then dp_shard."""
    folded = {}
    for name, placement in placements.items():
        ranks = tuple(sorted({rank * world_size // needed for rank in placement.ranks}))
        room = len(ranks)
        degrees = dict.fromkeys(placement.degrees, 1)
        for axis in ("tp", "cp", "dp_shard"):
            degrees[axis] = math.gcd(placement.degrees[axis], room)
            room //= degrees[axis]
        degrees["dp_replicate"] = room
        folded[name] = Placement(ranks=ranks, degrees=degrees)
    return folded


def placement_table(placements: Mapping[str, Placement]) -> str:
    """Role, ranks and axes as aligned lines, for the start of a run and `explain`."""
    width = max(len(name) for name in placements)
    return "\n".join(f"  {name:<{width}}  {p.describe()}" for name, p in placements.items())
