"""Placement of roles: from the configuration to ranks and degrees. Pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from spmdrl.config.roles import WITH_ENGINE, MegatronSettings, RoleSection
from spmdrl.config.sections import Config
from spmdrl.distributed.folding import TINY_LIMITS, fold_degrees, fold_ranks
from spmdrl.distributed.mesh import check_ranks, format_ranks

Roles = Mapping[str, RoleSection]

DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One role's ranks (in mesh order), and its degrees along the mesh's axes and ep.

    Args:
        folded_from: its place in the world that the configuration is for, if that is another.
    """

    ranks: tuple[int, ...]
    degrees: Mapping[str, int]
    folded_from: Placement | None = None

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
    `fold` or `model.tiny` a configuration for other ranks is folded into the world
    (`distributed.folding`).

    Raises:
        ValueError: ranks are outside the world, degrees do not multiply to the ranks, or a
            tensor-parallel group spans several nodes and the role does not allow it.
    """
    local_size = world_size if local_size is None else local_size
    if config.fold or config.model.tiny:
        return _fold(config, world_size, local_size)
    placements = _place(config.roles, world_size, local_size)
    for name, placement in placements.items():
        if not config.roles[name].tp_across_nodes:
            _check_nodes(name, placement, local_size)
    return placements


def fold_text(config: Config, placements: Mapping[str, Placement], world_size: int) -> str | None:
    """Tell in one line what a fold has changed; None: nothing."""
    before = [placement.folded_from or placement for placement in placements.values()]
    roles: dict[str, list[str]] = {}
    for name, placement in placements.items():
        if changes := list(_changes(config.roles[name], placement)):
            roles.setdefault(", ".join(changes), []).append(name)
    if not roles:
        return None
    needed = 1 + max(placement.ranks[-1] for placement in before)
    idle = set(range(world_size)).difference(
        *(placement.ranks for placement in placements.values())
    )
    texts = [f"{', '.join(names)}: {changes}" for changes, names in roles.items()]
    texts += [f"ranks {format_ranks(sorted(idle))} have no role"] if idle else []
    return f"folded from {needed} ranks to {world_size}: {'; '.join(texts)}"


def _changes(section: RoleSection, placement: Placement) -> Iterator[str]:
    """Yield what a fold has changed of one role, a text for each."""
    before = placement.folded_from
    if before is None:
        return
    if before.ranks != placement.ranks:
        yield f"ranks {format_ranks(before.ranks)} -> {format_ranks(placement.ranks)}"
    for axis, degree in before.degrees.items():
        if degree != placement.degrees[axis]:
            yield f"{axis} {degree} -> {placement.degrees[axis]}"
    kept = kept_megatron(section, placement)
    for key, value in section.megatron.items():
        if key not in kept:
            yield f"megatron.{key} {str(value).lower()} -> {'false' if value is True else 1}"


def kept_megatron(section: RoleSection, placement: Placement) -> MegatronSettings:
    """Megatron's settings of a role, without those that a folded axis has taken the ranks from."""
    given = section.megatron
    if placement.folded_from is None:
        return given
    kept = MegatronSettings()
    if "vpp" in given and placement.degrees["pp"] > 1:
        kept["vpp"] = given["vpp"]
    if "sp" in given and placement.degrees["tp"] > 1:
        kept["sp"] = given["sp"]
    return kept


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
                f"{world_size} (0-{world_size - 1}), {local_size} per node: start more ranks, "
                "change the key, or run on these with --fold"
            )
        placements[name] = Placement(ranks=ranks, degrees=_degrees(name, section, len(ranks)))
        check_ranks(name, ranks, placements[name].degrees, world_size)
    return placements


def _check_nodes(name: str, placement: Placement, local_size: int) -> None:
    """ValueError if a tensor-parallel group, neighbours in `ranks`, spans several nodes."""
    ranks, tp = placement.ranks, placement.degrees["tp"]
    for group, nodes in _spread_groups(ranks, tp, local_size):
        raise ValueError(
            f"roles.{name}.tp={tp} on ranks {format_ranks(ranks)}, {local_size} per node, puts "
            f"the tensor-parallel group {format_ranks(group)} on the nodes "
            f"{format_ranks(nodes)}, where every layer would wait for the network: lower "
            f"roles.{name}.tp, name other ranks, or set roles.{name}.tp_across_nodes=true"
        )


