"""The roles: handles that every rank holds, with a backend or an engine on the role's ranks, and
the kinds of roles with a model on a train backend.

A role is a leaf: its name, its mesh, its model, and the calls that it offers. The calls are
implemented in `model_calls` (train backends) and `generation` (engines); users' roles in `custom`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.memory.call_memory import CallMemory
from spmdrl.models.config import ModelConfig
from spmdrl.roles.calls import Call, role_method, together
from spmdrl.roles.generation import Rollout
from spmdrl.roles.generation_rows import Generation
from spmdrl.roles.model_calls import (
    FROM_ROLLOUT,
    ModelRole,
    Update,
    UpdateRecords,
    read_call,
    those_in,
    update_call,
)
from spmdrl.training.protocol import NO_GRADIENT, LossFn, TrainBackend
from spmdrl.training.readout import VALUES, next_token, scores
from spmdrl.training.support import SUPPORT

__all__ = [
    "Generation",
    "Policy",
    "Reference",
    "Reward",
    "Rollout",
    "Update",
    "Value",
    "together",
]


@dataclass(eq=False, repr=False)
class Policy(ModelRole):
    """The trained model.

    Methods: `logprobs(batch, temperature)` adds the token column `logprobs`, with `entropy=True`
    also `entropy`; `update(batch, loss_fn, update)` trains and returns metric sums, equal on every
    rank. Both use the experts of the column `expert_choices` and compute log-probabilities over the
    tokens of the ragged column `support_ids`, if the batch has these columns.

    `version` counts the optimizer steps behind the weights, on every rank of the world.
    """

    version: int = 0

    @role_method
    def logprobs(
        self, batch: Batch, temperature: float = 1.0, *, entropy: bool = False
    ) -> Call[Batch]:
        readout, more = (
            next_token(temperature, entropy=entropy),
            those_in(batch, FROM_ROLLOUT),
        )
        return read_call(self, "logprobs", batch, readout, readout.columns, more)

    @role_method
    def update(self, batch: Batch, loss_fn: LossFn, update: Update) -> Call[UpdateRecords]:
        def count(records: UpdateRecords) -> UpdateRecords:
            self.version += sum(record[NO_GRADIENT] == 0 for record in records)
            return records

        readout = next_token(update.temperature, entropy=update.entropy)
        update = replace(update, columns=(*update.columns, *those_in(batch, FROM_ROLLOUT)))
        return update_call(self, batch, loss_fn, readout, update, then=count)


@dataclass(eq=False, repr=False)
class Reference(ModelRole):
    """A frozen model: `logprobs(batch, temperature)` adds the token column `ref_logprobs`, over the
    tokens of the ragged column `support_ids` if the batch has it, and `ref_entropy` if asked.

    Args:
        prefix: prefix of its columns, so that a batch can hold those of several frozen models.
    """

    prefix: str = "ref"

    @role_method
    def logprobs(
        self, batch: Batch, temperature: float = 1.0, *, entropy: bool = False
    ) -> Call[Batch]:
        readout = next_token(temperature, entropy=entropy)
        names = [f"{self.prefix}_{column}" for column in readout.columns]
        return read_call(self, "logprobs", batch, readout, names, those_in(batch, (SUPPORT,)))


@dataclass(eq=False, repr=False)
class Reward(ModelRole):
    """A reward model: `score(batch)` adds the row column `scores`, read at the last token.

    `update(batch, loss_fn, update)` trains it if `roles.NAME.trained` is set; the loss gets
    `scores`.

    Args:
        skipped: the token that is passed over at a row's end (see `training.readout.Readout`).
    """

    skipped: int | None = None

    @role_method
    def score(self, batch: Batch) -> Call[Batch]:
        readout = scores(self.skipped)
        return read_call(self, "score", batch, readout, readout.columns)

    @role_method
    def update(self, batch: Batch, loss_fn: LossFn, update: Update) -> Call[UpdateRecords]:
        return update_call(self, batch, loss_fn, scores(self.skipped), update)


class Value(ModelRole):
    """The critic: `values(batch)` adds the token column `values`, V of the state before each token.

    `update(batch, loss_fn, update)` trains it; the loss gets `values`.
    """

    @role_method
    def values(self, batch: Batch) -> Call[Batch]:
        return read_call(self, "values", batch, VALUES, VALUES.columns)

    @role_method
    def update(self, batch: Batch, loss_fn: LossFn, update: Update) -> Call[UpdateRecords]:
        return update_call(self, batch, loss_fn, VALUES, update)


Handle = Callable[[str, Mesh, ModelConfig, TrainBackend | None, CallMemory | None], ModelRole]

HANDLES: Mapping[str, Handle] = {
    "policy": Policy,
    "reference": Reference,
    "teacher": partial(Reference, prefix="teacher"),
    "reward": Reward,
    "value": Value,
}
