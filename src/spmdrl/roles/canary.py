"""`Canary` and `LossCheck`: a few fixed rows show whether policy and engine agree after a sync, and
whether a resumed model gives the mean loss that it gave when it was saved.

The rows are random tokens: their meaning does not matter, and no data is needed. Every replica of
the engine gets the same two, and the worst replica decides: a mean over many would hide it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from spmdrl.batch import Batch, from_rows
from spmdrl.distributed.reduce import moments, world_sum
from spmdrl.roles.calls import Call, together
from spmdrl.roles.generation import Rollout
from spmdrl.roles.handles import Policy, Value
from spmdrl.roles.model_calls import ModelRole, read_call
from spmdrl.training.readout import SCORES, VALUES, Readout, next_token
from spmdrl.world import World

_ROWS, _TOKENS = 2, 32

_FLOOR = {torch.float32: 2e-5, torch.float64: 1e-9}
_FIRST = {torch.float32: 1e-2, torch.float64: 1e-4}
"""Mean gaps in nats: up to the floor a gap is never a jump; the first sync may show the second.
bfloat16 has 8 bits, and its gaps of random tokens are some hundredths."""

_LOW_PRECISION_FLOOR, _LOW_PRECISION_FIRST = 0.03, 0.3

_HISTORY, _FACTOR = 8, 4.0
"""A jump is more than `_FACTOR` times the largest gap of the last syncs."""


class Canary:
    """The fixed rows, the policy's scores of them, and the gaps so far.

    Args:
        world, num_replicas: every replica of the engine gets `_ROWS` rows.
        vocab_size: tokens are drawn below it.
        dtype: dtype of the engine, which bounds how close to 0 the gaps can be.
        temperature: sampling temperature, at which both sides score the rows; 0 is read as 1.
    """

    def __init__(
        self,
        world: World,
        *,
        num_replicas: int,
        vocab_size: int,
        dtype: torch.dtype,
        temperature: float = 1.0,
    ) -> None:
        self.rows, self._num_replicas = fixed_rows(world, num_replicas, vocab_size), num_replicas
        self._temperature = temperature or 1.0
        # a temperature below 1 enlarges logits and their rounding errors
        larger = max(1.0, 1.0 / self._temperature)
        self._floor = _FLOOR.get(dtype, _LOW_PRECISION_FLOOR) * larger
        self.first_limit = _FIRST.get(dtype, _LOW_PRECISION_FIRST) * larger
        """`limit` before the first gap."""
        self._gaps: deque[float] = deque(maxlen=_HISTORY)
        self._expected: Batch | None = None

    @property
    def limit(self) -> float:
        """The largest mean gap, in nats, that is not a jump."""
        return max(self._floor, _FACTOR * max(self._gaps)) if self._gaps else self.first_limit

    def ask(self, policy: Policy) -> None:
        """Let the policy score the rows. Every rank of the world calls it."""
        self._expected = self.scores(policy)

    def scores(self, policy: Policy) -> Batch:
        """The policy's scores of the rows as it is now, in the column `logprobs`."""
        scored: Batch
        (scored,) = together(policy.logprobs.on(self.rows, self._temperature).unrecorded())
        return scored

    def engine_scores(self, rollout: Rollout) -> Batch:
        """The engine's scores of the rows as it is now, in the column `engine_logprobs`."""
        call = rollout.logprobs.on(self.rows, self._temperature).unrecorded()
        scored: Batch
        # one atom for each replica, all of equal cost: each gets its own rows
        (scored,) = together(replace(call, atom=replica_of(self.rows)))
        return scored

    @property
    def expected(self) -> Tensor:
        """The policy's log-probabilities when it was asked, float32 [T]."""
        assert self._expected is not None
        return self._expected["logprobs"]

    def gap(self, rollout: Rollout) -> float:
        """Mean distance of the engine's log-probabilities from the policy's, on the replica with
        the largest one; equal on every rank.
        """
        return self.distance(self.engine_scores(rollout)["engine_logprobs"], self.expected)

    def distance(self, one: Tensor, other: Tensor) -> float:  # [T] each
        """Mean distance of log-probabilities, on the replica with the largest one."""
        # NaN must not pass for a small distance
        distance = torch.nan_to_num((one - other).abs(), nan=float("inf"))
        return largest_mean(distance, self.rows, self._num_replicas)

    def accepts(self, gap: float) -> bool:
        """Whether the gap is not a jump; if so, later gaps are compared with it too."""
        accepted = gap <= self.limit
        if accepted:
            self._gaps.append(gap)
        return accepted


