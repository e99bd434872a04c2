"""Choices of a search: blocks of settings, each with options, written as overrides.

A block has what is chosen together: the degrees of one role, or one setting of all. Options that do
not go together are refused by the configuration and the plan like any user's, and cost little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from spmdrl.config.roles import WITH_ENGINE
from spmdrl.config.sections import Config
from spmdrl.models.config import ModelConfig
from spmdrl.models.degrees import heads_divide
from spmdrl.models.megatron_chunks import counts_ends
from spmdrl.models.sharding import num_values
from spmdrl.planning.forecast.machine import Machine
from spmdrl.planning.systems.registry import SHARDS_REPLICAS, named_system
from spmdrl.planning.token_bounds import step_sizes

Words = tuple[str, ...]
"""Overrides, `key=value` each."""

Choice = tuple[int, ...]
"""Number of the option of every block."""

PLACEMENT = "placement"

_ENGINE_AXES = frozenset({"tp", "ep"})
_LARGEST_TP = 16
_LONG_ROWS = 16384
"""Tokens of a row from which context parallelism is tried."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """All combinations of the options of blocks.

    Args:
        blocks: name -> options; the first is the one that a search begins with.
    """

    blocks: Mapping[str, tuple[Words, ...]]

    @property
    def size(self) -> int:
        return math.prod(len(options) for options in self.blocks.values())

    @property
    def start(self) -> Choice:
        return (0,) * len(self.blocks)

    def words(self, choice: Choice) -> Words:
        """Overrides of a choice."""
        chosen = zip(self.blocks.values(), choice, strict=True)
        return tuple(word for options, i in chosen for word in options[i])

    def choices(self) -> Iterator[Choice]:
        """Every choice; there can be millions."""
        yield from product(*(range(len(options)) for options in self.blocks.values()))

    def changed(self, choice: Choice, block: str) -> Iterator[Choice]:
        """The choices that differ from this one in a block only."""
        at = list(self.blocks).index(block)
        for i in range(len(self.blocks[block])):
            if i != choice[at]:
                yield (*choice[:at], i, *choice[at + 1 :])

    def neighbours(self, choice: Choice) -> Iterator[Choice]:
        """The choices that differ from this one in one block."""
        for block in self.blocks:
            yield from self.changed(choice, block)


def make_space(config: Config, models: Mapping[str, ModelConfig], machine: Machine) -> Space:
    """Choices for a configuration: degrees of every role, placements, and sizes of its calls.

    Args:
        models: models of the roles, except users' own.
    """
    blocks: dict[str, tuple[Words, ...]] = {PLACEMENT: _placements(config, models, machine)}
    for name, model in models.items():
        if config.roles[name].base is None:
            sharing = [n for n in models if config.roles[n].base == name]
            sharing = [n for n in sharing if config.role_kind(n) not in WITH_ENGINE]
            blocks[name] = _degrees(config, (name, *sharing), model, machine)
    trained = [name for name in models if config.is_trained(name)]
    blocks["microbatch"] = _microbatches(config)
    if trained:
        blocks["recompute"] = _ordered(
            config.train.recompute, [(f"train.recompute={each}",) for each in ("layer", "none")]
        )
        away = tuple(f"roles.{name}.residency.optimizer=host" for name in trained)
        blocks["offload"] = ((), away)
    if any(config.role_kind(name) == "rollout" for name in models):
        blocks["cache"] = _caches(config, machine)
    return Space(blocks={name: options for name, options in blocks.items() if options})


def _ordered(now: object, options: Sequence[Words]) -> tuple[Words, ...]:
    """Options with the present value first, which needs no override."""
    others = [words for words in options if not words[0].endswith(f"={now}")]
    return ((), *others)


def _placements(
    config: Config, models: Mapping[str, ModelConfig], machine: Machine
) -> tuple[Words, ...]:
    """Placements: as it is, all roles on all ranks, and the rollout apart, in turn or ahead."""
    others = [name for name in config.roles if config.role_kind(name) != "rollout"]
    rollouts = [name for name in models if config.role_kind(name) == "rollout"]
    found: list[Words] = [()]
    if any(not str(role.ranks).startswith(("all", "same as")) for role in config.roles.values()):
        found.append(tuple(f"roles.{name}.ranks=all" for name in config.roles))
    nodes, ranks = machine.num_nodes, machine.num_ranks
    whole = nodes if nodes > 1 else ranks
    if len(rollouts) == 1 and whole > 1 and config.rollout.engine == "native":
        unit = "nodes " if nodes > 1 else ""
        parts = sorted({max(1, whole // 4), whole // 2, max(1, 3 * whole // 4)})
        for first in (part for part in parts if part < whole):
            own = tuple(f"roles.{name}.ranks={unit}0-{first - 1}" for name in others)
            away = (*own, f"roles.{rollouts[0]}.ranks={unit}{first}-{whole - 1}")
            found.append(away)
            if config.flow_row.may_lag and not config.lag:
                found.append((*away, "lag=1"))
    return tuple(dict.fromkeys(found))


def _degrees(
    config: Config, names: Sequence[str], model: ModelConfig, machine: Machine
) -> tuple[Words, ...]:
    """Degrees of a role (and of those that share its base), those of the configuration first."""
    role = config.roles[names[0]]
    has_engine = config.role_kind(names[0]) in WITH_ENGINE
    axes, one_sharding = _ENGINE_AXES, False
    if not has_engine:
        train = config.train_section(names[0])
        axes = named_system("train.backend", train.backend, train.backend_options).axes
        one_sharding = train.backend in SHARDS_REPLICAS
    node, ranks = machine.devices_per_node, machine.num_ranks
    capacity = machine.device.memory_bytes
    weights = 2 * num_values(model)
    found: list[Words] = [()]
    for tp in _powers(min(_LARGEST_TP, ranks)):
        if tp > 1 and "tp" not in axes:
            continue
        if not heads_divide(model, tp) or (tp > node and weights / node < 0.4 * capacity):
            continue
        for cp, pp, ep in product(
            _context(config) if "cp" in axes else [1],
            _stages(model, ranks) if "pp" in axes else [1],
            _experts(model) if "ep" in axes else [1],
        ):
            if ep > ranks // pp or tp * cp * pp > ranks:
                continue
            shards = _shards(tp * cp * pp, node, ranks) if "dp_shard" in axes else ["1"]
            if one_sharding:
                shards = shards[-1:]
            for shard in shards:
                copies = ranks // (tp * cp * pp) if shard == "all" else int(shard)
                split = tp * pp * copies * (ep // math.gcd(tp, ep) if has_engine else 1)
                if weights / split > capacity:
                    continue
                values = {"tp": tp, "cp": cp, "pp": pp, "ep": ep, "dp_shard": shard}
                if role.dp_replicate is not None:
                    values["dp_replicate"] = "null"
                if tp > node:
                    values["tp_across_nodes"] = "true"
                words = [
                    (key, value) for key, value in values.items() if _differs(role, key, value)
                ]
                if one_sharding and all(key.startswith("dp_") for key, _ in words):
                    continue  # the same ranks hold the same shards as they do now
                found.append(tuple(f"roles.{n}.{k}={v}" for n in names for k, v in words))
    return tuple(dict.fromkeys(found))


def _differs(role: object, key: str, value: object) -> bool:
    now = vars(role)[key]
    return str(now).lower() != str(value).replace("null", "none")


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())]


def _shards(inner: int, node: int, ranks: int) -> list[str]:
    """Shards of each copy: none, those of a node, and all ranks."""
    found = ["1"]
    if node < ranks and node // inner > 1:
        found.append(str(node // inner))
    if ranks // inner > 1:
        found.append("all")
    return found


def _context(config: Config) -> list[int]:
    return [1, 2, 4] if step_sizes(config).row_tokens >= _LONG_ROWS else [1]


def _stages(model: ModelConfig, ranks: int) -> list[int]:
    layers = model.num_layers
    return [pp for pp in _powers(min(16, ranks)) if layers % pp == 0 or counts_ends(layers, pp)]


def _experts(model: ModelConfig) -> list[int]:
    if model.moe is None:
        return [1]
    return [ep for ep in (1, 4, 8, 16) if model.moe.num_experts % ep == 0]


def _microbatches(config: Config) -> tuple[Words, ...]:
    """The present number of tokens, less and more, at least one row."""
    now, longest = config.train.microbatch_tokens, step_sizes(config).row_tokens
    found: list[Words] = [()]
    for tokens in (now // 2, 2 * now, 4 * now):
        if tokens >= min(longest, now):
            found.append((f"train.microbatch_tokens={tokens}",))
    return tuple(found)


def _caches(config: Config, machine: Machine) -> tuple[Words, ...]:
    """The present size of the key-value cache, what the samples need, and shares of the device."""
    found: list[Words] = [()]
    if config.rollout.kv_cache_gb != "auto":
        found.append(("rollout.kv_cache_gb=auto",))
    size = machine.device.memory_bytes / 1e9
    return (*found, *[(f"rollout.kv_cache_gb={round(size * share)}",) for share in (0.25, 0.5)])
