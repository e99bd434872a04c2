"""`spmdrl check-collectives`: find out in one process whether all ranks call the same collectives.

Every rank of the run is a thread that runs the real start and two steps of the flow, made small
(`small_run`), in a world in which calls are compared and data move (`rehearsal`).
"""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from spmdrl.commands.plan_sections import node_size
from spmdrl.commands.small_run import (
    STEPS,
    DrawnRewards,
    small_config,
    small_inputs,
    small_models,
)
from spmdrl.commands.train import checked_flow, run_flow
from spmdrl.config.sections import Config
from spmdrl.distributed.mesh import format_ranks
from spmdrl.distributed.reduce import agreed
from spmdrl.observe.log import Relay
from spmdrl.placement import place_roles
from spmdrl.planning.plan import RolePlan, plan_roles, user_roles
from spmdrl.rehearsal.groups import join_world, threads_as_ranks
from spmdrl.rehearsal.lines import Stack, common_start, describe
from spmdrl.rehearsal.meetings import Finding, Meetings
from spmdrl.rehearsal.turns import QUIET_S, Turns
from spmdrl.rewards.pool import RewardPool
from spmdrl.run.assembly.assembly import Model, assemble
from spmdrl.run.assembly.factories import make_run
from spmdrl.run.inputs import Inputs, read_inputs
from spmdrl.run.lifetime import check_start
from spmdrl.run.reward_pools import scored_sets
from spmdrl.supervision.attempt import Attempt, begin_attempt
from spmdrl.supervision.pulse import Pulse
from spmdrl.supervision.watcher import Watcher
from spmdrl.world import World, seed_everything

MOST_FINDINGS = 5
"""Findings that are shown: the first is the cause of most others."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Result of a rehearsal.

    Args:
        num_classes: number of different sequences of calls among the ranks.
        findings: collectives in which ranks do not meet; none: all ranks agree.
        errors: error of each rank that failed.
    """

    num_ranks: int
    num_groups: int
    num_collectives: int
    num_messages: int
    num_classes: int
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    errors: Mapping[int, Exception]

    def describe(self) -> str:
        """Describe the result; findings with the lines of all sides."""
        size = (
            f"{self.num_ranks} ranks, {self.num_groups} groups, start and {STEPS} steps: "
            f"{self.num_collectives:,} collectives and {self.num_messages:,} messages"
        )
        if not self.findings:
            classes = f"{self.num_classes} class{'es' * (self.num_classes != 1)} of ranks"
            lines = [f"{size}; {classes}, and in every group all ranks call the same"]
            for note in self.notes[:MOST_FINDINGS]:
                lines += ["", "the same call from different lines, which may be meant so:"]
                lines += _finding_lines(note)
            return "\n".join(lines)
        lines = [f"{size} before ranks part:"]
        for finding in self.findings[:MOST_FINDINGS]:
            lines += ["", *_finding_lines(finding)]
        if more := len(self.findings) - MOST_FINDINGS:
            lines += ["", f"and {more} more, which may follow from these"] if more > 0 else []
        return "\n".join(lines)


def _finding_lines(finding: Finding) -> Iterator[str]:
    stacks = [side.stack for side in finding.sides if side.stack]
    # from the flow's innermost line on that all sides share
    start = max(0, min([common_start(stacks), *map(_num_outer, stacks)]) - 1)
    if finding.is_message:
        yield "a message that lacks its sender or receiver, or fits neither:"
    else:
        yield f"collective {finding.number:,} of {finding.group}:"
    for side in finding.sides:
        word = "rank" if len(side.ranks) == 1 else "ranks"
        yield f"  {word} {format_ranks(side.ranks)}: {side.text}"
        if side.stack:
            yield f"      {describe(side.stack, start, _num_outer(side.stack))}"


def check_collectives(
    config: Config, num_ranks: int, ranks_per_node: int | None = None
) -> Comparison:
    """Rehearse the start and two steps of a configuration on `num_ranks` ranks.

    Args:
        ranks_per_node: number of ranks on each node; None: all are on one node.

    Raises:
        ValueError: the run would refuse the configuration or its data, or a role has pipeline
            stages.
        TimeoutError: a rank waits for something that is no collective.
        Exception: all ranks raised an error, the first rank's.
    """
    nodes = node_size(num_ranks, ranks_per_node)
    with tempfile.TemporaryDirectory(prefix="spmdrl_") as run_dir, _quiet():
        rehearsal = _Rehearsal.of(config, num_ranks, nodes, run_dir)
        turns = Turns(num_ranks, nodes)
        meetings = Meetings(turns, lines_of_flow)
        with threads_as_ranks():
            turns.run(lambda rank: rehearsal.run(meetings, rank))
    errors = {r: end.error for r, end in enumerate(turns.outcomes) if end.error is not None}
    findings = meetings.findings()
    if errors and (len(errors) == num_ranks or not findings):
        raise next(iter(errors.values()))
    if turns.is_abandoned and not findings:
        raise TimeoutError(f"ranks only sleep and poll, for {QUIET_S:g} s: nothing can be compared")
    return Comparison(
        num_ranks=num_ranks,
        num_groups=len(meetings.groups),
        num_collectives=meetings.num_collectives,
        num_messages=meetings.num_messages,
        num_classes=len(set(meetings.paths)),
        findings=tuple(findings),
        notes=tuple(meetings.notes.values()),
        errors=errors,
    )


