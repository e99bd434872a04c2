"""Placement of roles: from the configuration to ranks and degrees. Pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from spmdrl.config.roles import RoleSection
from spmdrl.config.sections import Config
from spmdrl.distributed.mesh import check_ranks, format_ranks

Roles = Mapping[str, RoleSection]

DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One role's ranks (in mesh order), and its degrees along the mesh's axes and ep."""

    ranks: tuple[int, ...]
    degrees: Mapping[str, int]

    @property
    def num_replicas(self) -> int:
        """Number of replicas that see different rows."""
        return self.degrees["dp_replicate"] * self.degrees["dp_shard"]

    def describe(self) -> str:
        axes = " x ".join(f"{axis}={n}" for axis, n in self.degrees.items())
        return f"ranks {format_ranks(self.ranks)}: {axes}"


def place_roles(
    config: Config, world_size: int, local_size: int | None = None
) -> dict[str, Placement]:
    """Every role's placement, in the configuration's order.

    Ranks are numbered node by node, `local_size` of them on each (by default all on one). With
    `model.tiny`, a configuration for more ranks is folded into the world, so that any configuration
    can be debugged on a laptop.

    Raises:
        ValueError: ranks are outside the world, degrees do not multiply to the ranks, or a
            tensor-parallel group spans several nodes and the role does not allow it.
    """
    local_size = world_size if local_size is None else local_size
    if config.model.tiny:
        local_needed = _local_needed(config.roles, local_size)
        needed = _world_needed(config.roles, local_needed)
        if needed > world_size or local_needed != local_size:
            return _fold(_place(config.roles, needed, local_needed), world_size)
    placements = _place(config.roles, world_size, local_size)
    for name, placement in placements.items():
        if not config.roles[name].tp_across_nodes:
            _check_nodes(name, placement, local_size)
    return placements


def role_device_type(
    name: str,
    section_device: Literal["auto", "cpu"],
    ranks: Sequence[int],
    device_types: Sequence[str],
) -> DeviceType:
    """Device type of role `name`, by `roles.NAME.device` and the device type of every world rank.

    Raises:
        ValueError: some of the role's ranks have a GPU and some have none.
    """
    if section_device == "cpu":
        return "cpu"
    without = [rank for rank in ranks if device_types[rank] != "cuda"]
    if not without:
        return "cuda"
    if len(without) == len(ranks):
        return "cpu"
    having = [rank for rank in ranks if device_types[rank] == "cuda"]
    raise ValueError(
        f"roles.{name}.ranks={format_ranks(ranks)}: ranks {format_ranks(having)} have a GPU, ranks "
        f"{format_ranks(without)} have none; name ranks of one kind, or set "
        f"roles.{name}.device=cpu"
    )


def _place(roles: Roles, world_size: int, local_size: int) -> dict[str, Placement]:
    placements: dict[str, Placement] = {}
    for name, section in roles.items():
        ranks = _ranks(name, roles, local_size) or tuple(range(world_size))
        # ranks outside the world first: they cause wrong degrees
        outside = [rank for rank in ranks if rank >= world_size]
        if outside:
            raise ValueError(
                f"roles.{name}.ranks={section.ranks!r} names ranks {outside}, but the world has "
                f"{world_size} (0-{world_size - 1}), {local_size} per node: start more ranks or "
                "change the key"
            )
        placements[name] = Placement(ranks=ranks, degrees=_degrees(name, section, len(ranks)))
        check_ranks(name, ranks, placements[name].degrees, world_size)
    return placements


