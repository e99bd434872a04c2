"""`spmdrl eval` and `spmdrl generate`: use the rollout engine without training, on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from spmdrl.batch import Batch
from spmdrl.config.data_sets import held_out_sets, train_sources, uses_chat
from spmdrl.config.sections import Config
from spmdrl.data.order import home_rows
from spmdrl.data.prompts import load_prompts
from spmdrl.distributed.reduce import gather_objects
from spmdrl.evaluation.results import write_results
from spmdrl.models.files.token_texts import token_texts
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.observe.log import Relay, TimedLines
from spmdrl.observe.metrics import MetricsWriter
from spmdrl.observe.trackers.registry import outbox_of
from spmdrl.placement import fold_text, place_roles
from spmdrl.rewards.server import RewardServer, start_reward_server
from spmdrl.role_spec import role_adapter
from spmdrl.roles.handles import Generation, Rollout
from spmdrl.roles.ledger import reporting
from spmdrl.roles.turn_calls import NO_TURNS, AllTurns
from spmdrl.rollout.protocol import Finish
from spmdrl.rollout.stops import StopTexts
from spmdrl.run.assembled import Assembly
from spmdrl.run.assembly.assembly import Model, assemble, open_models, plan_models
from spmdrl.run.assembly.factories import make_evaluators
from spmdrl.run.inputs import (
    Inputs,
    Reading,
    check_models,
    data_source,
    read_held_out,
    read_inputs,
    sampling_params,
)
from spmdrl.run.reward_pools import make_pools
from spmdrl.run.rubrics import read_rubrics
from spmdrl.run.turns import make_turns
from spmdrl.world import World, seed_everything

log = logging.getLogger(__name__)

GENERATE_KEY = -2
"""Value of `step` in the random numbers of `spmdrl generate`."""


def evaluate(config: Config, world: World, server: RewardServer) -> dict[str, float]:
    """Evaluate the rollout's model on every held-out set of prompts; `Evaluator.measure`'s metrics.

    Each set's samples are written to `run_dir/evaluation/NAME.jsonl`; the metrics also go to that
    folder, as metrics.jsonl and, with `log.tensorboard`, TensorBoard files.

    Raises:
        ValueError: bad input, or a configuration without a held-out set of prompts.
    """
    whole, config = config, rollout_only(config, scoring=True)
    inputs = evaluation_inputs(config)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    relay = Relay(is_first=world.is_first and config.log.progress)
    metrics: dict[str, float] = {}
    with (
        make_pools(config, server, run_dir, world, inputs, trains=False) as pools,
        make_turns(config, server, inputs, world) as turns,
    ):
        assembly = _start(config, world, inputs, whole, turns)
        evaluators = make_evaluators(config, world, inputs, assembly, pools, has_start=False)
        for name, evaluator in evaluators.items():
            with relay.bar(name), reporting(relay.report):
                metrics |= evaluator.measure(run_dir / "evaluation" / f"{name}.jsonl")
        assembly.close()
    with MetricsWriter(run_dir / "evaluation", is_first=world.is_first) as writer:
        if world.is_first and config.log.tensorboard:
            writer.track([outbox_of(run_dir / "evaluation", "tensorboard", {})])
        writer.write(0, metrics)
    return metrics


def evaluation_inputs(config: Config) -> Inputs:
    """Read the held-out sets of prompts, and the training data if some are held out of those."""
    kind = config.data_kind()
    described = held_out_sets(config)
    prompts = {name: d for name, d in described.items() if (d.kind or kind) == "prompts"}
    if not prompts:
        raise ValueError(
            "there are no prompts to evaluate on: set evaluation.sets.NAME.data, or "
            "evaluation.held_out to keep questions out of data.train"
        )
    if any(d.data is None for d in prompts.values()):
        return read_inputs(config, kind, TimedLines("the data"))
    tokenizer = load_tokenizer(config.model.path)
    now = datetime.now()
    reading = Reading(tokenizer=tokenizer, now=now, report=TimedLines("the data"))
    held_out = read_held_out(prompts, kind, reading, (), config.seed)
    return Inputs(
        tokenizer=tokenizer,
        texts=token_texts(tokenizer, chat=uses_chat(config)),
        train=next(iter(held_out.values())),
        shares=(),
        held_out=held_out,
        now=now,
        rubrics=read_rubrics(config, now),
    )


def generate(config: Config, world: World, prompts_file: str, out_file: str) -> int:
    """Generate responses to the prompts of a file, read with `data.train`'s columns, template and
    chat settings; return the number of responses.

    Each output line has `prompt_id`, `sample`, `prompt`, `response`, `finish`, `tokens` and
    `logprob` (the sum over the response).

    Raises:
        ValueError: bad input.
        OSError: the output cannot be written.
    """
    data = config.data.model_copy(update={"kind": "prompts"})  # even if the flow reads other data
    whole, config = config, rollout_only(config).model_copy(update={"data": data})
    tokenizer = load_tokenizer(config.model.path)
    changes = {"source": prompts_file, "answer_column": None, "size": None, "keep_shortest": "100%"}
    source = data_source(train_sources(config)[0], datetime.now())
    source = source.model_copy(update={**changes, "task": {}})
    prompts = load_prompts(source, tokenizer, TimedLines("the prompts"))
    inputs = Inputs(
        tokenizer=tokenizer,
        texts=token_texts(tokenizer, chat=uses_chat(config)),
        train=prompts,
        shares=(),
        held_out={},
        now=source.now,
    )
    with ExitStack() as stack:
        turns = NO_TURNS
        if prompts.takes_turns:
            server = stack.enter_context(start_reward_server())
            turns = stack.enter_context(make_turns(config, server, inputs, world))
        own = _generated(config, world, inputs, whole, turns)
    parts = gather_objects(own)
    if dist.get_rank() == 0:
        write_results(Path(out_file), [record for part in parts for record in part])
    return sum(len(part) for part in parts)


def _generated(
    config: Config, world: World, inputs: Inputs, whole: Config, turns: AllTurns
) -> list[dict[str, Any]]:
    """Lines of this rank's responses to the prompts of `inputs`."""
    relay = Relay(is_first=world.is_first and config.log.progress)
    assembly = _start(config, world, inputs, whole, turns)
    rollout = next(r for r in assembly.roles.values() if isinstance(r, Rollout))
    generation = Generation(
        seed=config.seed,
        step=GENERATE_KEY,
        group_size=config.evaluation.num_samples,
        sampling=sampling_params(config.sampling),
    )
    with relay.bar("generate"), reporting(relay.report):
        rows = home_rows(world, inputs.train)
        batch = rollout.generate(rows, generation)
    own = _records(batch, StopTexts(config.sampling.stop, inputs.texts))
    assembly.close()
    return own


