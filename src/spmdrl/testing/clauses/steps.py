"""Clauses on optimizer steps: several of them, those that must not move, and exact resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from spmdrl.batch import Batch
from spmdrl.models.sharding import buffer_names
from spmdrl.testing.cases import (
    in_parts,
    loss_fn,
    make_rows,
    not_finite,
    tiny_adapter,
    tiny_experts,
    with_loss_shares,
    without_signal,
)
from spmdrl.testing.clause import (
    Finding,
    Findings,
    close,
    near,
    near_sums,
    same,
    slices_close,
    unchanged,
)
from spmdrl.testing.reference import (
    copies,
    everything,
    logprobs,
    of_kind,
    probe,
    take_step,
    whole_state,
    whole_tensors,
)
from spmdrl.testing.subject import Ask, Role, Subject
from spmdrl.training.readout import next_token

NUM_STEPS = 3
STILL_ROWS = ([4, 6, 5, 3], 2)
LINEAR = {"schedule": "linear"}


def plain_rows(step: int) -> Batch:
    """Rows of a step: in the second one with parts, in the third without every third token."""
    rows = make_rows([6, 3, 9, 4], 3, seed=step, seconds=step == 2)
    return in_parts(rows) if step == 1 else rows


def steps(subject: Subject) -> Findings:
    """Losses, norms, weights and moments of three steps are those of the torch backend."""
    yield from follow(subject, subject.ask())


def experts(subject: Subject) -> Findings:
    """A mixture of experts with a balance loss trains as with the torch backend."""
    yield from follow(
        subject,
        subject.ask(model=tiny_experts(), train={"balance_coef": 0.3}),
        lambda step: with_loss_shares(plain_rows(step)),
    )


def follow(
    subject: Subject,
    ask: Ask,
    rows_of: Callable[[int], Batch] = plain_rows,
    made: tuple[Role, Role] | None = None,
) -> Findings:
    """Find where three steps of a role are not those of the torch backend on one rank.

    The last replica has no rows in the second step. Weights are read between the steps, where
    nothing that was gathered may be out of date.

    Args:
        made: the role and its reference, if they are made.
    """
    role, reference = (subject.role(ask), subject.reference(ask)) if made is None else made
    rows = probe()
    yield from close("logprobs", logprobs(role, rows), logprobs(reference, rows), atol=1e-5)
    for step in range(NUM_STEPS):
        whole = rows_of(step)
        own = role.share(whole, role.mesh.size("dp") - 1 if step == 1 else None)
        role.held.forward(own, next_token(1.0))
        found, expected = take_step(role, own), take_step(reference, whole)
        yield from near_sums(found.sums, expected.sums, 1e-4)
        yield from near("grad_norm", found.done.grad_norm, expected.done.grad_norm, 1e-4)
        yield from same("lr", found.done.lr, expected.done.lr)
        yield from same("skipped", found.done.skipped, False)
    counters = {"num_steps": NUM_STEPS, "num_skipped": 0}
    yield from same("counters", role.held.counters(), counters)
    yield from close("logprobs", logprobs(role, rows), logprobs(reference, rows), atol=1e-4)
    yield from like_reference(role, reference)


def like_reference(role: Role, reference: Role) -> Findings:
    """Find where weights and state of a role differ from those of a role on one rank."""
    weights = whole_tensors(reference.held.local_tensors())
    yield from slices_close("the weights", role.held.local_tensors(), weights, rtol=1e-4, atol=1e-5)
    state = role.held.state_tensors()
    fixed = buffer_names(role.ask.model)
    for kind, rtol in (("weights", 1e-4), ("exp_avg", 1e-3), ("exp_avg_sq", 1e-3)):
        whole = whole_state(reference, kind)
        held = of_kind(state, kind)
        names = {piece.name for _, slices in held.values() for piece in slices}
        unknown = sorted(names - whole.keys() - fixed)
        yield from same(f"no {kind} but of what trains", unknown, [])
        yield from slices_close(kind, held, whole, rtol=rtol, atol=1e-5)


def no_signal(subject: Subject) -> Findings:
    """A minibatch without signal moves neither weights nor moments nor the schedule."""
    rows = make_rows(*STILL_ROWS)
    for dtype in subject.dtypes:
        role = subject.role(subject.ask(dtype=dtype, train={"warmup_steps": 4}))
        own = role.share(rows)
        yield from same(
            "no_gradient of a step with signal", take_step(role, own).done.no_gradient, False
        )
        before = copies(everything(role))
        done = take_step(role, own, loss=without_signal).done
        yield from same("grad_norm", done.grad_norm, 0.0)
        yield from same("no_gradient, skipped", (done.no_gradient, done.skipped), (True, False))
        yield from same("counters", role.held.counters(), {"num_steps": 1, "num_skipped": 0})
        yield from unchanged("weights and state", everything(role), before)
        done = take_step(role, own).done
        yield from near("the lr of the second of four steps of warm-up", done.lr, 5e-3, 1e-6)
        yield from same("counters", role.held.counters(), {"num_steps": 2, "num_skipped": 0})


def non_finite(subject: Subject) -> Findings:
    """A gradient that is not finite on one replica moves only the schedule, on all ranks."""
    rows = make_rows(*STILL_ROWS)
    role = subject.role(subject.ask(train={"warmup_steps": 4}))
    own = role.share(rows)
    before = copies(everything(role))
    bad = not_finite if role.mesh.coordinate("dp") == 0 else loss_fn
    done = take_step(role, own, loss=bad).done
    yield from same("skipped, no_gradient", (done.skipped, done.no_gradient), (True, False))
    yield from near("the lr of the first of four steps of warm-up", done.lr, 2.5e-3, 1e-6)
    yield from same("counters", role.held.counters(), {"num_steps": 1, "num_skipped": 1})
    yield from unchanged("weights and state", everything(role), before)
    done = take_step(role, own).done
    yield from same("skipped", done.skipped, False)
    if not 0 < done.grad_norm < float("inf"):
        yield Finding(expected="nothing left of the bad gradient", seen=f"a norm {done.grad_norm}")
    yield from near("the lr of the second of four steps of warm-up", done.lr, 5e-3, 1e-6)
    # nobody has rows
    nothing = take_step(role, rows.select([]))
    yield from same("metrics without rows", nothing.sums, {"loss": 0.0})
    yield from same("no_gradient without rows", nothing.done.no_gradient, True)
    yield from same("counters", role.held.counters(), {"num_steps": 2, "num_skipped": 1})


def resume(subject: Subject) -> Findings:
    """A role that takes over state and counters makes the next step bit for bit."""
    rows = make_rows(*STILL_ROWS)
    asks = [subject.ask(dtype=dtype, train=LINEAR) for dtype in subject.dtypes]
    if subject.has("adapters"):
        adapter = tiny_adapter(subject.candidate.model)
        asks += [replace(ask, adapter=adapter) for ask in asks[-1:]]
    for ask in asks:
        yield from resumes(subject, ask, rows)


def resumes(subject: Subject, ask: Ask, rows: Batch) -> Findings:
    """Find where a role made from another one's state is not as that one."""
    first, second = (subject.role(replace(ask, seed=seed)) for seed in (3, 4))
    own = first.share(rows)
    # nobody has rows, before the first pass
    yield from same("rows read of none", len(first.held.forward(rows.select([]), next_token())), 0)
    take_step(first, own)
    take_step(first, own)
    saved, target = first.held.state_tensors(), second.held.state_tensors()
    yield from same("state tensors", sorted(target), sorted(saved))
    with torch.no_grad():
        for name in saved.keys() & target.keys():
            target[name][0].copy_(saved[name][0])
    second.held.restored(first.held.counters())
    weights = copies(first.held.local_tensors())
    yield from unchanged("weights", second.held.local_tensors(), weights)
    one, other = take_step(first, own), take_step(second, own)
    yield from same("the step", other, one)
    yield from unchanged("weights and state", everything(second), copies(everything(first)))
    yield from same("counters", second.held.counters(), first.held.counters())
