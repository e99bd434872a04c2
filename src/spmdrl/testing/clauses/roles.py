"""Clauses on roles: readouts, freezing, adapters, shared bases, neighbours, ranks outside."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.distributed.mesh import AXES
from spmdrl.memory.storages import distinct_storages, storage_key
from spmdrl.models.local_shards import LocalTensors
from spmdrl.testing.cases import (
    loss_fn,
    make_rows,
    score_loss,
    tiny_adapter,
    tiny_experts,
    value_loss,
)
from spmdrl.testing.clause import Findings, close, near, near_sums, same, unchanged
from spmdrl.testing.clauses.held import world_groups
from spmdrl.testing.clauses.steps import follow
from spmdrl.testing.reference import (
    TEMPERATURE,
    copies,
    logprobs,
    of_kind,
    probe,
    take_step,
)
from spmdrl.testing.refusing import refusal
from spmdrl.testing.subject import Ask, Feature, Layout, Role, Subject
from spmdrl.training.protocol import LossFn, LossInput
from spmdrl.training.readout import SCORES, VALUES, Readout, next_token


def readouts(subject: Subject) -> Findings:
    """Columns of every readout are those of the torch backend to 1e-5, and 0 where none is read."""
    rows = make_rows([6, 3, 9, 4], 3, seed=1, seconds=True)
    yield from reads(subject, subject.ask(), rows, next_token(TEMPERATURE), loss_fn)
    if subject.has("scalar_heads"):
        ask = subject.ask(name="value", head="score")
        yield from reads(subject, ask, rows, VALUES, value_loss)
        yield from reads(subject, ask, rows, SCORES, score_loss)


def reads(subject: Subject, ask: Ask, rows: Batch, readout: Readout, loss: LossFn) -> Findings:
    """Find where a readout's columns and a step over them are not the torch backend's."""
    role, reference = subject.role(ask), subject.reference(ask)
    own = role.share(rows)
    found = role.held.forward(own, readout)
    expected = reference.held.forward(own, readout)
    for name in readout.columns:
        yield from same(f"the dtype of {name}", found[name].dtype, torch.float32)
        yield from close(name, found[name], expected[name], atol=1e-5)
        if readout.is_per_token:
            outside = found[name][~own["loss_mask"]]
            yield from same(f"{name} that are not 0 outside the loss mask", int(outside.any()), 0)
    one = take_step(role, own, loss=loss, readout=readout)
    other = take_step(reference, rows, loss=loss, readout=readout)
    yield from near_sums(one.sums, other.sums, 1e-4)
    yield from near("grad_norm", one.done.grad_norm, other.done.grad_norm, 1e-4)


FREEZE = ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight")


def freezing(subject: Subject) -> Findings:
    """Parameters of `roles.NAME.freeze` stay and have no state; the others train as if alone."""
    ask = subject.ask(freeze=FREEZE)
    role, reference = subject.role(ask), subject.reference(ask)
    before = copies(role.held.local_tensors())
    yield from follow(subject, ask, made=(role, reference))
    fixed = only(role.held.local_tensors(), FREEZE)
    if fixed:
        yield from unchanged("what is frozen", fixed, before)
    for kind in ("exp_avg", "exp_avg_sq"):
        held = only(of_kind(role.held.state_tensors(), kind), FREEZE)
        yield from same(f"no {kind} of what is frozen", sorted(held), [])


def only(tensors: LocalTensors, names: tuple[str, ...]) -> LocalTensors:
    return {
        local: (tensor, slices)
        for local, (tensor, slices) in tensors.items()
        if any(piece.name in names for piece in slices)
    }


def frozen_roles(subject: Subject) -> Findings:
    """A role that is not trained only reads, has no state, and refuses to train by name."""
    rows = make_rows([4, 6, 5, 3], 2)
    ask = subject.ask(name="reference", trained=False)
    role, reference = subject.role(ask), subject.reference(ask)
    own = role.share(rows)
    yield from close("logprobs", logprobs(role, own), logprobs(reference, own), atol=1e-5)
    yield from same("state tensors", list(role.held.state_tensors()), [])
    yield from same("parts", sorted(role.held.parts()), ["weights"])
    yield from refusal(
        "an update of a role that is not trained",
        lambda: role.held.forward_backward(own, loss_fn, next_token(), normaliser=1.0),
        "'reference'",
        "frozen",
    )
    yield from refusal("its optim_step", role.held.optim_step, "'reference'", "frozen")


def adapters(subject: Subject) -> Findings:
    """Under an adapter only its matrices train and have state, as with the torch backend."""
    ask = subject.ask(adapter=tiny_adapter(subject.candidate.model))
    role, reference = subject.role(ask), subject.reference(ask)
    before = copies(role.held.local_tensors())
    yield from follow(subject, ask, made=(role, reference))
    weights = role.held.local_tensors()
    base = {
        local: (tensor, slices)
        for local, (tensor, slices) in weights.items()
        if not any(".lora_" in piece.name for piece in slices)
    }
    yield from unchanged("the base", base, before)
    other = [
        piece.name
        for _, slices in role.held.state_tensors().values()
        for piece in slices
        if ".lora_" not in piece.name
    ]
    yield from same("no state but of the adapter", other, [])


def shared_bases(subject: Subject) -> Findings:
    """Roles that share a base share its storage, and do what they do on their own."""
    model, rows = subject.candidate.model, make_rows([6, 3, 9, 4], 2, seed=2)
    asks = [
        subject.ask(name="policy", adapter=tiny_adapter(model), seed=1),
        subject.ask(name="reference", trained=False),
    ]
    if subject.has("scalar_heads"):
        narrow = tiny_adapter(model, "attention", rank=2)
        asks.append(subject.ask(name="value", adapter=narrow, head="score", seed=2))
    owner = subject.role(asks[0])
    roles = [owner, *(subject.role(replace(ask, base=owner)) for ask in asks[1:])]
    references = [subject.reference(ask) for ask in asks]
    base = _storages(owner.held.parts()["base"])
    for role in roles[1:]:
        missing = base - _storages(role.held.parts()["weights"])
        yield from same(f"storages of the base that {role.spec.name} lacks", len(missing), 0)
    for _ in range(2):
        for role, reference in zip(roles, references, strict=True):
            readout = VALUES if role.ask.head == "score" else next_token(TEMPERATURE)
            loss = value_loss if role.ask.head == "score" else loss_fn
            own, column = role.share(rows), readout.columns[0]
            found = role.held.forward(own, readout)[column]
            expected = reference.held.forward(own, readout)[column]
            yield from close(f"{role.spec.name}'s {column}", found, expected, atol=1e-4)
            if role.ask.trained:
                one = take_step(role, own, loss=loss, readout=readout)
                other = take_step(reference, rows, loss=loss, readout=readout)
                yield from near_sums(one.sums, other.sums, 1e-4)
                yield from near("grad_norm", one.done.grad_norm, other.done.grad_norm, 1e-4)


def _storages(tensors: list[Tensor]) -> set[int]:
    return {storage_key(storage) for storage in distinct_storages(tensors)}


def outside(subject: Subject) -> Findings:
    """A role on half of the ranks trains while the others do nothing for it."""
    half = subject.world.size // 2
    ask = subject.ask(ranks=tuple(range(half)), layout=_layout_for(subject, half))
    subject.mesh(subject.spec(ask))
    before = world_groups()
    role = subject.role(ask)
    yield from same("a backend on a rank", role.backend is not None, role.mesh.is_member)
    if role.backend is not None:
        yield from follow(subject, ask, made=(role, subject.reference(ask)))
    yield from same("new groups of all ranks of the world", world_groups() - before, 0)


def _layout_for(subject: Subject, size: int) -> Layout:
    known = subject.candidate.layouts.get(size)
    return known[0] if known else Layout(degrees={"dp_replicate": size})


def neighbours(subject: Subject) -> Findings:
    """Two roles of one backend on different meshes train in turn, as each would alone."""
    size = subject.world.size
    asks = [subject.ask(), _elsewhere(subject, subject.ask(name="value"))]
    if subject.has("scalar_heads"):
        asks[1] = replace(asks[1], head="score")
    roles = [subject.role(ask) for ask in asks]
    references = [subject.reference(ask) for ask in asks]
    rows = [make_rows([6, 3, 9, 4], 2, seed=seed) for seed in (3, 4)]
    assert all(role.mesh.size("dp") <= size for role in roles)
    for batch in rows:
        for role, reference in zip(roles, references, strict=True):
            if role.backend is None:
                continue
            yield from _one_step(role, reference, batch)
    for role, reference in zip(roles, references, strict=True):
        if role.backend is not None and role.ask.head == "lm":
            found, expected = (logprobs(each, probe()) for each in (role, reference))
            yield from close("logprobs", found, expected, atol=1e-4)


def _one_step(role: Role, reference: Role, batch: Batch) -> Findings:
    readout = VALUES if role.ask.head == "score" else next_token(TEMPERATURE)
    loss = value_loss if role.ask.head == "score" else loss_fn
    one = take_step(role, role.share(batch), loss=loss, readout=readout)
    other = take_step(reference, batch, loss=loss, readout=readout)
    yield from near_sums(one.sums, other.sums, 1e-4)
    yield from near("grad_norm", one.done.grad_norm, other.done.grad_norm, 1e-4)


def _elsewhere(subject: Subject, ask: Ask) -> Ask:
    """Ask for a role in another layout of all ranks if there is one, or on half of them."""
    size = subject.world.size
    known = list(subject.candidate.layouts[size])
    if len(known) > 1:
        return replace(ask, layout=known[(known.index(subject.layout) + 1) % len(known)])
    if size == 1:
        return ask
    half = size // 2
    ranks = tuple(range(size - half, size))
    return replace(ask, ranks=ranks, layout=_layout_for(subject, half))


def lacking(subject: Subject) -> dict[Feature, Ask]:
    """Return a role for each ability, that a backend without it refuses."""
    return {
        "adapters": subject.ask(adapter=tiny_adapter(subject.candidate.model)),
        "freeze": subject.ask(freeze=FREEZE),
        "frozen_roles": subject.ask(trained=False),
        "scalar_heads": subject.ask(head="score"),
        "experts": subject.ask(model=tiny_experts()),
        "bfloat16": subject.ask(dtype=torch.bfloat16),
    }


def refusals(subject: Subject) -> Findings:
    """Requests that a role cannot meet are refused by its name, or its key where a run starts."""
    asks = lacking(subject)
    for feature in sorted(subject.candidate.lacking & asks.keys()):
        ask = replace(asks[feature], name="odd")
        yield from refusal(f"a role that needs {feature}", partial(subject.check, ask), "roles.odd")
    for axis in sorted({*AXES, "ep"} - subject.candidate.system.axes):
        odd = subject.ask(name="odd", layout=Layout(degrees={axis: 2}))
        yield from refusal(f"{axis}=2", partial(subject.check, odd), f"roles.odd.{axis}=2")
    rows = make_rows([4], 2)
    role = subject.role(subject.ask(name="odd"))
    yield from refusal(
        "a readout of another head", lambda: role.held.forward(rows, VALUES), "'odd'"
    )
    if subject.world.size > 1:  # some ranks may not come to the loss
        return
    for metric, value in (("loss", torch.tensor(1.0)), ("gap", torch.ones(2))):
        yield from refusal(
            f"a loss with a metric {metric} of {tuple(value.shape)}",
            partial(_with_metric, role, rows, {metric: value}),
            repr(metric),
        )


def _with_metric(role: Role, rows: Batch, metrics: dict[str, Tensor]) -> None:
    def loss(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        return given["logprobs"].sum(), metrics

    role.held.forward_backward(rows, loss, next_token(), normaliser=1.0)
