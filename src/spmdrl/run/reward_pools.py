"""Reward functions of a run: a pool for each list of rewards, tried out before models load."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from spmdrl.config.data_sets import HELD_OUT, held_out_sets
from spmdrl.config.sections import Config, RewardPoolSection, RewardSection
from spmdrl.config.user_objects import AgreedError
from spmdrl.data.prompts import PromptSet
from spmdrl.distributed.reduce import agreed, broadcast_object
from spmdrl.rewards.functions import RewardSpec
from spmdrl.rewards.pool import RewardPool
from spmdrl.rewards.server import RewardServer, start_reward_server
from spmdrl.rewards.trial import try_out
from spmdrl.run.inputs import Inputs
from spmdrl.world import World

log = logging.getLogger(__name__)


def reward_specs(rewards: Sequence[RewardSection]) -> list[RewardSpec]:
    """Make one component per function in `rewards`, named after it.

    A number is added if another function, a scoring role or the rewards of turns have the name.
    """
    names = {"turns", *(section.role for section in rewards)}
    specs: list[RewardSpec] = []
    for section in rewards:
        if section.function is None:
            continue
        base = section.function.rpartition(":")[2]
        taken = sum(spec.name.split("#")[0] == base for spec in specs) + (base in names)
        specs.append(
            RewardSpec(
                name=f"{base}#{taken + 1}" if taken else base,
                function=section.function,
                weight=section.weight,
                options=section.options,
            )
        )
    return specs


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Functions of one pool and the prompts that they score.

    Args:
        prompts: name of a source -> its prompts; empty if the data have none.
    """

    specs: Sequence[RewardSpec]
    prompts: Mapping[str, PromptSet]

    def columns(self) -> frozenset[str] | None:
        """Columns of the rows, including those that only some rows have; None without prompts."""
        if not self.prompts:
            return None
        found: set[str] = set()
        for prompts in self.prompts.values():
            for entry in prompts.entries():
                found.update(entry)
            if prompts.takes_turns:
                found.add("turns")
        return frozenset(found)


def scored_sets(config: Config, inputs: Inputs, *, trains: bool) -> dict[str, Scored]:
    """Map `pool_key` to what that pool scores: the training data (if the run `trains`) and the
    held-out sets of prompts.
    """
    lists: list[tuple[str, Sequence[RewardSection], object]] = []
    if trains:
        lists.append(("data.train", config.rewards, inputs.train))
    for name, described in held_out_sets(config).items():
        own = inputs.held_out.get(name)
        if isinstance(own, PromptSet):
            # the training data's own, unless nobody trains
            where = "data.train" if name == HELD_OUT else f"evaluation.sets.{name}"
            lists.append((where, described.rewards, own))
    found: dict[str, Scored] = {}
    for where, rewards, prompts in lists:
        specs, key = reward_specs(rewards), pool_key(rewards)
        if not specs:
            continue
        known = dict(found[key].prompts) if key in found else {}
        if isinstance(prompts, PromptSet) and where not in known and len(prompts):
            known[where] = prompts
        found[key] = Scored(specs=specs, prompts=known)
    return found


@contextmanager
def make_pools(
    config: Config,
    server: RewardServer,
    run_dir: Path,
    world: World,
    inputs: Inputs,
    *,
    trains: bool = True,
) -> Iterator[Mapping[str, RewardPool]]:
    """Start this rank's reward workers: a pool for each list of rewards (see `pool_key`).

    The first rank tries every function on the first prompt of each set that it scores. All ranks of
    the world call it together.

    Args:
        trains: whether the training data are scored as well.

    Raises:
        AgreedError: a function cannot be loaded on some rank, cannot be called with a row's
            columns, returns something other than a number, or fails in the trial.
    """
    scored = scored_sets(config, inputs, trains=trains)
    with ExitStack() as stack:

        def start() -> dict[str, RewardPool]:
            pools: dict[str, RewardPool] = {}
            for key, what in scored.items():
                suffix = f"_{len(pools)}" if pools else ""
                output = run_dir / f"rewards_rank_{world.rank:05d}{suffix}.log"
                pool = _start_pool(config.reward_pool, server, what, output)
                pools[key] = stack.enter_context(pool)
            return pools

        pools = agreed(ValueError, start)

        def trial() -> str | None:
            return _try_all(scored, pools) if world.is_first else None

        problem: str | None = broadcast_object(agreed(ValueError, trial), 0)
        if problem is not None:
            raise AgreedError(problem)
        yield pools


def check_rewards(config: Config, inputs: Inputs) -> None:
    """Load and try the functions as `make_pools` does, in one process, and end the pools again.

    Raises:
        ValueError: `make_pools` would refuse a function.
    """
    scored = scored_sets(config, inputs, trains=True)
    if not scored:
        return
    with ExitStack() as stack:
        server = stack.enter_context(start_reward_server())
        pools = {}
        for key, what in scored.items():
            pools[key] = stack.enter_context(_start_pool(config.reward_pool, server, what, None))
        problem = _try_all(scored, pools)
    if problem is not None:
        raise ValueError(problem)


def _start_pool(
    section: RewardPoolSection, server: RewardServer, scored: Scored, output: Path | None
) -> RewardPool:
    return RewardPool(
        server,
        scored.specs,
        num_workers=section.num_workers,
        timeout_s=section.timeout_s,
        memory_mb=round(section.memory_gb * 1000),
        failed=section.failed_reward,
        max_failed=section.max_failed_share,
        environment=section.environment,
        columns=scored.columns(),
        output=output,
    )


def _try_all(scored: Mapping[str, Scored], pools: Mapping[str, RewardPool]) -> str | None:
    """Problem of the first function that has one, or None; notes are logged."""
    for key, what in scored.items():
        pool = pools[key]
        for name, called in pool.callers.items():
            log.info("reward %s is called %s", name, called.how)
            for where, prompts in what.prompts.items():
                _tell_of_missing(name, called.columns, where, prompts)
        for where, prompts in what.prompts.items():
            trial = try_out(pool, what.specs, prompts[0], where)
            if trial.problem is not None:
                return trial.problem
            for note in trial.notes:
                log.warning("%s", note)
    return None


def _tell_of_missing(name: str, columns: Sequence[str], where: str, prompts: PromptSet) -> None:
    for column in columns:
        lacking = sum(column not in entry for entry in prompts.entries())
        if lacking and not (column == "turns" and prompts.takes_turns):
            log.warning(
                "reward %s takes the column %r, which %d of %d rows of %s lack: they give None",
                *(name, column, lacking, len(prompts), where),
            )


def pool_key(rewards: Sequence[RewardSection]) -> str:
    """Key, equal for lists that one pool serves: same functions, names, weights and options."""
    return repr(reward_specs(rewards))
