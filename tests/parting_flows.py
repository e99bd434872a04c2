"""A flow in which ranks part, in several ways, for `spmdrl check-collectives`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from spmdrl.api import (
    Batch,
    GroupEnvironment,
    Policy,
    Run,
    joined,
    moments,
    update_metrics,
    update_of,
    world_sum,
)


def imitate(given):
    metrics = {"tokens": torch.tensor(len(given["logprobs"])).double()}
    return -given["logprobs"].sum(), metrics


Fault = Callable[[Run, Policy, Sequence[dist.ProcessGroup], Batch], object]


def train(run: Run, fault: Fault) -> None:
    policy = run.role("policy", Policy)
    environment = run.make(run.config.environment, GroupEnvironment)
    sync = run.weight_sync("policy", "rollout")
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    for step in run.steps():
        sync.run()
        batch = environment.collect(step)
        batch = batch.with_columns(rows={"loss_share": batch["response_lengths"].double()})
        fault(run, policy, groups, batch)
        update = update_of(run, "policy", step, columns=(), temperature=1.0)
        records = policy.update(batch, imitate, update)  # after the fault
        run.finish(step, batch, joined(environment.metrics(), update_metrics(records)))
    run.conclude()


def nothing(run: Run) -> None:
    train(run, lambda *_: None)


def branch(run: Run) -> None:
    def fault(run, policy, groups, batch):
        if run.world.is_first:
            world_sum(torch.ones(2))  # branch

    train(run, fault)


def counts(run: Run) -> None:
    def fault(run, policy, groups, batch):
        for _ in range(int(batch["response_lengths"].sum()) // 3):
            moments(batch["rewards"])  # counts

    train(run, fault)


def swapped(run: Run) -> None:
    def fault(run, policy, groups, batch):
        first, second = groups if run.world.rank == 0 else reversed(groups)
        if run.world.rank < 2:
            dist.all_reduce(torch.ones(1), group=first)  # swapped
            dist.all_reduce(torch.ones(1), group=second)

    train(run, fault)


def skipped(run: Run) -> None:
    def fault(run, policy, groups, batch):
        if not policy.mesh.is_member:
            policy.logprobs(batch, 1.0)  # skipped

    train(run, fault)


def failing(run: Run) -> None:
    def fault(run, policy, groups, batch):
        if run.world.rank == 3:
            raise RuntimeError("only here")  # failing

    train(run, fault)


def line_of(mark: str) -> int:
    """Number of the line of this file that ends with a comment."""
    with open(__file__, encoding="utf-8") as file:
        return next(i for i, line in enumerate(file, 1) if line.endswith(f"  # {mark}\n"))
