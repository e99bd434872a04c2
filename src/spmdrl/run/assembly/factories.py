"""Factories of a run's parts from its configuration, inputs and roles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from spmdrl.config.data_sets import START, HeldOutSet, held_out_sets, uses_chat
from spmdrl.config.sections import Config, RewardSection
from spmdrl.data.home import StepRows
from spmdrl.data.order import Stream, stream_of
from spmdrl.data.prompts import PromptSet
from spmdrl.evaluation.evaluator import Evaluator, results_file
from spmdrl.observe.progress import Relay
from spmdrl.observe.timeline import PhaseTimer
from spmdrl.rewards.pool import RewardPool
from spmdrl.rewards.retokenizing import retokenizer
from spmdrl.rewards.scorer import Scorer, ScoringRole
from spmdrl.roles.custom import CustomRole
from spmdrl.roles.handles import Reward, Rollout
from spmdrl.run.assembled import Assembly
from spmdrl.run.inputs import (
    Inputs,
    sampling_params,
    training_sampling,
)
from spmdrl.run.lifetime import Lifetime
from spmdrl.run.phase_memory import PhaseMemory
from spmdrl.run.reward_pools import pool_key
from spmdrl.run.run import Run
from spmdrl.run.saving import Saver
from spmdrl.world import World


def make_run(
    config: Config,
    world: World,
    inputs: Inputs,
    assembly: Assembly,
    pools: Mapping[str, RewardPool],
    relay: Relay,
    saver: Saver,
    lifetime: Lifetime,
    report: Callable[[int, int], None],
) -> Run:
    pool = pools.get(pool_key(config.rewards))
    scorer = make_scorer(config, inputs, assembly, pool, report=report)
    evaluators = make_evaluators(config, world, inputs, assembly, pools, report)
    return Run(
        config=config,
        world=world,
        roles=assembly.roles,
        syncs=assembly.syncs,
        data=StepRows(world, inputs.train, make_stream(config, inputs)),
        held_out=inputs.held_out,
        scorer=scorer,
        evaluators=list(evaluators.values()),
        saver=saver,
        sampling=training_sampling(config),
        timer=PhaseTimer(synchronize=world.synchronize),
        memory=PhaseMemory(assembly.memory, world.device),
        relay=relay,
        lifetime=lifetime,
    )


def make_stream(config: Config, inputs: Inputs) -> Stream:
    """Order of the training data. ValueError: a source is too small for its weight."""
    return stream_of(config.seed, inputs.shares, config.data.prompts_per_step)


def make_scorer(
    config: Config,
    inputs: Inputs,
    assembly: Assembly,
    pool: RewardPool | None,
    described: HeldOutSet | None = None,
    report: Callable[[int, int], None] = lambda done, count: None,
) -> Scorer:
    """Scorer by the pool's functions and the roles that `rewards` names: those of training, or of
    the held-out set `described`.
    """
    rewards = config.rewards if described is None else described.rewards
    sampling = config.sampling if described is None else described.sampling
    roles = []
    for section in rewards:
        if section.role is None:
            continue
        role = assembly.roles[section.role]
        assert isinstance(role, Reward | CustomRole), (section.role, role)
        retokenize = None
        if config.roles[section.role].retokenize:
            path = config.model_path(section.role)
            retokenize = retokenizer(section.role, path, inputs.now, chat=uses_chat(config))
        roles.append(ScoringRole(role=role, weight=section.weight, retokenize=retokenize))
    return Scorer(pool, inputs.texts, sampling.stop, roles, report)


def make_evaluators(
    config: Config,
    world: World,
    inputs: Inputs,
    assembly: Assembly,
    pools: Mapping[str, RewardPool],
    report: Callable[[int, int], None] = lambda done, count: None,
    *,
    has_start: bool = True,
) -> dict[str, Evaluator]:
    """Evaluators of the held-out prompts, by set; none without a rollout.

    Args:
        has_start: whether `against: start` can read responses from before the first step.
    """
    rollout = next((r for r in assembly.roles.values() if isinstance(r, Rollout)), None)
    found: dict[str, Evaluator] = {}
    results_dir = Path(config.run_dir) / "evaluation"
    for name, described in held_out_sets(config).items():
        prompts = inputs.held_out.get(name)
        if rollout is None or not isinstance(prompts, PromptSet):
            continue
        pool = pools.get(pool_key(described.rewards))
        against = None if described.against is None else Path(described.against)
        if described.against == START:
            against = results_file(results_dir, name, 0) if has_start else None
        found[name] = Evaluator(
            world=world,
            name=name,
            prompts=prompts,
            rollout=rollout,
            scorer=make_scorer(config, inputs, assembly, pool, described, report),
            sampling=sampling_params(described.sampling),
            num_samples=described.num_samples,
            k=described.k,
            # no value of a reward model's score makes a response right
            threshold=described.threshold if can_be_right(config, described) else None,
            seed=config.seed,
            results_dir=results_dir,
            judged_by=judge(config, described.rewards),
            against=against,
        )
    return found


def can_be_right(config: Config, described: HeldOutSet) -> bool:
    """Whether some reward is not a reward model's, so that a response can be right."""
    rewards = described.rewards
    return any(r.role is None or config.role_kind(r.role) != "reward" for r in rewards)


def judge(config: Config, rewards: Sequence[RewardSection]) -> str:
    """Description of what makes the rewards: equal for responses that may be compared."""
    parts = []
    for reward in rewards:
        name = reward.function
        if reward.role is not None:
            kind = config.role_kind(reward.role)
            model = config.model_path(reward.role).resolve()
            name = f"{model}" if kind == "reward" else f"{kind} {model}"
        options = f" {reward.options}" if reward.options else ""
        parts.append(f"{reward.weight:g} x {name}{options}")
    return " + ".join(parts)
