"""`spmdrl train`: from a configuration to a running flow, on every rank alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from spmdrl.assemble import Assembly, assemble, open_models
from spmdrl.config import Config
from spmdrl.custom_role import CustomRole
from spmdrl.data.home import StepRows
from spmdrl.data.order import PromptStream
from spmdrl.data.prompts import PromptSet
from spmdrl.evaluation.evaluator import Evaluator
from spmdrl.flows.grpo import grpo
from spmdrl.flows.inputs import (
    DataKind,
    Inputs,
    check_models,
    evaluation_sampling,
    make_pool,
    read_inputs,
    retokenizer,
    sampling_params,
)
from spmdrl.flows.lifetime import Lifetime
from spmdrl.flows.phase_memory import PhaseMemory
from spmdrl.flows.ppo import ppo
from spmdrl.flows.reward_model import reward_model
from spmdrl.flows.run import Run
from spmdrl.flows.saving import Saver
from spmdrl.flows.sft import sft
from spmdrl.launch import World, seed_everything
from spmdrl.ledger import Ledger, keeping
from spmdrl.objects import load_object
from spmdrl.observe.progress import Relay
from spmdrl.observe.timeline import PhaseTimer
from spmdrl.placement import place_roles, placement_table
from spmdrl.rewards.pool import RewardPool
from spmdrl.rewards.scorer import Scorer, ScoringRole
from spmdrl.rewards.server import RewardServer
from spmdrl.role_plan import plan_roles
from spmdrl.roles import Reward, Rollout
from spmdrl.runtime.attempt import begin_attempt
from spmdrl.runtime.pulse import Pulse
from spmdrl.runtime.signals import Signals
from spmdrl.runtime.stopping import StopAsked
from spmdrl.runtime.watcher import Watcher
from spmdrl.sharing import memory_texts

log = logging.getLogger(__name__)

LIMIT = 0.9
"""Of `timeout_s`: a run counts as hung before its collectives give up, so that all are named."""

Flow = Callable[[Run], None]


@dataclass(frozen=True, kw_only=True)
class ShippedFlow:
    """A flow, and what a row of its data is."""

    run: Flow
    data: DataKind


FLOWS: Mapping[str, ShippedFlow] = {
    "sft": ShippedFlow(run=sft, data="conversations"),
    "reward_model": ShippedFlow(run=reward_model, data="preferences"),
    "grpo": ShippedFlow(run=grpo, data="prompts"),
    "ppo": ShippedFlow(run=ppo, data="prompts"),
}


def find_flow(name: str) -> ShippedFlow:
    """A shipped flow by name, or a user's `path/to/my_flow.py:main` (on prompts, unless
    `data.kind` says otherwise).

    Raises:
        ValueError: neither.
    """
    if name in FLOWS:
        return FLOWS[name]
    if ":" not in name:
        raise ValueError(
            f"flow={name!r}: shipped flows are {sorted(FLOWS)}; a flow of your own is "
            "path/to/my_flow.py:function"
        )
    return ShippedFlow(run=load_object(name), data="prompts")


def train(
    config: Config, world: World, server: RewardServer, signals: Signals | None = None
) -> None:
    """Run the configured flow, or go on with it, until it is done or was asked to stop.

    Args:
        signals: noted since the program began; None: from now on.

    Raises:
        ValueError: bad input, on every rank, before the flow starts.
    """
    signals = Signals() if signals is None else signals
    attempt = begin_attempt(Path(config.run_dir), world)
    limits = {"default": LIMIT * config.timeout_s, **config.limits}
    with Watcher(world, attempt, Pulse(), signals, limits) as watcher:
        _train(config, world, server, watcher)


def _train(config: Config, world: World, server: RewardServer, watcher: Watcher) -> None:
    flow = find_flow(config.flow)
    seed_everything(config.seed)
    placements = place_roles(config, world.size, world.local_size)
    models = open_models(config, placements)
    shapes = {name: model.config for name, model in models.items()}
    plan = plan_roles(config, placements, shapes, world.device_types, world.local_size)
    inputs = read_inputs(config, config.data.kind or flow.data)
    check_models(config, inputs, shapes)
    table = placement_table(placements, memory_texts(plan.memory))
    log.info("%d ranks on %s\n%s", world.size, world.device.type, table)
    for text in dict.fromkeys(rank.plan.describe() for rank in plan.memory.values()):
        log.info("%s", text)
    run_dir = Path(config.run_dir)
    relay = Relay(is_first=world.is_first and config.log.progress)
    with make_pool(config, server, run_dir, world.rank) as pool:
        assembly = assemble(config, world, models, inputs.decode, relay.report, plan)
        for (source, target), sync in assembly.syncs.items():
            log.info("weights %s -> %s: %s", source, target, sync.plan.describe())
        saver = Saver(config, assembly)
        lifetime = Lifetime(world, config.checkpoint, saver, watcher)
        run = make_run(config, world, inputs, assembly, pool, relay, saver, lifetime)
        try:
            with keeping(Ledger(world, str(watcher.attempt.directory), watcher.pulse)):
                flow.run(run)
            lifetime.done()
        except StopAsked:
            lifetime.stop()
        except ValueError as error:
            # the command line shows bad input as one line; this is no bad input any more
            raise FlowError(f"in step {run.steps_done + 1}: {error}") from error
        finally:
            run.close()


def make_run(
    config: Config,
    world: World,
    inputs: Inputs,
    assembly: Assembly,
    pool: RewardPool | None,
    relay: Relay,
    saver: Saver,
    lifetime: Lifetime,
) -> Run:
    stream = PromptStream(
        seed=config.seed,
        num_prompts=len(inputs.train),
        prompts_per_step=config.data.prompts_per_step,
    )
    scorer = make_scorer(config, inputs, assembly, pool)
    return Run(
        config=config,
        world=world,
        roles=assembly.roles,
        syncs=assembly.syncs,
        data=StepRows(world, inputs.train, stream),
        held_out=inputs.held_out,
        scorer=scorer,
        evaluator=make_evaluator(config, world, inputs, assembly, scorer),
        saver=saver,
        sampling=sampling_params(config.sampling),
        timer=PhaseTimer(synchronize=world.synchronize),
        memory=PhaseMemory(assembly.memory, world.device),
        relay=relay,
        lifetime=lifetime,
    )


def make_scorer(
    config: Config, inputs: Inputs, assembly: Assembly, pool: RewardPool | None
) -> Scorer:
    """Rewards by the functions of the pool and by the roles that `rewards` names."""
    roles = []
    for section in config.rewards:
        if section.role is None:
            continue
        role = assembly.roles[section.role]
        assert isinstance(role, Reward | CustomRole), (section.role, role)
        retokenize = None
        if config.roles[section.role].retokenize:
            retokenize = retokenizer(config.model_path(section.role))
        roles.append(ScoringRole(role=role, weight=section.weight, retokenize=retokenize))
    return Scorer(pool, inputs.decode, config.sampling.stop, roles)


def make_evaluator(
    config: Config, world: World, inputs: Inputs, assembly: Assembly, scorer: Scorer
) -> Evaluator | None:
    """The evaluator of the held-out prompts; None without a set of them or without a rollout."""
    rollout = next((r for r in assembly.roles.values() if isinstance(r, Rollout)), None)
    if rollout is None or not isinstance(inputs.held_out, PromptSet):
        return None
    return Evaluator(
        world=world,
        name="held_out",
        prompts=inputs.held_out,
        rollout=rollout,
        scorer=scorer,
        sampling=evaluation_sampling(config),
        num_samples=config.evaluation.num_samples,
        k=config.evaluation.k,
        threshold=config.evaluation.threshold,
        seed=config.seed,
        results_dir=Path(config.run_dir) / "evaluation",
    )


class FlowError(RuntimeError):
    """Something went wrong while the flow ran; the cause has the traceback."""
