"""`PolicySync`: brings a policy's update to the engine that samples from it, and proves it.

The engine's weights are proved after the first sync and every later one that moved something: by
checksums of every cell (after the first and some others) or sums of all tensors, and by both sides'
log-probabilities of a few fixed rows (the canary). A policy with an adapter
is proved once more before the first one, with noise in the adapter (`AdapterProof`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from spmdrl.memory.call_memory import CallMemory
from spmdrl.models.adapters import Adapter
from spmdrl.models.local_shards import LocalTensors, Table, WeightLayout
from spmdrl.models.tensors import Slice
from spmdrl.roles.adapter_noise import AdapterNoise
from spmdrl.roles.adapter_proof import AdapterProof
from spmdrl.roles.canary import Canary
from spmdrl.roles.generation import Rollout
from spmdrl.roles.handles import Policy
from spmdrl.roles.model_calls import WEIGHTS
from spmdrl.weights.checksums import first_difference
from spmdrl.weights.plan import SyncPlan
from spmdrl.weights.sync import WeightSync

Metrics = dict[str, float]

_ELSE = (
    "the engine computes something else (a cache of old weights, another architecture, graphs over "
    "freed memory)"
)

SYNC = "sync"
"""The call's name in the memory plan."""


@dataclass(frozen=True, kw_only=True)
class SyncState:
    """State of the syncs within a step.

    Args:
        step: the step.
        done: number of runs in the step.
        metrics: metrics of the last run.
        held: the checkpoint holds the engine's own weights (but for frozen ones), which are those
            of the last run, because the policy has moved on.
        merged: whether an adapter is merged into these weights.
    """

    step: int = -1
    done: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    held: bool = False
    merged: bool = False


