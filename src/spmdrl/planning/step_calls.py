"""The calls of a step on one rank, as the memory plan sees them: those of the shipped flows.

A user's own flow is planned as if it made the same calls.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from spmdrl.config.data_sets import described_sets, response_tokens
from spmdrl.config.sections import Config
from spmdrl.config.shipped_flows import is_shipped
from spmdrl.memory.host_state import staged_bytes
from spmdrl.memory.schedule import PlannedCall
from spmdrl.planning.activation_bytes import working_bytes
from spmdrl.planning.engines import engine_parts
from spmdrl.planning.generation_bytes import generation_bytes
from spmdrl.planning.parts import HeldModel, table_bytes, train_memory, uses_graphs
from spmdrl.planning.questions import judge_section
from spmdrl.planning.token_bounds import microbatch_tokens
from spmdrl.role_spec import RoleSpec
from spmdrl.roles.custom import FORWARD
from spmdrl.roles.model_calls import OPTIMIZER, OPTIMIZER_STEP, WEIGHTS
from spmdrl.roles.policy_sync import SYNC
from spmdrl.rollout.native.weights import MIN_STEPS
from spmdrl.weights.plan import NUM_SLOTS, SyncPlan

READ_ORDER = ("value", "reference", "teacher", "policy", "reward")
"""Kinds of roles in the order in which flows read from them; updates use it too."""


@dataclass(frozen=True, kw_only=True)
class RankCalls:
    """Calls of one rank's roles in a step; each group may be empty.

    Args:
        sync: brings the policy's weights to the rollout.
        generate: calls of rollouts.
        score: calls of the roles that `rewards` names, and of a judge of pairs.
        read: calls of the other models.
        update: calls of the trained models.
    """

    sync: tuple[PlannedCall, ...]
    generate: tuple[PlannedCall, ...]
    score: tuple[PlannedCall, ...]
    read: tuple[PlannedCall, ...]
    update: tuple[PlannedCall, ...]


def usual_step(config: Config, calls: RankCalls) -> list[PlannedCall]:
    """A step that follows another; with `lag: 1` it draws the samples of the next one."""
    if config.lag:
        # together with the update, which changes its weights: readers go first
        return [*calls.sync, *calls.score, *calls.read, *calls.generate, *calls.update]
    return [*calls.sync, *calls.generate, *calls.score, *calls.read, *calls.update]


def unusual_steps(config: Config, calls: RankCalls) -> dict[str, list[PlannedCall]]:
    """Steps with further calls, by the setting that causes them."""
    sampled = [*calls.generate, *calls.score]
    last = [*calls.read, *(calls.generate if config.lag else ()), *calls.update]
    again = [*calls.sync, *sampled, *sampled, *last]
    found = {}
    if (setting := _evaluation_between_syncs(config)) is not None:
        found[setting] = again
    if held_out := _reading_evaluation(config):
        found[held_out] = [*calls.sync, *calls.read, *sampled, *calls.read, *calls.update]
    if config.algorithm.refill_attempts > 0:
        found[f"algorithm.refill_attempts={config.algorithm.refill_attempts}"] = again
    if config.lag:  # the first step draws its own samples, and those of the next one
        found[f"lag={config.lag}"] = [*calls.sync, *sampled, *last]
    return found


def _evaluation_between_syncs(config: Config) -> str | None:
    """The setting that makes the rollout respond to held-out prompts and then, before the next
    sync, to others: those of the step, or of another set.
    """
    evaluation = config.evaluation
    sets = list(described_sets(config))
    if evaluation.before or evaluation.every > 0 or len(sets) > 1:
        return _sets_setting(config) if sets else None
    return None


def _reading_evaluation(config: Config) -> str | None:
    """The setting that makes models read held-out rows after a sync, before the rollout responds
    to others: flows of preferences and likelihoods evaluate so.
    """
    flow = config.flow_row
    reads = flow.reads_preference or not flow.samples
    if not (is_shipped(config.flow) and reads and described_sets(config)):
        return None
    return _sets_setting(config)


def _sets_setting(config: Config) -> str:
    evaluation = config.evaluation
    if evaluation.sets:
        return f"evaluation.sets={sorted(evaluation.sets)}"
    return f"evaluation.held_out={evaluation.held_out}"


def in_read_order(kinds: Mapping[str, str]) -> list[str]:
    """The roles of kinds in `READ_ORDER`, in that order."""
    return [name for kind in READ_ORDER for name, own in kinds.items() if own == kind]


def planned_calls(
    config: Config,
    here: Mapping[str, HeldModel],
    syncs: Mapping[str, SyncPlan],
    rank: int,
    customs: Iterable[str],
    *,
    syncs_from_host: bool = False,
    splits: Collection[str] = (),
) -> RankCalls:
    """The calls of the roles on this rank in a step.

    Args:
        here: the roles with a model on this rank.
        customs: users' own roles on this rank.
        syncs_from_host: the sync reads the policy's weights from the host.
        splits: roles whose optimizer is on the device only while it steps.
    """
    kinds = {name: model.spec.kind for name, model in here.items()}
    generate = [
        _generate_call(config, model, rank) for model in here.values() if model.spec.is_rollout
    ]
    # memory of a user's own role stays on the device
    score = {name: PlannedCall(name=f"{name}.{FORWARD}", needs=()) for name in customs}
    scoring = scoring_roles(config)
    judges = {n: _generate_call(config, m, rank) for n, m in here.items() if m.spec.is_judge}
    score |= judges
    read = [call for name, call in judges.items() if name not in scoring]
    update = []
    for name in in_read_order(kinds):
        model = here[name]
        method = {"reward": "score", "value": "values"}.get(kinds[name], "logprobs")
        added = train_memory(model, rank)
        work = _working_bytes(config, model.spec, backward=False) + added.reads
        call = PlannedCall(name=f"{name}.{method}", needs=((name, WEIGHTS),), working_bytes=work)
        if name in scoring:
            score[name] = call
        else:
            read.append(call)
        if model.spec.trained:
            work = _working_bytes(config, model.spec, backward=True)
            work += added.passes + added.gradients
            if model.windowed:
                work = max(work, added.gradients + staged_bytes(added.optimizer))
            needs = ((name, WEIGHTS), (name, OPTIMIZER))
            whole = PlannedCall(name=f"{name}.update", needs=needs, working_bytes=work)
            if name not in splits:
                update.append(whole)
                continue
            num_steps = model.spec.train.num_minibatches * model.spec.train.epochs
            update += halves(whole, added.gradients) * num_steps
    return RankCalls(
        sync=tuple(_sync_call(here, syncs, rank, from_host=syncs_from_host)),
        generate=tuple(generate),
        score=tuple(score[name] for name in scoring if name in score),
        read=tuple(read),
        update=tuple(update),
    )


def scoring_roles(config: Config) -> list[str]:
    """The roles that score a step's samples: those that `rewards` name, then a judge of pairs."""
    names = [reward.role for reward in config.rewards if reward.role is not None]
    judge = config.preference.judge
    return list(dict.fromkeys([*names, *([] if judge is None else [judge])]))


