"""`spmdrl train`: start the flow of a configuration, the same on every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from spmdrl.commands.start_environment import set_recorder_files
from spmdrl.config.doubts import doubts
from spmdrl.config.sections import Config
from spmdrl.config.shipped_flows import flow_row, is_shipped, shipped_flows
from spmdrl.config.user_objects import AgreedError, load_object
from spmdrl.distributed.reduce import agreed
from spmdrl.observe.log import Relay, TimedLines
from spmdrl.observe.trackers.registry import find_tracker
from spmdrl.placement import fold_text, place_roles, placement_table
from spmdrl.planning.forecast.host_rates import resident_bytes
from spmdrl.planning.memory import memory_texts, schedules
from spmdrl.planning.plan import RolePlan
from spmdrl.rewards.scorer import RewardsFailed
from spmdrl.rewards.server import RewardServer
from spmdrl.roles.ledger import keeping, reporting
from spmdrl.run.assembly.assembly import assemble, open_models, plan_models
from spmdrl.run.assembly.factories import make_run
from spmdrl.run.data_identity import first_start
from spmdrl.run.host_room import check_host
from spmdrl.run.inputs import (
    check_models,
    read_inputs,
)
from spmdrl.run.lifetime import Lifetime, check_start, stop_start
from spmdrl.run.predicting import Predicting, run_machine
from spmdrl.run.record import write_start
from spmdrl.run.reward_pools import make_pools
from spmdrl.run.run import Run
from spmdrl.run.turns import make_turns
from spmdrl.run.user_parts import check_flow, check_parts
from spmdrl.supervision.attempt import begin_attempt
from spmdrl.supervision.pulse import Pulse
from spmdrl.supervision.signals import Signals
from spmdrl.supervision.stopping import StopAsked
from spmdrl.supervision.watcher import Watcher
from spmdrl.world import World, seed_everything

log = logging.getLogger(__name__)

LIMIT = 0.9
"""Share of `timeout_s` without progress that counts as a hang: collectives have not failed yet."""

Flow = Callable[[Run], None]


def find_flow(name: str) -> Flow:
    """Find a shipped flow by name, or a user's `path/to/my_flow.py:main`.

    Raises:
        ValueError: the name is neither.
    """
    if ":" not in name and not is_shipped(name):
        shipped = sorted(row.name for row in shipped_flows())
        raise ValueError(
            f"flow={name!r}: shipped flows are {shipped}; a flow of your own is "
            "path/to/my_flow.py:function"
        )
    found: Flow = load_object(flow_row(name).function, "flow")
    return found


def checked_flow(config: Config) -> Flow:
    """Find the flow, and check it and the environment and trainer that the configuration names.

    Raises:
        ValueError: as `find_flow`, `check_flow` and `check_parts`.
    """
    flow = find_flow(config.flow)
    check_flow(config, flow)
    check_parts(config)
    for name in config.log.trackers:
        find_tracker(name)
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
    set_recorder_files(attempt.directory)
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
    process_bytes = resident_bytes()
    machine = agreed(ValueError, lambda: run_machine(config, world))
    models = open_models(config)
    plan = agreed(ValueError, lambda: plan_models(config, world, models))
    run_dir = Path(config.run_dir)
    inputs = read_inputs(
        config,
        config.data_kind(),
        TimedLines("the data", watcher.pulse.beat),
        lambda: first_start(config, run_dir / "checkpoints"),
    )
    check_models(config, inputs, plan.specs)
    check_host(config, plan, world)
    check_start(watcher)
    _tell_plan(config, world, plan)
    write_start(config, world, watcher.attempt.directory)
    relay = Relay(is_first=world.is_first and config.log.progress)

    with (
        make_pools(config, server, run_dir, world, inputs) as pools,
        make_turns(config, server, inputs, world) as turns,
    ):
        watcher.look_after(server.ended)
        for pool in pools.values():
            watcher.look_after(pool.look)
        judges = inputs.judge_texts
        assembly = assemble(config, world, models, inputs.texts, plan, turns, judges)
        for (source, target), sync in assembly.syncs.items():
            log.info("weights %s -> %s: %s", source, target, sync.plan.describe())
        predicting = Predicting(
            config=config, world=world, plan=plan, machine=machine, process_bytes=process_bytes
        )
        run, lifetime = make_run(config, world, inputs, assembly, pools, watcher, relay, predicting)
        with closing(run):
            run_flow(flow, run, lifetime)
        assembly.close()


def run_flow(flow: Flow, run: Run, lifetime: Lifetime) -> None:
    """Run the flow to its end or to a stop.

    Raises:
        ValueError: before the first step: bad input, or a return without `run.conclude()`.
        AgreedError: the user's reward functions failed within a step.
        FlowError: the same ValueErrors once steps have begun.
    """
    try:
        with keeping(lifetime.ledger), reporting(run.progress):
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


def _tell_plan(config: Config, world: World, plan: RolePlan) -> None:
    placements = place_roles(config, world.size, world.local_size)
    table = placement_table(placements, memory_texts(plan.memory))
    for doubt in doubts(config) if world.is_first else ():
        log.warning("%s", doubt)
    if folded := fold_text(config, placements, world.size):
        log.info("%s", folded)
    log.info("%d ranks on %s\n%s", world.size, world.device.type, table)
    for text in schedules(plan.memory):
        log.info("%s", text)


class FlowError(RuntimeError):
    """A failure while the flow ran; its cause has the traceback."""
