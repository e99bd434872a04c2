"""Clauses on a minibatch's gradient: sums over microbatches and replicas, and their digits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from spmdrl.batch import Batch
from spmdrl.testing.cases import linear_loss, make_rows
from spmdrl.testing.clause import Finding, Findings, near, near_sums, slices_close
from spmdrl.testing.reference import GRADIENTS, Gradient, gradient_of, whole_tensors
from spmdrl.testing.subject import Subject, shares
from spmdrl.training.packing import pack

WHOLE = 100_000
"""A budget of tokens that holds all rows of a clause."""

COUNTS = (1, 3, 5)


def gradient_sums(subject: Subject) -> Findings:
    """The gradient is the same in 1, 3 and 5 microbatches of unequal sizes."""
    rows = make_rows([6, 3, 9, 4, 7], 3, seed=5, seconds=True)
    reference = subject.reference(subject.ask(train={**GRADIENTS, "microbatch_tokens": WHOLE}))
    expected = gradient_of(reference, rows)
    for count in COUNTS:
        budget = budget_for(rows, count, replicas_of(subject))
        role = subject.role(subject.ask(train={**GRADIENTS, "microbatch_tokens": budget}))
        found = gradient_of(role, role.share(rows))
        yield from _said(f"in {count} microbatches", like(found, expected))


def replicas_of(subject: Subject) -> int:
    degrees = subject.layout.degrees
    return degrees.get("dp_replicate", 1) * degrees.get("dp_shard", 1)


def budget_for(rows: Batch, count: int, replicas: int) -> int:
    """Return the largest budget of tokens with which some replica has `count` microbatches or more,
    as the project packs them.
    """
    most = max(shares(rows, replicas), key=lambda share: share.num_tokens)
    budgets = range(most.num_tokens // (count - 1) if count > 1 else WHOLE, 0, -1)
    return next(b for b in budgets if len(pack(most, budget_tokens=b, share_prompts=True)) >= count)


def like(found: Gradient, expected: Gradient) -> Findings:
    """Find where a gradient, its norm and its metrics are not those of another one."""
    yield from near_sums(found.step.sums, expected.step.sums, 1e-4)
    one, other = found.step.done, expected.step.done
    yield from near("a gradient norm of", one.grad_norm, other.grad_norm, 1e-4)
    whole = whole_tensors(expected.slices)
    yield from slices_close("the gradient", found.slices, whole, rtol=1e-4, atol=2e-6)


def global_normaliser(subject: Subject) -> Findings:
    """Losses are divided by the normaliser only, whatever rows each replica has, or none."""
    rows = make_rows([6, 3, 9, 4, 7], 3, seed=6)
    reference, role = (
        make(subject.ask(train=GRADIENTS)) for make in (subject.reference, subject.role)
    )
    last = replicas_of(subject) - 1
    for normaliser, empty in ((50.0, None), (50.0, last), (20.0, 0)):
        expected = gradient_of(reference, rows, normaliser=normaliser)
        found = gradient_of(role, role.share(rows, empty), normaliser=normaliser)
        where = "with rows everywhere" if empty is None else f"without rows on replica {empty}"
        yield from _said(where, like(found, expected))


SMALL = 2.0**-12
"""A weight with which bfloat16's eight digits lose a gradient next to one of weight 1."""


def float32_sums(subject: Subject) -> Findings:
    """Microbatches and replicas are summed in float32, also under a bfloat16 model."""
    rows = make_rows([6, 9], 2, seed=7)
    of_first = (rows["prompt_ids"] == rows["prompt_ids"][0]).repeat_interleave(rows.lengths)
    sizes = [share.num_tokens for share in shares(rows, 2)]
    # each group is a microbatch: within one, products round sums to the model's own dtype
    apart = {"microbatch_tokens": max(sizes), "share_prompts": True}
    ask = subject.ask(dtype=torch.bfloat16, train={**GRADIENTS, **apart})
    role = subject.role(ask)

    def weighted(first: float, second: float) -> dict[str, torch.Tensor]:
        factor = torch.where(of_first, first, second)
        given = rows.with_columns(tokens={"weight": rows["weight"] * factor})
        held = gradient_of(role, given, loss=linear_loss).slices
        return {name: tensor.double() for name, (tensor, _) in held.items()}

    both, large, small = weighted(1.0, SMALL), weighted(1.0, 0.0), weighted(0.0, SMALL)
    for name, own in small.items():
        size = float(own.norm())
        gap = float((both[name] - large[name] - own).norm())
        if gap > 0.05 * size + 1e-12:
            yield Finding(
                expected=f"sums of {name} to float32's digits (a share of {size:.3g})",
                seen=f"an error of {gap:.3g}",
            )
            return


def _said(where: str, findings: Iterator[Finding]) -> Findings:
    for finding in findings:
        yield Finding(expected=f"{where} {finding.expected}", seen=finding.seen)
