"""The two role calls on a train backend: reading columns from a model, and updating it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from spmdrl.algorithms.metrics import combine
from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.minibatches import into_minibatches
from spmdrl.distributed.reduce import group_any, group_sums
from spmdrl.distributed.row_bytes import Column
from spmdrl.keyed_random import key64
from spmdrl.memory.call_memory import CallMemory
from spmdrl.models.config import ModelConfig
from spmdrl.models.routing import EXPERT_CHOICES
from spmdrl.roles.calls import Call
from spmdrl.roles.kept import PartialResult
from spmdrl.roles.ledger import Interrupted, Stint
from spmdrl.training.packing import PART_START
from spmdrl.training.protocol import NO_GRADIENT, LossFn, TrainBackend
from spmdrl.training.readout import Readout
from spmdrl.training.support import SUPPORT

PACKING = ("tokens", "prompt_lengths", "prompt_ids", "loss_mask")
"""The columns that a backend packs all rows from."""

SAMPLE_BITS = 20
"""Bits of a sample's index within its group in a row's sort key; the prompt id is above them."""

BASE, WEIGHTS, OPTIMIZER = "base", "weights", "optimizer"
"""The parts of a trained model, as a role's `residency` section names them; under an adapter, the
fixed weights are `base` and the adapter's are `weights`."""

OPTIMIZER_STEP = "optimizer_step"
"""Name, in the memory plan, of the part of an update that needs the optimizer, where that is not on
the device during all of it."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """Schedule of an update over its rows.

    Args:
        seed, step: keys of minibatch membership and order, together with the prompt ids.
        epochs: passes over the rows.
        num_minibatches: optimizer steps per pass; groups (rows of one prompt id) stay whole.
        temperature: sampling temperature, so that log-probabilities are those of the sampler.
        columns: the columns that the loss reads, in addition to the packed rows themselves.
        whole_groups: microbatches keep groups whole too, for losses that compare their rows.
        entropy: whether the loss of a policy reads `entropy`; False saves its computation.
    """

    seed: int
    step: int
    epochs: int = 1
    num_minibatches: int = 1
    temperature: float = 1.0
    columns: tuple[str, ...] = ()
    whole_groups: bool = False
    entropy: bool = True


UpdateRecords = list[dict[str, float]]
"""Metric sums of each minibatch of an update, in order; equal on every rank."""


@dataclass(eq=False, repr=False)
class ModelRole:
    """A role with a model on a train backend.

    Args:
        backend: None on ranks outside the mesh.
        memory: memory moves of this rank; None if the role shares no device memory.
    """

    name: str
    mesh: Mesh
    model: ModelConfig
    backend: TrainBackend | None
    memory: CallMemory | None = None


FROM_ROLLOUT = (EXPERT_CHOICES, SUPPORT)
"""Columns of a rollout that a policy follows: its expert choices, and the tokens that each one was
drawn from, over which any model's log-probabilities then are."""


