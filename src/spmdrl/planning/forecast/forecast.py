"""`forecast_step`: the seconds of a usual step, by phase, from configuration, plan and machine.

One rank stands for all ranks of a role: the one that computes most. So a plan for thousands of
ranks takes as long as one for a few.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from spmdrl.config.sections import Config
from spmdrl.planning.forecast.flow_calls import FlowCall, flow_calls
from spmdrl.planning.forecast.machine import Machine
from spmdrl.planning.forecast.move_work import move_work
from spmdrl.planning.forecast.rollout_work import (
    RolloutRank,
    decode_segments,
    decode_work,
    generated_lengths,
    generated_samples,
    prefill_work,
    running_rows,
)
from spmdrl.planning.forecast.seconds import Timed, seconds_of
from spmdrl.planning.forecast.shapes import RankShapes, rank_shapes
from spmdrl.planning.forecast.step import CallForecast, Lengths, StepForecast
from spmdrl.planning.forecast.streams import Stream, make_stream
from spmdrl.planning.forecast.sync_work import sync_work
from spmdrl.planning.forecast.timeline import Timeline, run_calls
from spmdrl.planning.forecast.train_work import TrainRank, bubble, read_work, update_work
from spmdrl.planning.forecast.work import NOTHING, Work, total
from spmdrl.planning.plan import RolePlan
from spmdrl.planning.token_bounds import step_sizes, update_sizes
from spmdrl.role_spec import RoleSpec
from spmdrl.roles.policy_sync import SYNC
from spmdrl.training.readout import Places


def full_lengths(config: Config) -> Lengths:
    """Lengths of rows that are all as long as the configuration allows."""
    sizes = step_sizes(config)
    response = float(sizes.row_tokens - sizes.prompt_tokens)
    return Lengths(prompt=float(sizes.prompt_tokens), response=response, longest=response)


def forecast_step(
    config: Config, plan: RolePlan, machine: Machine, lengths: Lengths
) -> StepForecast:
    """Forecast a usual step: neither the first, nor with an evaluation or a checkpoint.

    Args:
        plan: the plan of the configuration's roles on this machine's ranks.
        lengths: the step's tokens, `full_lengths` for the most that there can be.
    """
    made = _Maker(config=config, plan=plan, machine=machine, lengths=lengths)
    stages = made.stages(lag=config.lag > 0)
    ranks = sorted({rank for placed in plan.specs.values() for rank in placed.placement.ranks})
    timeline = run_calls(stages, ranks)
    phases = _with_rest(timeline, machine, config)
    seconds = sum(phases.values())
    saves = 0.0
    if config.flow_row.may_lag and not config.lag:
        ahead = run_calls(made.stages(lag=True), ranks)
        saves = max(0.0, timeline.seconds - ahead.seconds)
    sizes = step_sizes(config)
    return StepForecast(
        calls=[call for stage in stages for call in stage],
        phase_seconds=phases,
        seconds=seconds,
        tokens=sizes.rows * (lengths.prompt + lengths.response),
        idle_share={
            rank: max(0.0, timeline.seconds - busy) / max(1e-12, seconds)
            for rank, busy in timeline.busy.items()
        },
        lag_saves=saves,
    )


class StepFlops:
    """Counts the floating point operations of usual steps by phase, over all ranks.

    They are the models': what layouts compute twice and backward passes repeat does not count
    (Chowdhery et al. 2022, PaLM, appendix B: model FLOPs utilisation).
    """

    def __init__(self, config: Config, plan: RolePlan) -> None:
        specs = {name: _alone(spec) for name, spec in plan.specs.items()}
        self._works = _Works(
            config=config, plan=replace(plan, specs=specs), node_size=1, repeats=False
        )
        self._calls = list(flow_calls(config, specs, lag=config.lag > 0))

    def of(self, lengths: Lengths) -> dict[str, float]:
        """Count those of a step with rows of these lengths."""
        found: dict[str, float] = {}
        for call in self._calls:
            flops = sum(work.total_flops for work, _ in self._works.parts(call, lengths))
            found[call.phase] = found.get(call.phase, 0.0) + flops
        return found


def _alone(spec: RoleSpec) -> RoleSpec:
    """The role on one rank."""
    placed = spec.placement
    degrees = dict.fromkeys(placed.degrees, 1)
    return replace(spec, placement=replace(placed, ranks=placed.ranks[-1:], degrees=degrees))


def _with_rest(timeline: Timeline, machine: Machine, config: Config) -> dict[str, float]:
    """Seconds by phase with those that no count of work explains, functions of rewards among
    them.
    """
    rest = machine.phase_s
    own = ["reward", "logprobs"] if config.data_kind() == "prompts" else []
    names = dict.fromkeys([*timeline.phases, *(name for name in own if name in rest)])
    phases = {name: timeline.phases.get(name, 0.0) + rest.get(name, 0.0) for name in names}
    return phases | ({"other": rest["other"]} if "other" in rest else {})


@dataclass(kw_only=True)
class _Maker:
    """Forecasts of a step's calls."""

    config: Config
    plan: RolePlan
    machine: Machine
    lengths: Lengths

    @cached_property
    def _works(self) -> _Works:
        return _Works(
            config=self.config,
            plan=self.plan,
            node_size=self.machine.devices_per_node,
        )

    @cached_property
    def _made(self) -> dict[str, CallForecast]:
        """Forecasts by the calls' names, those of syncs by the rollout's."""
        calls = flow_calls(self.config, self.plan.specs, lag=False)
        syncs = {call.role: call for call in self._syncs()}
        return syncs | {call.name: self._call(call) for call in calls}

    def stages(self, *, lag: bool) -> list[list[CallForecast]]:
        calls = flow_calls(self.config, self.plan.specs, lag=lag)
        stages = [[self._made[name] for name in self.plan.syncs]]
        for _, own in groupby(calls, key=lambda call: call.stage):
            stages.append([replace(self._made[call.name], phase=call.phase) for call in own])
        return stages

    def _syncs(self) -> Iterator[CallForecast]:
        specs = self.plan.specs
        policy = next((spec for spec in specs.values() if spec.kind == "policy"), None)
        for i, (name, sync) in enumerate(self.plan.syncs.items()):
            assert policy is not None, name
            target = specs[name]
            ranks = sorted({*policy.placement.ranks, *target.placement.ranks})
            work = sync_work(sync, self.machine.devices_per_node)
            moves = self._moves(ranks, SYNC) if i == 0 else NOTHING
            yield self._timed(policy, name, "sync", "sync", [(work, 1.0)], moves, tuple(ranks))

    def _call(self, call: FlowCall) -> CallForecast:
        spec = self.plan.specs[call.role]
        parts = self._works.parts(call, self.lengths)
        ranks = spec.placement.ranks
        moves = self._moves(ranks, call.name, _minibatches(spec))
        return self._timed(spec, call.role, call.method, call.phase, parts, moves, ranks)

    def _timed(
        self,
        spec: RoleSpec,
        role: str,
        method: str,
        phase: str,
        parts: list[tuple[Work, float]],
        moves: Work,
        ranks: tuple[int, ...],
    ) -> CallForecast:
        """Add up works that are done one after another, each with its factor of waiting."""
        dtype, machine = str(spec.dtype).removeprefix("torch."), self.machine
        timed = [(seconds_of(work, machine, dtype), factor) for work, factor in parts]
        timed.append((seconds_of(moves, machine, dtype), 1.0))
        # samples that are drawn ahead are in the phase of the update
        own_phase = "rollout" if method == "generate" else phase
        share = machine.phase_shares.get(own_phase, 1.0)
        timed = [(own, factor / share) for own, factor in timed]
        bounds = {name: sum(own.parts[name] * f for own, f in timed) for name in timed[0][0].parts}
        return CallForecast(
            role=role,
            call=method,
            phase=phase,
            work=total([*[work for work, _ in parts], moves]),
            timed=Timed(seconds=sum(own.seconds * f for own, f in timed), parts=bounds),
            ranks=ranks,
        )

    def _moves(self, ranks: tuple[int, ...] | list[int], name: str, num_steps: int = 1) -> Work:
        """The moves before a call, and in the optimizer steps of an update, of the rank that moves
        most.
        """
        memory = self.plan.memory
        known = {id(memory[rank]): memory[rank] for rank in ranks if rank in memory}
        moves = [move_work(own, name, num_steps=num_steps) for own in known.values()]
        return max(moves, key=lambda work: work.link_bytes.get("host", 0.0), default=NOTHING)