_PACKAGE = Path(__file__).parents[1]
_COMMANDS = str(Path(__file__).parent)
_FLOWS = str(_PACKAGE / "flows")


def lines_of_flow(stack: Stack) -> Stack:
    """The lines of the flow and of what it calls of its own, outermost first.

    They must be equal on all ranks. Below them a rank may take another line to the same collective
    (a source that sends where others receive, say).
    """
    return tuple(reversed(stack))[_num_start(stack) : _num_outer(stack)]


def _num_start(stack: Stack) -> int:
    """Number of outermost lines before the flow's."""
    lines = enumerate(reversed(stack))
    return next((i for i, line in lines if not line[0].startswith(_COMMANDS)), len(stack))


def _num_outer(stack: Stack) -> int:
    """Number of outermost lines until a line below the flow."""
    start = _num_start(stack)
    for i, (file, _, _) in enumerate(tuple(reversed(stack))[start:], start):
        if file.startswith(str(_PACKAGE)) and not file.startswith(_FLOWS):
            return i
    return len(stack)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the run itself prints and logs."""
    level, threads = logging.root.manager.disable, torch.get_num_threads()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # of torch on itself
            yield
    finally:
        torch.set_num_threads(threads)
        logging.disable(level)


@dataclass(frozen=True, kw_only=True)
class _Rehearsal:
    """Configuration, models, plan and data of a rehearsal, which its ranks share and only read."""

    config: Config
    num_ranks: int
    node_size: int
    models: Mapping[str, Model]
    plan: RolePlan
    inputs: Inputs
    store: object

    @classmethod
    def of(cls, config: Config, num_ranks: int, node_size: int, run_dir: str) -> _Rehearsal:
        small = small_config(config, num_ranks, run_dir)
        placements = place_roles(small, num_ranks, node_size)
        models = small_models(small, placements)
        shapes = {name: model.model for name, model in models.items()}
        plan = plan_roles(small, placements, shapes, ["cpu"] * num_ranks, node_size)
        inputs = read_inputs(config, config.data_kind())
        return cls(
            config=small,
            num_ranks=num_ranks,
            node_size=node_size,
            models=models,
            plan=plan,
            inputs=small_inputs(inputs, small),
            store=dist.HashStore(),  # type: ignore[attr-defined]
        )

    def run(self, meetings: Meetings, rank: int) -> None:
        """Run the start and the flow on one rank, as `train` does."""
        join_world(meetings, self.store, rank)
        world = _SmallWorld(
            rank=rank,
            size=self.num_ranks,
            local_rank=rank % self.node_size,
            local_size=self.node_size,
            device=torch.device("cpu"),
            device_types=("cpu",) * self.num_ranks,
            store=self.store,  # type: ignore[arg-type]
        )
        config = self.config
        watcher = _NoWatcher(begin_attempt(Path(config.run_dir), world))
        flow = agreed(ValueError, lambda: checked_flow(config))
        seed_everything(config.seed)
        # every rank has users' roles of its own
        plan = agreed(ValueError, lambda: replace(self.plan, users=user_roles(config)))
        check_start(watcher)
        texts, judges = self.inputs.texts, self.inputs.judge_texts
        assembly = assemble(config, world, self.models, texts, plan, judges=judges)
        pools, relay = _pools(config, self.inputs), Relay(is_first=False)
        run, life = make_run(config, world, self.inputs, assembly, pools, watcher, relay)
        with closing(run):
            run_flow(flow, run, life)
        assembly.close()


def _pools(config: Config, inputs: Inputs) -> dict[str, RewardPool]:
    scored = scored_sets(config, inputs, trains=True)
    names = {key: [spec.name for spec in what.specs] for key, what in scored.items()}
    return {key: DrawnRewards(own) for key, own in names.items()}


class _SmallWorld(World):
    """A world whose ranks do not compare their role calls through the store: their collectives
    are compared, which shows the lines.
    """

    def connect(self, prefix: str) -> object:  # type: ignore[override]
        own = f"{prefix}/{self.rank}" if prefix.endswith("/calls") else prefix
        return dist.PrefixStore(own, self.store)  # type: ignore[attr-defined]


class _NoWatcher(Watcher):
    """A watcher without a thread: nobody asks a rehearsal to stop."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt, self.pulse = attempt, Pulse()
        self.stop_asked, self.stop_by, self.broken = False, None, None

    def look_for_requests(self) -> bool:
        return False

    def agreed(self) -> None:
        pass
