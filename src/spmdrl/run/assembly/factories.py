"""Factories of a run's parts from its configuration, inputs and roles."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from spmdrl.config.data_sets import (
    START,
    HeldOutSet,
    held_out_sets,
    set_takes_turns,
    turns_of_set,
    uses_chat,
)
from spmdrl.config.sections import Config
from spmdrl.data.order import StepRows, Stream, stream_of
from spmdrl.data.prompts import PromptSet
from spmdrl.evaluation.evaluator import KEY, Evaluator, HeldOutPrompts, results_file
from spmdrl.observe.console import Console
from spmdrl.observe.detectors import Detecting
from spmdrl.observe.log import Relay
from spmdrl.observe.metrics import MetricsWriter, merge_steps, set_aside_metrics
from spmdrl.observe.rollout_log import RolloutLog, forget_rollouts
from spmdrl.observe.timeline import PhaseTimer
from spmdrl.observe.trackers.registry import outbox_of
from spmdrl.rewards.asking import JudgeAsked, PairJudge
from spmdrl.rewards.pool import RewardPool
from spmdrl.rewards.retokenizing import retokenizer
from spmdrl.rewards.scorer import Scorer, ScoringRole
from spmdrl.roles.custom import CustomRole
from spmdrl.roles.handles import Generation, Reward, Rollout
from spmdrl.roles.judge import Judge
from spmdrl.run.assembled import Assembly
from spmdrl.run.data_identity import data_identity
from spmdrl.run.exporting import export_models
from spmdrl.run.inputs import Inputs, sampling_params, training_sampling
from spmdrl.run.lifetime import Lifetime
from spmdrl.run.predicting import Predicting
from spmdrl.run.resume_point import Resumed
from spmdrl.run.reward_pools import pool_key
from spmdrl.run.run import Run
from spmdrl.run.saving import Saver
from spmdrl.run.step_report import PhaseMemory, StepReport
from spmdrl.run.stragglers import Stragglers
from spmdrl.supervision.watcher import Watcher
from spmdrl.world import World


def make_run(
    config: Config,
    world: World,
    inputs: Inputs,
    assembly: Assembly,
    pools: Mapping[str, RewardPool],
    watcher: Watcher,
    relay: Relay,
    predicting: Predicting | None = None,
) -> tuple[Run, Lifetime]:
    """Make a run and what ends it, in the state of the checkpoint that it resumes from.

    Args:
        predicting: predicts its steps; None does not.

    Raises:
        ValueError: the checkpoint cannot be resumed, or a source is too small for its weight.
    """
    identity = data_identity(config, inputs)
    saver = Saver(config, world, assembly, watcher.attempt, watcher.pulse.beat, identity)
    resumed = saver.restore()
    writer, stragglers = make_writer(config, world, resumed), Stragglers(world)
    life = Lifetime(
        config,
        world,
        saver=saver,
        resumed=resumed,
        export=partial(export_models, config, assembly),
        writer=writer,
        watcher=watcher,
        syncs=list(assembly.syncs.values()),
        work=stragglers.work,
    )
    run = Run(
        config,
        world,
        roles=assembly.roles,
        syncs=assembly.syncs,
        data=StepRows(world, inputs.train, make_stream(config, inputs)),
        held_out=inputs.held_out,
        scorer=make_scorer(config, inputs, assembly, pools.get(pool_key(config.rewards))),
        evaluators=list(make_evaluators(config, world, inputs, assembly, pools).values()),
        sampling=training_sampling(config),
        report=StepReport(
            writer=writer,
            console=Console(is_first=world.is_first, num_steps=config.steps),
            timer=PhaseTimer(synchronize=world.synchronize),
            memory=PhaseMemory(assembly.parts, world.device),
            stragglers=stragglers,
            relay=relay,
            pulse=watcher.pulse,
            text_samples=config.log.text_samples,
            rollouts=RolloutLog(Path(config.run_dir), world.rank, config.log.rollouts),
            detecting=Detecting(merge_steps(writer.read())) if world.is_first else None,
            predicting=predicting,
        ),
        life=life,
        pair_judge=make_pair_judge(config, inputs, assembly),
    )
    return run, life


def make_writer(config: Config, world: World, resumed: Resumed) -> MetricsWriter:
    """Open metrics.jsonl where the run resumes; a fresh run sets an earlier one aside."""
    directory = Path(config.run_dir)
    if world.is_first and resumed.path is None:
        set_aside_metrics(directory)
    if world.is_first:
        forget_rollouts(directory, resumed.steps_done)
    writer = MetricsWriter(directory, is_first=world.is_first)
    writer.truncate_to(resumed.metrics_lines)
    if world.is_first:
        given = config.model_dump(mode="json", exclude_unset=True)
        names = dict.fromkeys([*["tensorboard"] * config.log.tensorboard, *config.log.trackers])
        first = writer.next_step
        writer.track([outbox_of(directory, name, given, first_step=first) for name in names])
    return writer


def make_stream(config: Config, inputs: Inputs) -> Stream:
    """Order of the training data. ValueError: a source is too small for its weight."""
    return stream_of(config.seed, inputs.shares, config.data.prompts_per_step)


def make_scorer(
    config: Config,
    inputs: Inputs,
    assembly: Assembly,
    pool: RewardPool | None,
    described: HeldOutSet | None = None,
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
        if isinstance(role, Judge):
            asked = ask_judge(config, inputs, role)
            roles.append(ScoringRole(role=asked, weight=section.weight))
            continue
        assert isinstance(role, Reward | CustomRole), (section.role, role)
        retokenize = None
        if config.roles[section.role].retokenize:
            path = config.model_path(section.role)
            retokenize = retokenizer(section.role, path, inputs.now, chat=uses_chat(config))
        roles.append(ScoringRole(role=role, weight=section.weight, retokenize=retokenize))
    return Scorer(pool, inputs.texts, sampling.stop, roles)


def ask_judge(config: Config, inputs: Inputs, role: Judge) -> JudgeAsked:
    """Make a judge with its rubric."""
    return JudgeAsked(role=role, rubric=inputs.rubrics[role.name], seed=config.seed)


def make_pair_judge(config: Config, inputs: Inputs, assembly: Assembly) -> PairJudge | None:
    """Make the judge that compares the samples of a prompt; None: nothing does."""
    name = config.preference.judge
    if name is None:
        return None
    role = assembly.roles[name]
    assert isinstance(role, Judge), (name, role)
    return PairJudge(ask_judge(config, inputs, role))


def make_evaluators(
    config: Config,
    world: World,
    inputs: Inputs,
    assembly: Assembly,
    pools: Mapping[str, RewardPool],
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
        held_out = HeldOutPrompts(
            name=name,
            prompts=prompts,
            generation=Generation(
                seed=config.seed,
                step=KEY,
                group_size=described.num_samples,
                sampling=sampling_params(described.sampling),
            ),
            k=described.k,
            # no value of a reward model's score makes a response right
            threshold=described.threshold if can_be_right(config, described) else None,
            judged_by=judged_by(config, inputs, described),
            against=against,
        )
        scorer = make_scorer(config, inputs, assembly, pool, described)
        found[name] = Evaluator(world, rollout, scorer, held_out, results_dir)
    return found


def can_be_right(config: Config, described: HeldOutSet) -> bool:
    """Whether some reward is not a reward model's, so that a response can be right: a function's,
    or that of turns.
    """
    rewards = described.rewards
    return set_takes_turns(config, described) or any(
        r.role is None or config.role_kind(r.role) != "reward" for r in rewards
    )


def judged_by(config: Config, inputs: Inputs, described: HeldOutSet) -> str:
    """Description of what makes the rewards: equal for responses that may be compared."""
    parts = turns_of_set(config, described)
    for reward in described.rewards:
        name = reward.function
        if reward.role is not None:
            kind = config.role_kind(reward.role)
            model = f"{config.model_path(reward.role).resolve()}"
            adapter = config.roles[reward.role].adapter
            if adapter is not None and adapter.path is not None:
                model = f"{model} + {Path(adapter.path).resolve()}"
            name = f"{model}" if kind == "reward" else f"{kind} {model}"
            if reward.role in inputs.rubrics:
                name += f" ({inputs.rubrics[reward.role].identity()})"
        options = f" {reward.options}" if reward.options else ""
        parts.append(f"{reward.weight:g} x {name}{options}")
    return " + ".join(parts)
