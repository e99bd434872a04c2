"""Clauses on what a role holds: slices of the name space, parts of memory, process groups."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import distributed_c10d

from spmdrl.batch import Batch
from spmdrl.memory.mover import Mover
from spmdrl.memory.storages import distinct_storages, is_resident, local_part, storage_key
from spmdrl.memory.tensor_part import TensorPart
from spmdrl.models.adapters import adapter_shapes
from spmdrl.models.local_shards import LocalTensors, Table
from spmdrl.models.sharding import global_shapes
from spmdrl.models.tensors import Slice
from spmdrl.planning.layouts import role_layout, state_layout
from spmdrl.testing.cases import loss_fn, make_rows, tiny_adapter, trained_shapes
from spmdrl.testing.clause import Finding, Findings, close, same, slices_close
from spmdrl.testing.reference import (
    NORMALISER,
    copies,
    everything,
    logprobs,
    of_kind,
    probe,
    take_step,
)
from spmdrl.testing.refusing import refusal
from spmdrl.testing.subject import Ask, Role, Subject
from spmdrl.training.readout import next_token

KINDS = ("weights", "exp_avg", "exp_avg_sq")


def layout(subject: Subject) -> Findings:
    """Local tensors are the planned slices of the name space, with the file's values, all held."""
    asks = [subject.ask(dtype=dtype) for dtype in subject.dtypes]
    if subject.has("scalar_heads"):
        asks.append(subject.ask(name="value", head="score"))
    if subject.has("adapters"):
        asks.append(subject.ask(adapter=tiny_adapter(subject.candidate.model)))
    for ask in asks:
        yield from laid_out(subject, subject.role(ask))


def laid_out(subject: Subject, role: Role) -> Findings:
    """Find where a role's tensors are not those that plans compute, or not the file's values."""
    spec, ask, rank = role.spec, role.ask, subject.world.rank
    planned = role_layout(spec, role.options.blocks)
    states = state_layout(spec, planned)
    weights, state = role.held.local_tensors(), role.held.state_tensors()
    yield from as_planned("weights", weights, planned[rank])
    trained = {name: held for name, held in states[rank].items() if not held.frozen}
    for kind in KINDS:
        own = {name.partition("/")[2]: held for name, held in of_kind(state, kind).items()}
        frozen = {name for name in own if name in states[rank] and states[rank][name].frozen}
        live = {name: held for name, held in own.items() if name not in frozen}
        yield from as_planned(kind, live, trained, torch.float32)
    names = {piece.name for _, slices in weights.values() for piece in slices}
    whole = {name: _read_whole(ask, name) for name in sorted(names)}
    # in bfloat16 the file's values are rounded once
    digits = 0.0 if ask.dtype == torch.float32 else 2.0**-8
    yield from slices_close("the file's values", weights, whole, rtol=digits, atol=0.0)
    yield from slices_close("the file's values", of_kind(state, "weights"), whole, atol=0.0)
    added = {} if ask.adapter is None else adapter_shapes(ask.model, ask.adapter)
    yield from all_held("weights", weights, {**global_shapes(ask.model, ask.head), **added})
    shapes = trained_shapes(ask.model, ask.head, ask.adapter)
    for kind in KINDS:
        yield from all_held(kind, of_kind(state, kind), shapes)


def _read_whole(ask: Ask, name: str) -> Tensor:
    shape = ask.source.shape(name)
    piece = Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
    return ask.source.read(piece)


def as_planned(
    what: str, held: LocalTensors, table: Table, dtype: torch.dtype | None = None
) -> Findings:
    """Find local tensors that differ from a table in name, shape, dtype or slices.

    Args:
        dtype: their dtype, if it is not the table's.
    """
    yield from same(f"the planned {what}", sorted(held), sorted(table))
    for name in sorted(held.keys() & table.keys()):
        (tensor, slices), shard = held[name], table[name]
        seen = (tuple(tensor.shape), tensor.dtype, slices)
        planned = (shard.shape, dtype or shard.dtype, shard.slices)
        if seen != planned:
            yield Finding(expected=f"{what} {name} as planned, {planned}", seen=str(seen))
            return