def those_in(batch: Batch, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the columns that the batch has."""
    return tuple(name for name in names if name in batch)


def packing_columns(batch: Batch) -> tuple[str, ...]:
    """The columns that a backend packs the batch's rows from."""
    return (*PACKING, *those_in(batch, (PART_START,)))


def read_call(
    role: ModelRole,
    method: str,
    batch: Batch,
    readout: Readout,
    names: Sequence[str],
    more: tuple[str, ...] = (),
) -> Call[Batch]:
    """A forward pass; the readout's columns come home under `names`.

    Args:
        more: columns that travel in addition to the packed rows themselves.
    """

    def compute(rows: Batch, stint: Stint) -> Batch:
        count = len(rows)
        result = _backend(role).forward(
            rows, readout, progress=lambda done, of: stint.report(count * done // of, count)
        )
        columns = {
            name: result[column].cpu() for name, column in zip(names, readout.columns, strict=True)
        }
        if readout.is_per_token:
            return Batch(lengths=rows.lengths, tokens=columns)
        return Batch(lengths=rows.lengths, rows=columns)

    return Call(
        role=role,
        method=method,
        batch=batch,
        needs=(*packing_columns(batch), *more),
        returns=tuple(
            Column(name=name, kind="token" if readout.is_per_token else "row") for name in names
        ),
        compute=compute,
        finish=lambda home: home,
        uses=((role.name, WEIGHTS),),
        atom=batch["prompt_ids"],
        order=row_order(batch),
        settings={"readout": readout},
    )


def update_call(
    role: ModelRole,
    batch: Batch,
    loss_fn: LossFn,
    readout: Readout,
    update: Update,
    then: Callable[[UpdateRecords], UpdateRecords] = lambda records: records,
) -> Call[UpdateRecords]:
    """All minibatches of all epochs in one call; `then` gets the records on every rank.

    Rows need `tokens`, `prompt_lengths`, `prompt_ids`, `sample_index`, `loss_mask`, the row column
    `loss_share` (the row's contribution to the normaliser), and the columns that the loss reads.
    """

    memory = role.memory
    splits = memory is not None and role.name in memory.splits

    def compute(rows: Batch, stint: Stint) -> UpdateRecords | Interrupted:
        turns = _Turns(role.name, memory if splits else None)
        return _run_update(_backend(role), rows, loss_fn, readout, update, stint, turns)

    return Call(
        role=role,
        method="update",
        batch=batch,
        # a loss may name `sample_index` too
        needs=tuple(
            dict.fromkeys((*packing_columns(batch), "sample_index", "loss_share", *update.columns))
        ),
        returns=(),
        compute=compute,
        finish=then,
        uses=((role.name, WEIGHTS), *[(role.name, OPTIMIZER)] * (not splits)),
        writes=True,
        atom=batch["prompt_ids"],
        order=row_order(batch),
        arrange=into_minibatches(update.num_minibatches, seed=update.seed, step=update.step),
        settings={"readout": readout, "update": update},
    )


def row_order(batch: Batch) -> Tensor:
    """Sort keys that order rows by (prompt id, sample): int64 `[B]`."""
    return (batch["prompt_ids"] << SAMPLE_BITS) + batch["sample_index"]


def _backend(role: ModelRole) -> TrainBackend:
    assert role.backend is not None, f"role {role.name!r} has no backend on this rank"
    return role.backend


class _Turns:
    """The moves of an optimizer within an update.

    Args:
        memory: moves of this rank; None if the optimizer stays during the whole update.
    """

    def __init__(self, role: str, memory: CallMemory | None) -> None:
        self._role, self._memory, self._has_stepped = role, memory, False

    def passes(self) -> None:
        """Send the optimizer away after an earlier step (the call has begun without it)."""
        if self._memory is not None and self._has_stepped:
            self._memory.begin(f"{self._role}.update", [(self._role, WEIGHTS)])

    def step(self, *, is_last: bool) -> None:
        """Bring the optimizer for its step; `is_last`: no other follows in this update."""
        if self._memory is not None:
            uses = [(self._role, WEIGHTS), (self._role, OPTIMIZER)]
            self._memory.begin(f"{self._role}.{OPTIMIZER_STEP}", uses, is_last=is_last)
        self._has_stepped = True


def _run_update(
    backend: TrainBackend,
    rows: Batch,
    loss_fn: LossFn,
    readout: Readout,
    update: Update,
    stint: Stint,
    turns: _Turns,
) -> UpdateRecords | Interrupted:
    """Run the minibatches that an earlier stint has left; it can stop between two of them.

    The rows' column `minibatch` was made with the exchange, by the call's `arrange`.
    """
    done, records = 0, []
    if stint.begun is not None:
        done, records = stint.begun.values["minibatches"], list(stint.begun.values["records"])
    left = _minibatches(update)[done:]
    seen, count = 0, sum(int((rows["minibatch"] == m).sum()) for m in left)  # of rows
    for number, minibatch in enumerate(left, start=1):
        if group_any(stint.should_stop(), backend.mesh.group("all")):
            return Interrupted(part=PartialResult(values={"minibatches": done, "records": records}))
        done += 1
        part = rows.select((rows["minibatch"] == minibatch).nonzero().flatten())
        report = partial(_report, stint, seen, len(part), count)
        seen += len(part)
        places = float(part["loss_mask"].sum()) if readout.is_per_token else float(len(part))
        own = [float(part["loss_share"].sum()), places]
        normaliser, num_places = group_sums(own, backend.mesh.group("dp"))
        stint.beat()
        if normaliser == 0 or num_places == 0:  # nothing to learn from or to average
            continue
        turns.passes()
        sums = backend.forward_backward(
            part,
            loss_fn,
            readout,
            normaliser=normaliser,
            whole_groups=update.whole_groups,
            progress=report,
        )
        turns.step(is_last=number == len(left))
        step = backend.optim_step()
        records.append(
            combine([sums])
            | {
                "grad_norm": step.grad_norm,
                "lr": step.lr,
                "skipped": float(step.skipped),
                NO_GRADIENT: float(step.no_gradient),
            }
        )
    return records


def _report(stint: Stint, seen: int, own: int, count: int, done: int, of: int) -> None:
    """Report the rows done of `count`: `seen`, and `done` / `of` of a minibatch of `own` rows."""
    stint.report(seen + own * done // of, count)


def _minibatches(update: Update) -> list[int]:
    """The minibatch of every optimizer step, in another keyed order in each epoch."""
    return [
        minibatch
        for epoch in range(update.epochs)
        for minibatch in sorted(
            range(update.num_minibatches),
            key=lambda m: key64(update.seed, update.step, epoch, m),
        )
    ]