class PolicySync:
    """Makes the rollout's weights those of the policy, and records the version on every rank.

    `rollout.version` becomes `policy.version`, and every sample carries it as `weight_version`. The
    sync is a call of both roles: the weights of both are on the device while it runs, or the
    policy's are read from the host.

    Args:
        streams: the policy's weights need not be on this rank's device.
        check_every: compare checksums after the first sync and then every N syncs, and sums after
            the others; 0 compares neither.
        canary: scores fixed rows, or None.
        adapter: the policy's adapter, if it has one.
    """

    def __init__(
        self,
        policy: Policy,
        rollout: Rollout,
        weights: WeightSync,
        memory: CallMemory,
        *,
        streams: bool = False,
        check_every: int = 0,
        canary: Canary | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self._policy, self._rollout = policy, rollout
        self._weights, self._memory, self._parts = weights, memory, memory.parts
        self._streams, self._check_every, self._canary = streams, check_every, canary
        self._adapter = adapter
        self._count = 0
        self._metrics: Metrics = {}
        self._moved = self._seconds = 0.0
        """10^9 bytes that the current run has moved, and the time that this took."""
        self._done = 0
        """Number of runs in the step so far."""
        self._resumed = SyncState()

    @property
    def plan(self) -> SyncPlan:
        return self._weights.plan

    @property
    def merges(self) -> bool:
        """Whether the engine gets weights that the policy's adapter is merged into."""
        return self._weights.merges

    def run(self) -> None:
        """Run the sync. Every rank of the world calls it.

        Raises:
            ValueError: the engine does not hold the policy's weights (the first tensor that differs
                is named), or computes other log-probabilities from the same weights.
        """
        policy, rollout = self._policy, self._rollout
        self._done += 1
        again = self._done <= self._resumed.done
        # the engine's own weights came from a checkpoint, and the policy has changed since
        if not (again and self._resumed.held):
            self._move_and_prove()
        if again:
            self._metrics = dict(self._resumed.metrics)
        rollout.version = policy.version

    def _move_and_prove(self) -> None:
        is_first, self._count = self._count == 0, self._count + 1
        if not (is_first or self.plan.moves):
            return
        self._moved = self._seconds = 0.0
        proof = None
        if self._canary is not None:
            self._canary.ask(self._policy)  # first, while the policy's weights are still there
            proof = self._adapter_proof(self._canary) if is_first else None
        if proof is not None:
            proof.score()
        self._move_and_compare()
        if self.plan.moves:
            self._metrics = {"sync/gb": self._moved, "sync/gb_per_s": self._moved / self._seconds}
        if self._canary is not None:
            self._prove(self._canary, proof)

    def _adapter_proof(self, canary: Canary) -> AdapterProof | None:
        if self._adapter is None:
            return None
        backend = self._policy.backend
        tensors = {} if backend is None else backend.local_tensors()
        noise = AdapterNoise(self._adapter, tensors, self._parts.view)
        return AdapterProof(
            *(self._adapter, noise, canary, self._policy, self._rollout, self._move_and_compare)
        )

    def _move_and_compare(self) -> None:
        self._move()
        if self._check_every:
            self._compare(in_full=(self._count - 1) % self._check_every == 0)

    # State for checkpoints within a step

    def begin_step(self, step: int) -> None:
        """Count runs from 0 again; the runs of an earlier step are not repeated."""
        self._done = 0
        if step != self._resumed.step:
            self._resumed = SyncState()

    def state(self, step: int, *, held: bool) -> SyncState:
        """The state to save; `held`: the engine's own weights are saved too, as they are now."""
        return SyncState(
            step=step, done=self._done, metrics=self._metrics, held=held, merged=self.merges
        )

    def resume(self, state: SyncState) -> None:
        """Resume in the step in which a stop had left the sync."""
        self._resumed = state

    def can_hold(self) -> bool:
        """Whether this rank's engine has no weights of its own, or keeps them between its calls."""
        drops = self._parts.registry.drops(self._rollout.name, WEIGHTS)
        return not drops or not self.own_tensors()

    def own_tensors(self) -> LocalTensors:
        """This rank's engine weights that are not the policy's own tensors."""
        engine = self._rollout.engine
        shared = self.plan.shared.get(self._weights.rank, frozenset())
        tensors = {} if engine is None else engine.local_tensors()
        return {name: held for name, held in tensors.items() if name not in shared}

    def kept_tensors(self) -> LocalTensors:
        """Those of `own_tensors` that later syncs change, with the slices that they change."""
        changing = {n: (t, self._changing(held)) for n, (t, held) in self.own_tensors().items()}
        return {name: (tensor, held) for name, (tensor, held) in changing.items() if held}

    def kept_layout(self, layout: WeightLayout) -> dict[int, Table]:
        """The tables of every rank's `kept_tensors`, out of `layout`, the rollout's."""
        tables: dict[tuple[int, frozenset[str]], Table] = {}
        kept = {}
        for rank, table in layout.items():
            shared = self.plan.shared.get(rank, frozenset())
            at = (id(table), shared)
            if at not in tables:
                tables[at] = {
                    name: replace(held, slices=self._changing(held.slices))
                    for name, held in table.items()
                    if name not in shared
                }
            kept[rank] = tables[at]
        return kept

    def _changing(self, slices: tuple[Slice, ...]) -> tuple[Slice, ...]:
        return tuple(piece for piece in slices if piece.name in self.plan.changing)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Let the block write `kept_tensors`, then move the frozen ones. All ranks call it."""
        has_own = self._rollout.memory is not None and bool(self.own_tensors())
        parts = [(self._rollout.name, WEIGHTS)] if has_own else []
        reads = bool(self.plan.frozen_rounds) and self._policy.mesh.is_member
        needs = [(self._policy.name, WEIGHTS)] if reads and not self._streams else []
        self._parts.prepare(needs, fills=parts)
        yield
        self._weights.run_frozen()
        for part in parts:
            self._parts.filled(*part)

    def take_metrics(self) -> Metrics:
        """Metrics of the last sync, empty if it moved no weights (`gb` is over all receivers)."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _move(self) -> None:
        policy, rollout = self._policy, self._rollout
        needs = [(policy.name, WEIGHTS)] if policy.mesh.is_member and not self._streams else []
        fills = [(rollout.name, WEIGHTS)] if rollout.mesh.is_member else []
        if self._weights.leaves_out_frozen and self.plan.frozen_rounds:
            needs += fills  # what it leaves out must have lasted
        gigabytes, began = self._weights.moved_bytes / 1e9, time.perf_counter()
        if self._weights.has_work:
            overwritten = [part for part in fills if part not in needs]
            self._memory.begin(SYNC, needs, fills=overwritten)
            self._weights.run()
            for part in fills:
                self._parts.filled(*part)
        self._moved += gigabytes
        self._seconds += time.perf_counter() - began

    def _compare(self, *, in_full: bool) -> None:
        """Compare sums of tensors first, which are cheap; if they differ, checksums locate it."""
        if not in_full and not (differing := self._weights.sums.differing()):
            return
        found = first_difference(self._weights)
        if found is not None:
            raise ValueError(f"weight sync {self._count}: {found}")
        assert in_full, f"sums of {differing} differ, and no checksum does"

    def _prove(self, canary: Canary, proof: AdapterProof | None) -> None:
        gap = canary.gap(self._rollout)
        if self.plan.moves:
            self._metrics["sync/canary_gap"] = gap
        if not canary.accepts(gap):
            found = first_difference(self._weights)
            if found is None:
                located = None if proof is None else proof.locate()
                found = f"every tensor is the policy's, bit for bit: {located or _ELSE}"
            raise ValueError(
                f"weight sync {self._count}: the canary's log-probabilities of engine and policy "
                f"differ by {gap:.2e} on average, where {canary.limit:.2e} is expected: {found}"
            )
        if proof is not None and (fault := proof.judge()) is not None:
            raise ValueError(f"weight sync {self._count}: {fault}")