def halves(update: PlannedCall, gradients: int) -> list[PlannedCall]:
    """An optimizer step of an update as two calls: the passes over its rows, without the optimizer,
    and the step itself.

    Args:
        gradients: bytes of the gradients, which the step has from the passes.
    """
    role = update.name.removesuffix(".update")
    step = f"{role}.{OPTIMIZER_STEP}"
    return [
        replace(update, needs=((role, WEIGHTS),)),
        replace(update, name=step, working_bytes=gradients),
    ]


def _generate_call(config: Config, model: HeldModel, rank: int) -> PlannedCall:
    spec = model.spec
    parts = engine_parts(spec, captures_graphs=uses_graphs(config, model))
    # a native engine on a CPU decodes with a copy of its weights
    copies = not spec.is_vllm and spec.device_type == "cpu" and spec.dtype == torch.float32
    most = response_tokens(config)
    if spec.is_judge:
        most = judge_section(config, spec.name).max_tokens
    pays = copies and most >= MIN_STEPS
    return PlannedCall(
        name=f"{spec.name}.generate",
        needs=tuple((spec.name, part) for part in parts),
        working_bytes=generation_bytes(config, spec)
        + (table_bytes(model.layout[rank]) if pays else 0),
    )


def _working_bytes(config: Config, spec: RoleSpec, *, backward: bool) -> int:
    tokens = microbatch_tokens(config, spec, update=backward)
    return working_bytes(spec, tokens, backward=backward)


def _sync_call(
    here: Mapping[str, HeldModel], syncs: Mapping[str, SyncPlan], rank: int, *, from_host: bool
) -> Iterator[PlannedCall]:
    """The call that fills the rollouts' weights, if this rank takes part in one."""
    moving = [name for name, sync in syncs.items() if sync.moves]
    policies = [model for model in here.values() if model.spec.kind == "policy" and moving]
    source = tuple((model.spec.name, WEIGHTS) for model in policies)
    target = tuple((name, WEIGHTS) for name in moving if name in here)
    if source or target:
        staged = [NUM_SLOTS * syncs[name].slot_bytes for name in moving if syncs[name].moved_bytes]
        work = max(staged, default=0)
        work += sum(_merged_bytes(model, [syncs[n] for n in moving], rank) for model in policies)
        partly = tuple(part for part in target if syncs[part[0]].frozen_rounds)
        needs = () if from_host else source
        yield PlannedCall(name=SYNC, needs=needs, fills=target, adds_to=partly, working_bytes=work)


def _merged_bytes(policy: HeldModel, syncs: Iterable[SyncPlan], rank: int) -> int:
    """Bytes for merging an adapter: the largest matrix in float32, as rounded, and the one before.

    Args:
        syncs: those of the policy; 0 bytes if none of them moves a target of the adapter.
    """
    adapter = policy.spec.adapter
    if adapter is None:
        return 0
    moved = {cells.name for sync in syncs for one in sync.rounds for cells in one}
    merged = moved.intersection(adapter.targets)
    sizes = [
        math.prod(held.shape) * (4 + 2 * held.dtype.itemsize)
        for held in policy.layout[rank].values()
        if any(piece.name in merged for piece in held.slices)
    ]
    return max(sizes, default=0)
