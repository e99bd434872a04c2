"""`spmdrl train`: from a configuration to a running flow, on every rank alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from spmdrl.assemble import Assembly, assemble, open_models
from spmdrl.config import Config
from spmdrl.data.home import StepPrompts
from spmdrl.data.order import PromptStream
from spmdrl.data.prompts import Prompt
from spmdrl.evaluation.evaluator import Evaluator
from spmdrl.flows.grpo import grpo
from spmdrl.flows.inputs import (
    Inputs,
    check_lengths,
    evaluation_sampling,
    make_pool,
    read_inputs,
    sampling_params,
)
from spmdrl.flows.run import Run, load_object
from spmdrl.flows.saving import Saver
from spmdrl.launch import World, seed_everything
from spmdrl.models.hf import check_tokenizer
from spmdrl.observe.progress import Relay
from spmdrl.observe.timeline import PhaseTimer
from spmdrl.placement import place_roles, placement_table
from spmdrl.rewards.scorer import Scorer
from spmdrl.rewards.server import RewardServer
from spmdrl.roles import Rollout

log = logging.getLogger(__name__)

Flow = Callable[[Run], None]

FLOWS: dict[str, Flow] = {"grpo": grpo}


def find_flow(name: str) -> Flow:
    """A shipped flow by name, or a user's `path/to/my_flow.py:main`.

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
    flow: Flow = load_object(name)
    return flow


def train(config: Config, world: World, server: RewardServer) -> None:
    """Run the configured flow. Whatever the input can get wrong is refused before it starts.

    Raises:
        ValueError: bad input, on every rank.
    """
    flow = find_flow(config.flow)
    seed_everything(config.seed)
    placements = place_roles(config, world.size)
    models = open_models(config, placements)
    inputs = read_inputs(config)
    for name, model in models.items():
        check_tokenizer(inputs.tokenizer, model.config)
        check_lengths(config, name, model.config.max_position)
    log.info("%d ranks on %s\n%s", world.size, world.device.type, placement_table(placements))
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    relay = Relay(is_first=world.is_first and config.log.progress)
    with make_pool(config, server, run_dir, world.rank) as pool:
        assembly = assemble(config, world, models, inputs.decode, relay.report)
        for (source, target), sync in assembly.syncs.items():
            log.info("weights %s -> %s: %s", source, target, sync.plan.describe())
        scorer = Scorer(pool, inputs.decode, config.sampling.stop)
        run = make_run(config, world, inputs, assembly, scorer, relay)
        try:
            flow(run)
        except ValueError as error:
            # the command line shows bad input as one line; this is no bad input any more
            raise FlowError(f"in step {run.steps_done + 1}: {error}") from error


def make_run(
    config: Config,
    world: World,
    inputs: Inputs,
    assembly: Assembly,
    scorer: Scorer,
    relay: Relay,
) -> Run:
    stream = PromptStream(
        seed=config.seed,
        num_prompts=len(inputs.train),
        prompts_per_step=config.data.prompts_per_step,
    )
    return Run(
        config=config,
        world=world,
        roles=assembly.roles,
        syncs=assembly.syncs,
        prompts=StepPrompts(world, inputs.train, stream),
        scorer=scorer,
        evaluator=make_evaluator(config, world, inputs, assembly, scorer),
        saver=Saver(config, assembly.trained(), assembly.layouts),
        sampling=sampling_params(config.sampling),
        timer=PhaseTimer(synchronize=world.synchronize),
        relay=relay,
    )


def make_evaluator(
    config: Config, world: World, inputs: Inputs, assembly: Assembly, scorer: Scorer
) -> Evaluator | None:
    """The evaluator of the held-out set; None without a set or without a rollout."""
    rollout = next((r for r in assembly.roles.values() if isinstance(r, Rollout)), None)
    if rollout is None or not inputs.held_out:
        return None
    held_out: list[Prompt] = list(inputs.held_out)
    return Evaluator(
        world=world,
        name="held_out",
        prompts=held_out,
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