@dataclass(frozen=True, kw_only=True)
class _Works:
    """Works of a step's calls, each of the rank that computes most; see `TrainRank`."""

    config: Config
    plan: RolePlan
    node_size: int
    repeats: bool = True

    @cached_property
    def _shapes(self) -> dict[str, RankShapes]:
        return {}

    @cached_property
    def _ranks(self) -> dict[str, TrainRank]:
        return {}

    def parts(self, call: FlowCall, lengths: Lengths) -> list[tuple[Work, float]]:
        """Works that are done one after another, each with the factor of its waiting in a
        pipeline.
        """
        spec = self.plan.specs[call.role]
        if call.method == "generate":
            return [(work, 1.0) for work in self._generation(spec, lengths)]
        rank, stream = self._train_rank(spec), self._stream(spec, call, lengths)
        if call.method == "update":
            work, times = update_work(rank, stream), _minibatches(spec)
        else:
            work, times = read_work(rank, stream), 1 + call.others
        return [(work * times, bubble(rank, stream))]

    def _shapes_of(self, spec: RoleSpec) -> RankShapes:
        if spec.name not in self._shapes:
            self._shapes[spec.name] = rank_shapes(
                spec.model, spec.placement.degrees, spec.head, spec.adapter
            )
        return self._shapes[spec.name]

    def _train_rank(self, spec: RoleSpec) -> TrainRank:
        if spec.name not in self._ranks:
            self._ranks[spec.name] = self._make_rank(spec)
        return self._ranks[spec.name]

    def _make_rank(self, spec: RoleSpec) -> TrainRank:
        # its last rank is in the last stage, which has the head
        rank = spec.placement.ranks[-1]
        return TrainRank(
            spec=spec,
            shapes=self._shapes_of(spec),
            table=self.plan.layouts[spec.name][rank],
            states=self.plan.state_layouts[spec.name][rank],
            node_size=self.node_size,
            repeats=self.repeats,
        )

    def _stream(self, spec: RoleSpec, call: FlowCall, lengths: Lengths) -> Stream:
        is_update = call.method == "update"
        reads_all = call.method == "score"
        sizes = step_sizes(self.config) if reads_all else update_sizes(self.config)
        items = -(-sizes.items // spec.train.num_minibatches) if is_update else sizes.items
        places: Places = "rows" if spec.kind == "reward" else "loss_tokens"
        return make_stream(
            sizes,
            lengths,
            spec.train,
            places,
            items=items,
            num_replicas=spec.placement.num_replicas,
            whole=is_update and sizes.whole,
        )

    def _generation(self, spec: RoleSpec, given: Lengths) -> Iterator[Work]:
        on_cuda = spec.device_type == "cuda"
        rank = RolloutRank(
            spec=spec,
            shapes=self._shapes_of(spec),
            captures=on_cuda and (spec.is_vllm or self.config.rollout.cuda_graphs),
            node_size=self.node_size,
        )
        lengths = generated_lengths(self.config, spec, given)
        yield prefill_work(rank, self.config, lengths)
        running = running_rows(self.config, spec, lengths)
        samples = generated_samples(self.config, spec)
        for segment in decode_segments(samples, running, lengths):
            yield decode_work(rank, segment) * segment.steps


def _minibatches(spec: RoleSpec) -> int:
    return spec.train.epochs * spec.train.num_minibatches
