"""`spmdrl train`: start the flow of a configuration, the same on every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from spmdrl.assemble import Assembly, assemble, open_models
from spmdrl.config import Config, RewardSection
from spmdrl.config_doubts import doubts
from spmdrl.config_sets import START, HeldOutSet, held_out_sets, uses_chat
from spmdrl.custom_role import CustomRole
from spmdrl.data.home import StepRows
from spmdrl.data.order import Stream, stream_of
from spmdrl.data.prompts import PromptSet
from spmdrl.distributed.reduce import agreed
from spmdrl.errors import AgreedError
from spmdrl.evaluation.evaluator import Evaluator, results_file
from spmdrl.flows.data_identity import data_identity, first_start
from spmdrl.flows.differences import describe_roles
from spmdrl.flows.dpo import dpo
from spmdrl.flows.grpo import grpo
from spmdrl.flows.inputs import (
    Inputs,
    check_models,
    read_inputs,
    sampling_params,
    training_sampling,
)
from spmdrl.flows.lifetime import Lifetime, check_start, stop_start
from spmdrl.flows.online_dpo import online_dpo
from spmdrl.flows.parts import check_flow, check_parts
from spmdrl.flows.phase_memory import PhaseMemory
from spmdrl.flows.ppo import ppo
from spmdrl.flows.retokenizing import retokenizer
from spmdrl.flows.reward_model import reward_model
from spmdrl.flows.reward_pools import make_pools, pool_key
from spmdrl.flows.run import Run
from spmdrl.flows.saving import Saver
from spmdrl.flows.sft import sft
from spmdrl.launch import World, seed_everything
from spmdrl.ledger import keeping
from spmdrl.memory_report import memory_texts, schedules
from spmdrl.objects import load_object
from spmdrl.observe.progress import Relay, TimedLines
from spmdrl.observe.timeline import PhaseTimer
from spmdrl.placement import Placement, place_roles, placement_table
from spmdrl.rewards.pool import RewardPool
from spmdrl.rewards.scorer import RewardsFailed, Scorer, ScoringRole
from spmdrl.rewards.server import RewardServer
from spmdrl.role_plan import RolePlan, plan_roles
from spmdrl.roles import Reward, Rollout
from spmdrl.runtime.attempt import begin_attempt
from spmdrl.runtime.pulse import Pulse
from spmdrl.runtime.signals import Signals
from spmdrl.runtime.stopping import StopAsked
from spmdrl.runtime.watcher import Watcher

log = logging.getLogger(__name__)

LIMIT = 0.9
"""Share of `timeout_s` without progress that counts as a hang: collectives have not failed yet."""

Flow = Callable[[Run], None]


FLOWS: Mapping[str, Flow] = {
    "sft": sft,
    "reward_model": reward_model,
    "dpo": dpo,
    "online_dpo": online_dpo,
    "grpo": grpo,
    "ppo": ppo,
}
"""Shipped flows by name; `config_data.FLOW_DATA` says what data each of them reads."""


def find_flow(name: str) -> Flow:
    """Find a shipped flow by name, or a user's `path/to/my_flow.py:main`.

    Raises:
        ValueError: the name is neither.
    """
    if name in FLOWS:
        return FLOWS[name]
    if ":" not in name:
        raise ValueError(
            f"flow={name!r}: shipped flows are {sorted(FLOWS)}; a flow of your own is "
            "path/to/my_flow.py:function"
        )
    found: Flow = load_object(name, "flow")
    return found


def checked_flow(config: Config) -> Flow:
    """Find the flow, and check it and the environment and trainer that the configuration names.

    Raises:
        ValueError: as `find_flow`, `check_flow` and `check_parts`.
    """
    flow = find_flow(config.flow)
    check_flow(config, flow)
    check_parts(config)
    return flow


def train(
    config: Config, world: World, server: RewardServer, signals: Signals | None = None
) -> None:
    """Run the configured flow, or resume it, until it is done or asked to stop.

    Args:
        signals: signals noted since the program began; None: note them from now on.

    Raises:
        ValueError: bad input, on every rank, before the flow starts.
    """
    if signals is None:
        with closing(Signals()) as own:
            train(config, world, server, own)
        return
    attempt = begin_attempt(Path(config.run_dir), world)
    limits = {"default": LIMIT * config.timeout_s, **config.limits}
    with Watcher(world, attempt, Pulse(), signals, limits) as watcher:
        try:
            check_start(watcher)
            _train(config, world, server, watcher)
        except StopAsked:
            stop_start(watcher, world)


def _train(config: Config, world: World, server: RewardServer, watcher: Watcher) -> None:
    flow = agreed(ValueError, lambda: checked_flow(config))
    seed_everything(config.seed)
    placements = place_roles(config, world.size, world.local_size)
    models = open_models(config, placements)
    shapes = {name: model.config for name, model in models.items()}
    plan = agreed(
        ValueError,
        lambda: plan_roles(
            config, placements, shapes, world.device_types, world.local_size, world.gpu_bytes
        ),
    )
    run_dir = Path(config.run_dir)
    inputs = read_inputs(
        config,
        config.data_kind(),
        TimedLines("the data", watcher.pulse.beat),
        lambda: first_start(config, run_dir / "checkpoints"),
    )
    check_models(config, inputs, shapes)
    check_start(watcher)
    _tell_plan(config, world, placements, plan)
    relay = Relay(is_first=world.is_first and config.log.progress)

    def report(done: int, count: int) -> None:
        watcher.pulse.beat()
        relay.report(done, count)

    with make_pools(config, server, run_dir, world, inputs) as pools:
        watcher.look_after(server.ended)
        for pool in pools.values():
            watcher.look_after(pool.look)
        assembly = assemble(config, world, models, inputs.texts, report, plan)
        for (source, target), sync in assembly.syncs.items():
            log.info("weights %s -> %s: %s", source, target, sync.plan.describe())
        identity = data_identity(config, inputs)
        saver = Saver(config, world, assembly, watcher.attempt, watcher.pulse.beat, identity)
        syncs = list(assembly.syncs.values())
        roles = describe_roles(config)
        lifetime = Lifetime(world, config.checkpoint, saver, watcher, syncs, report, roles)
        run = make_run(config, world, inputs, assembly, pools, relay, saver, lifetime, report)
        try:
            _run_flow(flow, run, lifetime)
        finally:
            run.close()
        assembly.close()


def _run_flow(flow: Flow, run: Run, lifetime: Lifetime) -> None:
    """Run the flow to its end or to a stop.

    Raises:
        ValueError: before the first step: bad input, or a return without `run.conclude()`.
        AgreedError: the user's reward functions failed within a step.
        FlowError: the same ValueErrors once steps have begun.
    """
    try:
        with keeping(lifetime.ledger):
            flow(run)
        if not run.is_concluded:
            raise ValueError(
                f"flow={run.config.flow} returned without run.conclude(): the run would have no "
                "last checkpoint and no model"
            )
        lifetime.done()
    except StopAsked:
        lifetime.stop()
    except RewardsFailed as error:
        # the user's own code failed: the message tells it, another stack would not help
        raise AgreedError(f"in step {run.steps_done + 1}: {error}") from None
    except ValueError as error:
        # the command line shows bad input as one line (a role that the flow needs and the
        # configuration lacks, say). Once steps have begun, the input is not to blame
        if not run.has_begun:
            raise
        raise FlowError(f"in step {run.steps_done + 1}: {error}") from error


def _tell_plan(
    config: Config, world: World, placements: Mapping[str, Placement], plan: RolePlan
) -> None:
    table = placement_table(placements, memory_texts(plan.memory))
    for doubt in doubts(config) if world.is_first else ():
        log.warning("%s", doubt)
    log.info("%d ranks on %s\n%s", world.size, world.device.type, table)
    for text in schedules(plan.memory):
        log.info("%s", text)


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


class FlowError(RuntimeError):
    """A failure while the flow ran; its cause has the traceback."""