def _check_nodes(name: str, placement: Placement, local_size: int) -> None:
    """ValueError if a tensor-parallel group, neighbours in `ranks`, spans several nodes."""
    ranks, tp = placement.ranks, placement.degrees["tp"]
    for start in range(0, len(ranks), tp):
        group = ranks[start : start + tp]
        nodes = sorted({rank // local_size for rank in group})
        if len(nodes) > 1:
            raise ValueError(
                f"roles.{name}.tp={tp} on ranks {format_ranks(ranks)}, {local_size} per node, puts "
                f"the tensor-parallel group {format_ranks(group)} on the nodes "
                f"{format_ranks(nodes)}, where every layer would wait for the network: lower "
                f"roles.{name}.tp, name other ranks, or set roles.{name}.tp_across_nodes=true"
            )


def _named_ranks(name: str, roles: Roles) -> str:
    """`roles.NAME.ranks` as text, with `same as ROLE` followed to the role that has its own."""
    given = roles[name].ranks
    text = str(given).strip()
    seen = [name]
    while text.startswith("same as "):
        other = text.removeprefix("same as ").strip()
        if other not in roles or other in seen:
            raise ValueError(
                f"roles.{name}.ranks={given!r}: {other!r} is not another role with ranks of its "
                f"own; there are {sorted(roles)}"
            )
        seen.append(other)
        text = str(roles[other].ranks).strip()
    return text


def _named_nodes(name: str, roles: Roles) -> tuple[int, ...] | None:
    """The nodes that `roles.NAME.ranks` names; None if it names ranks."""
    text = _named_ranks(name, roles)
    if not text.startswith("nodes "):
        return None
    return _numbers(name, roles, text.removeprefix("nodes "))


def _ranks(name: str, roles: Roles, local_size: int) -> tuple[int, ...] | None:
    """The ranks that `roles.NAME.ranks` names; None for all."""
    text = _named_ranks(name, roles)
    if text == "all":
        return None
    nodes = _named_nodes(name, roles)
    if nodes is None:
        return _numbers(name, roles, text)
    return tuple(node * local_size + local for node in nodes for local in range(local_size))


def _numbers(name: str, roles: Roles, text: str) -> tuple[int, ...]:
    """`0-2,5` -> (0, 1, 2, 5), ascending."""
    given = roles[name].ranks
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ValueError(
                f"roles.{name}.ranks={given!r}: write all, 0-3, 0,2, nodes 0-1 or same as ROLE"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        numbers += range(first, last + 1)
    if not numbers or numbers != sorted(set(numbers)):
        raise ValueError(f"roles.{name}.ranks={given!r}: ranks must ascend, each named once")
    return tuple(numbers)


def _degrees(name: str, section: RoleSection, num_ranks: int) -> dict[str, int]:
    """Fill in the open degrees: dp_shard `all`, then dp_replicate."""
    inner = section.pp * section.cp * section.tp
    if section.dp_shard == "all":
        shard = max(1, num_ranks // (inner * (section.dp_replicate or 1)))
    else:
        shard = section.dp_shard
    replicate = section.dp_replicate or max(1, num_ranks // (inner * shard))
    degrees = {
        "pp": section.pp,
        "dp_replicate": replicate,
        "dp_shard": shard,
        "cp": section.cp,
        "tp": section.tp,
    }
    if math.prod(degrees.values()) != num_ranks:
        shown = " x ".join(f"roles.{name}.{axis}={n}" for axis, n in degrees.items() if n > 1)
        raise ValueError(
            f"{shown or 'degrees of 1'} make {math.prod(degrees.values())} ranks, but "
            f"roles.{name}.ranks={section.ranks!r} are {num_ranks}"
        )
    return {**degrees, "ep": section.ep}


def _least(section: RoleSection) -> int:
    """Divisor of the number of ranks, given the degrees that are set explicitly."""
    shard = 1 if section.dp_shard == "all" else section.dp_shard
    written = section.pp * (section.dp_replicate or 1) * shard * section.cp * section.tp
    return math.lcm(written, section.pp * math.lcm(section.tp, section.ep))


def _local_needed(roles: Roles, local_size: int) -> int:
    """Ranks per node that suit the degrees of roles on named nodes; `local_size` if it does."""
    needed, fixed = 1, False
    for name, section in roles.items():
        if (nodes := _named_nodes(name, roles)) is not None:
            least = _least(section)
            needed = math.lcm(needed, least // math.gcd(least, len(nodes)))
            fixed = fixed or (section.dp_replicate is not None and section.dp_shard != "all")
    return local_size if local_size % needed == 0 and not fixed else needed


def _world_needed(roles: Roles, local_size: int) -> int:
    """The smallest world in which every role has the ranks that its ranks and degrees ask for."""
    highest, divisor = 0, 1
    for name, section in roles.items():
        if (ranks := _ranks(name, roles, local_size)) is not None:
            highest = max(highest, ranks[-1])
        else:
            divisor = math.lcm(divisor, _least(section))
    return -(-(highest + 1) // divisor) * divisor


def _fold(placements: Mapping[str, Placement], world_size: int) -> dict[str, Placement]:
    """Placements of a larger world on `world_size` ranks.

    Ranks that serve the same roles form a cell. Every cell keeps at least one rank of its own while
    there are enough, so that roles on disjoint ranks stay disjoint; further ranks go to the cell
    with the most original ranks per rank. Degrees are cut to the remaining ranks, tp last, before
    it pp, cp, dp_shard; ep is cut to a divisor of these.
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
    """A range of ranks for each cell; cells share ranks only if there are more cells than ranks."""
    if len(sizes) >= world_size:
        places = [i * world_size // len(sizes) for i in range(len(sizes))]
        return [range(place, place + 1) for place in places]
    room = [1] * len(sizes)
    for _ in range(min(world_size, sum(sizes)) - len(sizes)):
        room[max(range(len(sizes)), key=lambda i: (sizes[i] / room[i], -i))] += 1
    return [range(stop - own, stop) for own, stop in zip(room, accumulate(room), strict=True)]


def _fold_degrees(degrees: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    folded = dict.fromkeys(degrees, 1)
    for axis in ("tp", "pp", "cp", "dp_shard"):
        folded[axis] = math.gcd(degrees[axis], num_ranks)
        if axis == "pp":  # a tiny model has two layers
            folded[axis] = math.gcd(folded[axis], 2)
        num_ranks //= folded[axis]
    folded["dp_replicate"] = num_ranks
    inside_tp = degrees["tp"] % degrees["ep"] == 0  # a rollout requires it
    shard = folded["dp_shard"] * folded["cp"] * (1 if folded["dp_shard"] > 1 else num_ranks)
    room = folded["tp"] * (1 if inside_tp else shard)
    return folded | {"ep": math.gcd(degrees["ep"], room)}


def placement_table(
    placements: Mapping[str, Placement], memory: Mapping[str, str] | None = None
) -> str:
    """Role, ranks and degrees as an aligned table, for the start of a run and `explain`.

    `memory`: text by role for the last column, which is empty for other roles.
    """
    axes = list(next(iter(placements.values())).degrees)
    for rare in ("pp", "ep"):
        if all(placement.degrees[rare] == 1 for placement in placements.values()):
            axes.remove(rare)
    lines = [["role", "ranks", *axes, *([] if memory is None else ["memory"])]]
    for name, placement in placements.items():
        degrees = [str(placement.degrees[axis]) for axis in axes]
        texts = [] if memory is None else [memory.get(name, "")]
        lines.append([name, format_ranks(placement.ranks), *degrees, *texts])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # degrees are numbers: align them to the right
    aligned = [">" if column in axes else "<" for column in lines[0]]
    layout = "".join(f"  {{:{a}{w}}}" for a, w in zip(aligned, widths, strict=True))
    return "\n".join(layout.format(*line).rstrip() for line in lines)