def _records(batch: Batch, stops: StopTexts) -> list[dict[str, Any]]:
    """Lines of the output file, one for each row."""
    logprobs = batch.row_sum(batch["rollout_logprobs"]).tolist()
    responses = torch.split(batch["tokens"][batch["loss_mask"]], batch["response_lengths"].tolist())
    return [
        {
            "prompt_id": batch.objects["prompt"][row].prompt_id,
            "sample": int(batch["sample_index"][row]),
            "prompt": batch.objects["prompt"][row].text,
            "response": stops.before(responses[row].tolist()),
            "finish": Finish(int(batch["finish"][row])).text,
            "tokens": len(responses[row]),
            "logprob": logprobs[row],
        }
        for row in range(len(batch))
    ]


def rollout_only(config: Config, *, scoring: bool = False) -> Config:
    """Configuration with only the rollout role; with `scoring`, also the roles that reward.

    The rollout has the adapter that the policy reads from files, if it has none of its own.
    """
    names = [name for name in config.roles if config.role_kind(name) == "rollout"]
    if not names:
        raise ValueError(f"roles={sorted(config.roles)} has no rollout: add roles.rollout={{}}")
    kept = [names[0]]
    if scoring:
        sets = held_out_sets(config).values()
        lists = (config.rewards, *(described.rewards for described in sets))
        kept += [r.role for rewards in lists for r in rewards if r.role is not None]
    roles = {}
    for name in kept:
        role = config.roles[name]
        while str(role.ranks).startswith("same as "):
            # the role whose ranks it names may be left out
            other = config.roles.get(str(role.ranks).removeprefix("same as ").strip())
            role = role.model_copy(update={"ranks": "all" if other is None else other.ranks})
        # no sync would restore weights that were dropped
        residency = {part: wish for part, wish in role.residency.items() if wish != "drop"}
        # a role whose weights it shares may be left out
        base = role.base if role.base in kept else None
        role = role.model_copy(update={"residency": residency, "base": base})
        roles[name] = role
    policy = next((n for n in config.roles if config.role_kind(n) == "policy"), None)
    adapter = None if policy is None else config.roles[policy].adapter
    if roles[names[0]].adapter is None and adapter is not None and adapter.path is not None:
        roles[names[0]] = roles[names[0]].model_copy(update={"adapter": adapter})
    return config.model_copy(update={"roles": roles})


def whose_responses(config: Config) -> str:
    """Say which model responds. A run's own configuration names the one that it started from."""
    rollout = next(name for name in config.roles if config.role_kind(name) == "rollout")
    path, exported = config.model_path(rollout), Path(config.run_dir) / "model"
    adapter = config.roles[rollout].adapter
    text = f"the responses are those of {path}"
    if adapter is not None and adapter.path is not None:
        return f"{text} with the adapter {adapter.path}"
    if not exported.is_dir() or exported.resolve() == path.resolve():
        return text
    is_adapter = (exported / "adapter_config.json").exists()
    key = "model.path" if config.roles[rollout].model is None else f"roles.{rollout}.model"
    key = "roles.policy.adapter.path" if is_adapter else key
    return f"{text}; for those of the trained model set {key}={exported}"


def check_policys_adapter(config: Config, models: Mapping[str, Model]) -> None:
    """Check the policy's adapter on the rollout's model, so that errors name the role that has it
    in the configuration.

    Args:
        config: all roles.

    Raises:
        ValueError: see `role_adapter`.
    """
    policy = next((n for n in config.roles if config.role_kind(n) == "policy"), None)
    adapter = None if policy is None else config.roles[policy].adapter
    if policy is None or adapter is None or adapter.path is None:
        return
    rollout = next(name for name in models if config.role_kind(name) == "rollout")
    role_adapter(policy, config, models[rollout].model)


def _start(
    config: Config, world: World, inputs: Inputs, whole: Config, turns: AllTurns = NO_TURNS
) -> Assembly:
    seed_everything(config.seed)
    models = open_models(config)
    check_policys_adapter(whole, models)
    plan = plan_models(config, world, models)
    placements = place_roles(config, world.size, world.local_size)
    if folded := fold_text(config, placements, world.size):
        log.info("%s", folded)
    log.info("%s", whose_responses(config))
    check_models(config, inputs, plan.specs)
    judges = inputs.judge_texts
    return assemble(config, world, models, inputs.texts, plan, turns, judges)