def replica_of(rows: Batch) -> Tensor:
    """Index of the engine's replica that each of `fixed_rows` is for, int64 `[B]`."""
    return rows["prompt_ids"] // _ROWS


def largest_mean(distance: Tensor, rows: Batch, num_replicas: int) -> float:  # distance [T]
    """The mean distance at loss tokens over the world, of the replica with the largest one."""
    mask = rows["loss_mask"]
    replica = replica_of(rows)[rows.row_of_token()[mask]]
    sums = torch.zeros(2, num_replicas, dtype=torch.float64)
    sums[0].index_add_(0, replica, distance[mask].double())
    sums[1].index_add_(0, replica, torch.ones(len(replica), dtype=torch.float64))
    total, count = world_sum(sums)
    return float((total / count).max())


def fixed_rows(world: World, num_replicas: int, vocab_size: int) -> Batch:
    """Home rows of random tokens: the same `_ROWS` sequences for every replica."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(vocab_size, (_ROWS, _TOKENS), generator=generator).tolist()
    count = _ROWS * num_replicas
    own = range(count * world.rank // world.size, count * (world.rank + 1) // world.size)
    batch = from_rows(
        [sequences[number % _ROWS] for number in own],
        rows={
            "prompt_ids": torch.tensor(list(own), dtype=torch.int64),
            "sample_index": torch.zeros(len(own), dtype=torch.int64),
            "prompt_lengths": torch.ones(len(own), dtype=torch.int64),
        },
    )
    mask = torch.arange(batch.num_tokens) % _TOKENS > 0
    return batch.with_columns(tokens={"loss_mask": mask})


TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Differences that another layout's rounding may make, in nats or units of scores and values."""

ROUTED = 5.0
"""Factor on the tolerance for a mixture of experts: rounding sends some tokens to other experts."""


class LossCheck:
    """Compares the means of a column that each trained role computes for fixed rows.

    Args:
        roles: name -> trained role.
        tolerance: largest difference allowed, see `TOLERANCES`.
    """

    def __init__(self, world: World, roles: Mapping[str, ModelRole], tolerance: float) -> None:
        self._world, self._roles, self._tolerance = world, roles, tolerance

    def losses(self) -> dict[str, float]:
        """Role -> mean of its column, the same on every rank; every rank of the world calls it."""
        calls = [self._call(role) for role in self._roles.values()]
        found = {}
        for name, call, columns in zip(self._roles, calls, together(*calls), strict=True):
            column = next(iter((*columns.tokens.values(), *columns.rows.values())))
            mask = call.batch["loss_mask"] if columns.tokens else None
            found[name] = moments(column, mask).mean
        return found

    def compare(self, saved: Mapping[str, float], where: str) -> None:
        """Check that the roles, as they are now, give the means that a checkpoint holds.

        Raises:
            ValueError: a role gives another mean (raised on every rank).
        """
        for name, loss in self.losses().items():
            routed = self._roles[name].model.moe is not None
            tolerance = self._tolerance * (ROUTED if routed else 1.0)
            if name in saved and not abs(loss - saved[name]) <= tolerance:
                raise ValueError(
                    f"roles.{name}: the weights of {where} give {loss!r} on fixed rows, and gave "
                    f"{saved[name]!r} when they were saved: they are not what was saved, or this "
                    "model, device or software computes something else with them"
                )

    def _call(self, role: ModelRole) -> Call[Batch]:
        rows = fixed_rows(self._world, role.mesh.size("dp"), role.model.vocab_size)
        readout = _readout(role)
        return read_call(role, "check", rows, readout, readout.columns).unrecorded()


def _readout(role: ModelRole) -> Readout:
    if isinstance(role, Policy):
        return next_token(1.0, entropy=False)
    return VALUES if isinstance(role, Value) else SCORES
