"""Where roles live: from the configuration to ranks and degrees. Pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

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
    if config.model.tiny and (needed := _world_needed(config)) > world_size:
        return _fold(_place(config, needed), world_size)
    return _place(config, world_size)


def _place(config: Config, world_size: int) -> dict[str, Placement]:
    placements: dict[str, Placement] = {}
    for name, section in config.roles.items():
        ranks = _ranks(name, config) or tuple(range(world_size))
        # ranks outside the world first: degrees that do not fit follow from them
        outside = [rank for rank in ranks if rank >= world_size]
        if outside:
            raise ValueError(
                f"roles.{name}.ranks={section.ranks!r} names ranks {outside}, but the world has "
                f"{world_size} (0-{world_size - 1}): start more ranks or change the key"
            )
        placements[name] = Placement(ranks=ranks, degrees=_degrees(name, section, len(ranks)))
        check_ranks(name, ranks, placements[name].degrees, world_size)
    return placements


def _ranks(name: str, config: Config) -> tuple[int, ...] | None:
    """The ranks that `roles.NAME.ranks` names; None for all."""
    given = config.roles[name].ranks
    text = str(given).strip()
    seen = [name]
    while text.startswith("same as "):
        other = text.removeprefix("same as ").strip()
        if other not in config.roles or other in seen:
            raise ValueError(
                f"roles.{name}.ranks={given!r}: {other!r} is not another role with ranks of its "
                f"own; there are {sorted(config.roles)}"
            )
        seen.append(other)
        text = str(config.roles[other].ranks).strip()
    if text == "all":
        return None
    ranks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ValueError(f"roles.{name}.ranks={given!r}: write all, 0-3, 0,2 or same as ROLE")
        first, last = int(match[1]), int(match[2] or match[1])
        ranks += range(first, last + 1)
    if not ranks or ranks != sorted(set(ranks)):
        raise ValueError(f"roles.{name}.ranks={given!r}: ranks must ascend, each named once")
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


def _world_needed(config: Config) -> int:
    """The smallest world in which every role has room: what its ranks and degrees ask for."""
    highest, divisor = 0, 1
    for name, section in config.roles.items():
        if (ranks := _ranks(name, config)) is not None:
            highest = max(highest, ranks[-1])
            continue
        shard = 1 if section.dp_shard == "all" else section.dp_shard
        least = (section.dp_replicate or 1) * shard * section.cp * section.tp
        divisor = math.lcm(divisor, least)
    return -(-(highest + 1) // divisor) * divisor


def _fold(placements: Mapping[str, Placement], world_size: int) -> dict[str, Placement]:
    """Placements of a larger world on `world_size` ranks.

    Ranks that serve the same roles form a cell. Every cell keeps at least one rank of its own while
    there are enough, so that roles on disjoint ranks stay so; the rest go where the most ranks were
    folded into one. Degrees are cut to the ranks left, tp kept longest, then cp, then dp_shard.
    """
    cells: dict[frozenset[str], int] = {}
    for rank in sorted({rank for p in placements.values() for rank in p.ranks}):
        roles = frozenset(name for name, p in placements.items() if rank in p.ranks)
        cells[roles] = cells.get(roles, 0) + 1
    room = _share(list(cells.values()), world_size)
    folded = {}
    for name, placement in placements.items():
        ranks = sorted(
            {r for roles, own in zip(cells, room, strict=True) if name in roles for r in own}
        )
        folded[name] = Placement(
            ranks=tuple(ranks), degrees=_fold_degrees(placement.degrees, len(ranks))
        )
    return folded


def _share(sizes: Sequence[int], world_size: int) -> list[range]:
    """A range of ranks for each cell; cells share ranks only when they outnumber them."""
    if len(sizes) >= world_size:
        places = [i * world_size // len(sizes) for i in range(len(sizes))]
        return [range(place, place + 1) for place in places]
    room = [1] * len(sizes)
    for _ in range(min(world_size, sum(sizes)) - len(sizes)):
        room[max(range(len(sizes)), key=lambda i: (sizes[i] / room[i], -i))] += 1
    return [range(stop - own, stop) for own, stop in zip(room, accumulate(room), strict=True)]


def _fold_degrees(degrees: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    folded = dict.fromkeys(degrees, 1)
    for axis in ("tp", "cp", "dp_shard"):
        folded[axis] = math.gcd(degrees[axis], num_ranks)
        num_ranks //= folded[axis]
    return folded | {"dp_replicate": num_ranks}


def placement_table(placements: Mapping[str, Placement]) -> str:
    """Role, ranks and axes as aligned lines, for the start of a run and `explain`."""
    width = max(len(name) for name in placements)
    return "\n".join(f"  {name:<{width}}  {p.describe()}" for name, p in placements.items())