def _spread_groups(
    ranks: Sequence[int], tp: int, local_size: int
) -> Iterator[tuple[Sequence[int], list[int]]]:
    """Tensor-parallel groups on several nodes, each with these nodes."""
    for start in range(0, len(ranks), tp):
        group = ranks[start : start + tp]
        nodes = sorted({rank // local_size for rank in group})
        if len(nodes) > 1:
            yield group, nodes


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
            f"roles.{name}.ranks={section.ranks!r} are {num_ranks}: change one of them, or run on "
            "these with --fold"
        )
    return {**degrees, "ep": section.ep}


def _is_fixed(section: RoleSection) -> bool:
    """Whether the degrees that are set leave no choice of the number of ranks."""
    return section.dp_replicate is not None and section.dp_shard != "all"


def _least(section: RoleSection) -> int:
    """Divisor of the number of ranks, given the degrees that are set explicitly."""
    inner, cp = section.pp * section.tp, section.cp
    # the ranks of dp and cp hold the parts of the experts that tp leaves
    with_experts = math.lcm(cp, section.ep // math.gcd(section.tp, section.ep))
    if section.dp_shard == "all":
        return inner * (section.dp_replicate or 1) * with_experts
    if section.dp_shard == 1 and section.dp_replicate is None:
        return inner * with_experts
    return inner * (section.dp_replicate or 1) * section.dp_shard * cp


def _local_needed(roles: Roles, local_size: int) -> int:
    """Ranks per node that suit the degrees of roles on named nodes; `local_size` if it does."""
    needed, fixed = 1, False
    for name, section in roles.items():
        if (nodes := _named_nodes(name, roles)) is not None:
            least = _least(section)
            needed = math.lcm(needed, least // math.gcd(least, len(nodes)))
            fixed = fixed or _is_fixed(section)
    return local_size if local_size % needed == 0 and not fixed else needed


def _world_needed(roles: Roles, world_size: int, local_size: int) -> int:
    """Number of ranks of the world that the ranks and degrees of all roles ask for: `world_size` if
    it suits, otherwise the smallest larger one; or a smaller one where nothing else does.
    """
    highest, divisor, fixed = 0, 1, False
    for name, section in roles.items():
        if (ranks := _ranks(name, roles, local_size)) is not None:
            highest = max(highest, ranks[-1])
        else:
            divisor = math.lcm(divisor, _least(section))
            fixed = fixed or _is_fixed(section)
    least = highest + 1 if fixed else max(highest + 1, world_size)
    return -(-least // divisor) * divisor


def _fold(config: Config, world_size: int, local_size: int) -> dict[str, Placement]:
    """Placements on these ranks, folded as far as the configuration is for others."""
    roles = config.roles
    local_needed = _local_needed(roles, local_size)
    needed = _world_needed(roles, world_size, local_needed)
    wanted = _place(roles, needed, local_needed)
    ranks = {name: placement.ranks for name, placement in wanted.items()}
    if needed > world_size or local_needed != local_size:
        ranks = fold_ranks(ranks, world_size)
    folded = {}
    for name, before in wanted.items():
        # roles of one backend that share a base must remain alike
        is_alike = config.role_kind(name) not in WITH_ENGINE
        section = roles[(roles[name].base if is_alike else None) or name]
        limits = TINY_LIMITS if config.model.tiny else {}
        tp = math.gcd(before.degrees["tp"], len(ranks[name]), limits.get("tp", 0))
        if not section.tp_across_nodes:
            tp = _tp_within_nodes(ranks[name], tp, local_size)
        degrees = fold_degrees(
            before.degrees,
            len(ranks[name]),
            limits={**limits, "tp": tp},
            shards_all=section.dp_shard == "all",
        )
        after = Placement(ranks=ranks[name], degrees=degrees)
        folded[name] = before if after == before else replace(after, folded_from=before)
        check_ranks(name, after.ranks, degrees, world_size)
    return folded


def _tp_within_nodes(ranks: Sequence[int], tp: int, local_size: int) -> int:
    """The largest divisor of `tp` whose groups are each on one node."""
    divisors = (n for n in range(tp, 0, -1) if tp % n == 0)
    return next(n for n in divisors if not any(_spread_groups(ranks, n, local_size)))


def placement_table(
    placements: Mapping[str, Placement], memory: Mapping[str, str] | None = None
) -> str:
    """Role, ranks and degrees as an aligned table, for the start of a run and `plan`.

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