def all_held(what: str, held: LocalTensors, shapes: Mapping[str, tuple[int, ...]]) -> Findings:
    """Find elements of the name space that no rank holds; every rank of the world calls it."""
    own = [(s.name, s.start, s.stop) for _, slices in held.values() for s in slices]
    everyones: list[list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = [
        [] for _ in range(dist.get_world_size())
    ]
    dist.all_gather_object(everyones, own)
    count = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for name, start, stop in (box for boxes in everyones for box in boxes):
        if name in count:
            count[name][tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    for name, found in count.items():
        if not found.all():
            missing = int((~found).sum())
            yield Finding(
                expected=f"all {found.numel()} elements of {what} of {name}",
                seen=f"{missing} that no rank holds",
            )
            return


STRAY = 0.1
"""Bytes that a role may keep outside of its parts (tables, buckets), as a share of those inside."""


SMALL_BYTES = 1 << 14
"""Bytes of small tensors that a tiny role may keep as well, however small its parts are."""


def parts(subject: Subject) -> Findings:
    """Parts cover what a role keeps; they leave the device, are missed by name, and come back."""
    yield from parting(subject, subject.ask(), {"weights", "optimizer"})
    if subject.has("adapters"):
        ask = subject.ask(adapter=tiny_adapter(subject.candidate.model))
        yield from parting(subject, ask, {"base", "weights", "optimizer"})


def parting(subject: Subject, ask: Ask, names: Collection[str]) -> Findings:
    """Find what a role keeps when its parts leave, and methods that do not miss them."""
    rows, read = make_rows([4, 6, 5, 3], 2), probe()
    twin = subject.role(ask)
    own = twin.share(rows)
    take_step(twin, own)
    known = live_storages()  # kept, so that no new storage takes the place of one of them
    role = subject.role(ask)
    take_step(role, own)
    held = role.held.parts()
    yield from same("parts", sorted(held), sorted(names))
    covered = [tensor for tensors in held.values() for tensor in tensors]
    inside = {storage_key(storage) for storage in distinct_storages(covered)}
    size = sum(storage.nbytes() for storage in distinct_storages(covered))
    gc.collect()
    found = live_storages().items()
    stray = [s.nbytes() for key, s in found if key not in known and key not in inside]
    if sum(stray) > STRAY * size + SMALL_BYTES:
        yield Finding(
            expected=f"at most {STRAY:.0%} of the {size} bytes of its parts in other tensors",
            seen=f"{sum(stray)} bytes in {len(stray)} storages",
        )
    away = Away(held, subject.world.device)
    for part in held:
        away.leave(part)
        yield from misses(role, part, own)
        if part == "optimizer" and subject.candidate.system.splits_optimizer:
            sums = [pass_over(each, own) for each in (role, twin)]
            yield from same("metrics of a pass without the optimizer", *sums)
            yield from refusal("optim_step without it", role.held.optim_step, part)
            away.bring(part)
            done = [each.held.optim_step() for each in (role, twin)]
            yield from same("the step", *done)
        else:
            away.bring(part)
    for part in held:
        away.leave(part)
    kept = [name for name, (tensor, _) in everything(role).items() if is_resident(tensor)]
    yield from same("no tensor on the device once all parts have left", kept, [])
    for part in held:
        away.bring(part)
    yield from close("logprobs", logprobs(role, read), logprobs(twin, read), atol=0.0)
    yield from same("the step", take_step(role, own), take_step(twin, own))
    yield from _equal(role, twin)


def _equal(role: Role, twin: Role) -> Findings:
    before = copies(everything(twin))
    moved = [n for n, (t, _) in everything(role).items() if not torch.equal(t, before[n])]
    yield from same("weights and state of a role whose parts never left", moved, [])


def pass_over(role: Role, rows: Batch) -> dict[str, float]:
    """Add a minibatch's gradient, and return its metrics."""
    return role.held.forward_backward(rows, loss_fn, next_token(), normaliser=NORMALISER)


def misses(role: Role, part: str, rows: Batch) -> Findings:
    """Find methods that do not refuse to work without a part, naming role and part."""
    words, backend = (repr(role.spec.name), part), role.held
    if part == "optimizer":
        yield from refusal(f"optim_step without {part}", backend.optim_step, *words)
        return
    still = [n for n, (t, _) in backend.local_tensors().items() if not is_resident(t)]
    if not still:
        yield Finding(expected=f"weights that left with {part}", seen="all of them here")
        return
    yield from refusal(
        f"forward without {part}", lambda: backend.forward(rows, next_token()), *words
    )
    yield from refusal(
        f"forward_backward without {part}",
        lambda: pass_over(role, rows),
        *words,
    )


class Away:
    """Parts of a role that leave and come back, as `memory.DeviceParts` moves them."""

    def __init__(self, parts: Mapping[str, Sequence[Tensor]], device: torch.device) -> None:
        mover, seen = Mover(device), set[int]()
        self._parts: dict[str, TensorPart] = {}
        for name, tensors in parts.items():
            storages = [s for s in distinct_storages(tensors) if storage_key(s) not in seen]
            seen |= {storage_key(storage) for storage in storages}
            self._parts[name] = TensorPart([s for s in storages if s.nbytes()], mover)

    def leave(self, part: str) -> None:
        held = self._parts[part]
        ticket = held.start_leaving()
        if ticket is not None:
            ticket.finish()
        held.leave()

    def bring(self, part: str) -> None:
        held = self._parts[part]
        ticket = held.bring()
        if ticket is not None:
            ticket.finish()
        held.hand_out(read_only=False, stays=False)


def live_storages() -> dict[int, torch.UntypedStorage]:
    """Return the storages with bytes of all tensors that Python knows of, and of their gradients.

    Storages that only kernels or C++ hold are not among them. Fake tensors, which torch's compiler
    keeps, have none.
    """
    objects = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    tensors = [o for o in objects if not isinstance(o, FakeTensor)]
    leaves = [t for t in tensors if t.requires_grad and not t._is_view() and t.is_leaf]
    tensors += [t.grad for t in leaves if t.grad is not None]
    return {storage_key(s): s for s in _storages(tensors) if s.nbytes()}


def _storages(tensors: Iterable[Tensor]) -> tuple[torch.UntypedStorage, ...]:
    return distinct_storages(t for t in tensors if local_part(t).device.type != "meta")


def groups(subject: Subject) -> Findings:
    """A backend makes no process group of the whole world: ranks outside would not join it."""
    ask = subject.ask()
    subject.mesh(subject.spec(ask))  # the mesh's own groups
    before = world_groups()
    role = subject.role(ask)
    rows = role.share(make_rows([4, 6, 5, 3], 2))
    logprobs(role, rows)
    take_step(role, rows)
    made = world_groups() - before
    yield from same("new groups of all ranks of the world", made, 0)


def world_groups() -> int:
    """Count this process's groups of all ranks of the world."""
    known = distributed_c10d._world.pg_group_ranks
    return sum(len(ranks) == dist.get_world_size() for ranks in known.values())
