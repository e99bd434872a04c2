"""The nearest changes that make a configuration fit, found by trying them.

A change is some overrides, or more nodes. Mild ones come first: those that cost time before those
that need other layouts, and these before more devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

from spmdrl.config.sections import Config
from spmdrl.memory.schedule import ScheduledCall
from spmdrl.planning.plan import RolePlan
from spmdrl.planning.token_bounds import step_sizes
from spmdrl.role_spec import RoleSpec

MOST_PAIRS = 6
"""Pairs of changes that are tried, those first that help most."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of a configuration or of its machine.

    Args:
        words: overrides to paste.
        nodes: factor of the number of nodes.
    """

    words: tuple[str, ...] = ()
    nodes: int = 1

    def __add__(self, other: Change) -> Change:
        return Change(words=self.words + other.words, nodes=self.nodes * other.nodes)

    def describe(self, num_nodes: int) -> str:
        more = [f"--nodes {num_nodes * self.nodes}"] if self.nodes > 1 else []
        return " ".join([*more, *self.words])


Lack = Callable[[Change], int | None]
"""Bytes that are lacking with a change, over all calls; 0 if it fits, None if it is refused."""


def lacking_bytes(plan: RolePlan) -> int:
    """Bytes that the calls of the fullest rank need beyond what there is, added up."""
    return max(
        (
            sum(max(0, call.peak_bytes - (own.plan.capacity or 0)) for call in own.plan.calls)
            for own in plan.memory.values()
            if own.plan.capacity is not None
        ),
        default=0,
    )


def nearest_changes(
    config: Config, plan: RolePlan, node_size: int, lack: Lack, count: int = 3
) -> list[Change]:
    """The first changes that make the plan fit: single ones, then two of them, then as many as it
    takes.

    Args:
        plan: a plan that does not fit.
        count: number of changes to find.
    """
    ways = [way for way in _ways(config, plan, node_size) if way]
    ways = [way for i, way in enumerate(ways) if way not in ways[:i]]
    found: list[Change] = []
    helpful: list[tuple[int, list[Change]]] = []
    before = lack(Change()) or 0
    for way in ways:
        if len(found) == count:
            return found
        while way and (size := lack(way[-1])) is None:
            way = way[:-1]  # too strong: more ranks than the batch has rows, say
        if way and size == 0:
            found.append(_mildest([way], lack))
        elif way and size is not None and size < before:
            helpful.append((size, way))
    helpful.sort(key=lambda one: one[0])
    helping = [way for _, way in helpful]
    for pair in islice(combinations(helping, 2), MOST_PAIRS):
        if len(found) == count:
            return found
        if lack(_sum([way[-1] for way in pair])) == 0:
            found.append(_mildest(pair, lack))
    return found or _all_that_it_takes(helping, lack, before)


def _mildest(ways: Sequence[Sequence[Change]], lack: Lack) -> Change:
    """The mildest levels of ways that fit together at their strongest."""
    levels = [way[-1] for way in ways]
    for i, way in enumerate(ways):
        for level in way[:-1]:
            if lack(_sum([*levels[:i], level, *levels[i + 1 :]])) == 0:
                levels[i] = level
                break
    return _sum(levels)


def _all_that_it_takes(ways: Sequence[Sequence[Change]], lack: Lack, before: int) -> list[Change]:
    """Changes that fit only together, without those that are not needed; [] if even all do not.

    Args:
        ways: those that help most come first.
        before: bytes that are lacking without any.
    """
    taken: list[Sequence[Change]] = []
    for way in ways:
        size = lack(_sum([own[-1] for own in (*taken, way)]))
        if size is None or size >= before:
            continue
        taken.append(way)
        before = size
        if size == 0:
            for one in taken[:-1]:
                rest = [other for other in taken if other is not one]
                taken = rest if lack(_sum([own[-1] for own in rest])) == 0 else taken
            return [_mildest(taken, lack)]
    return []


def _sum(changes: Sequence[Change]) -> Change:
    total = Change()
    for change in changes:
        total += change
    return total


def _ways(config: Config, plan: RolePlan, node_size: int) -> Iterator[list[Change]]:
    """Ways to need less on the fullest rank, nearest first; each from its mildest level on."""
    memory = max((own.plan for own in plan.memory.values()), key=lambda own: own.peak_bytes)
    over = [call for call in memory.calls if call.peak_bytes > (memory.capacity or 0)]
    methods = {call.name.rpartition(".")[2] for call in over}
    roles = [
        plan.specs[name]
        for name in dict.fromkeys(key[0] for call in over for key in call.resident)
        if name in plan.specs
    ]
    yield from _kept(config, over)
    for spec in roles:
        if spec.trained and f"{spec.name}.update" in {call.name for call in over}:
            yield from _smaller_update(config, spec)
        elif not spec.has_engine and methods & {"logprobs", "values", "score"}:
            yield _halved(_train_key(spec, "microbatch_tokens"), spec.train.microbatch_tokens, 512)
    if "generate" in methods:
        yield from _smaller_rollout(config)
    if "sync" in methods:
        yield _halved("rollout.sync_bucket_mb", config.rollout.sync_bucket_mb, 16)
    if sharded := _sum([change for spec in plan.specs.values() for change in _sharded(spec)]).words:
        yield [Change(words=sharded)]
    for spec in roles:
        yield from _wider(spec, node_size)
    yield [Change(nodes=factor) for factor in (2, 4, 8, 16)]


def _kept(config: Config, over: Sequence[ScheduledCall]) -> Iterator[list[Change]]:
    """Parts that are kept by the configuration though another call does not need them."""
    for name, role in config.roles.items():
        for part, wish in role.residency.items():
            if wish == "keep" and any((name, str(part)) in call.resident for call in over):
                away = "drop" if part in ("kv_cache", "graphs") else "host"
                yield [Change(words=(f"roles.{name}.residency.{part}={away}",))]


def _train_key(spec: RoleSpec, name: str) -> str:
    return f"roles.{spec.name}.train.{name}" if name in spec.section.train else f"train.{name}"


def _halved(key: str, value: int, least: int) -> list[Change]:
    levels = [value // factor for factor in (2, 4, 8, 16) if value // factor >= least]
    return [Change(words=(f"{key}={level}",)) for level in levels]


def _smaller_update(config: Config, spec: RoleSpec) -> Iterator[list[Change]]:
    if spec.train.recompute != "layer":
        yield [Change(words=(f"{_train_key(spec, 'recompute')}=layer",))]
    longest = step_sizes(config).row_tokens
    if levels := _halved(
        _train_key(spec, "microbatch_tokens"), spec.train.microbatch_tokens, longest
    ):
        yield levels
    if levels := _halved(_train_key(spec, "head_chunk"), spec.train.head_chunk, 128):
        yield levels


def _smaller_rollout(config: Config) -> Iterator[list[Change]]:
    rollout = config.rollout
    if rollout.kv_cache_gb != "auto":
        levels = [rollout.kv_cache_gb * factor for factor in (0.75, 0.5, 0.25)]
        yield [Change(words=(f"rollout.kv_cache_gb={level:.3g}",)) for level in levels]
    yield _halved("rollout.max_running", rollout.max_running, 8)
    yield _halved("rollout.prefill_tokens", rollout.prefill_tokens, 256)


def _sharded(spec: RoleSpec) -> list[Change]:
    """A role's weights in shards over all of its ranks, if they are not."""
    key = f"roles.{spec.name}"
    if spec.has_engine or spec.placement.degrees["dp_replicate"] == 1:
        return []
    words = [f"{key}.dp_shard=all"]
    if spec.section.dp_replicate is not None:
        words.append(f"{key}.dp_replicate=1")
    return [Change(words=tuple(words))]


def _wider(spec: RoleSpec, node_size: int) -> Iterator[list[Change]]:
    """More ranks for one copy of a role's weights."""
    degrees, key = spec.placement.degrees, f"roles.{spec.name}"
    if sharded := _sharded(spec):
        yield sharded
    room = degrees["dp_replicate"] * degrees["dp_shard"]
    factors = [f for f in (2, 4, 8) if room % f == 0 and degrees["tp"] * f <= node_size]
    levels = []
    for factor in factors:
        words = [f"{key}.tp={degrees['tp'] * factor}"]
        shard = max(1, degrees["dp_shard"] // factor)
        if spec.section.dp_shard != "all":
            words.append(f"{key}.dp_shard={shard}")
        if spec.section.dp_replicate is not None:
            words.append(f"{key}.dp_replicate={room // factor // shard}")
        levels.append(Change(words=tuple(words)))
    if levels:
        yield levels
