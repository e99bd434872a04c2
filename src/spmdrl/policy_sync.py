"""`PolicySync`: from a policy's update to the engine that samples from it, with versions and proof.

What the engine holds is proved in three ways. After every sync that moved something, sums of all
tensors are compared, and the canary: what both make of it, log-probabilities of a few fixed rows.
After the first and some others, checksums of every cell.
"""

from __future__ import annotations

import time

from spmdrl.canary import Canary
from spmdrl.generation import Rollout
from spmdrl.memory.residency import Residency
from spmdrl.passes import WEIGHTS
from spmdrl.roles import Policy
from spmdrl.weights.plan import SyncPlan
from spmdrl.weights.proof import first_difference
from spmdrl.weights.sync import WeightSync

Metrics = dict[str, float]


class PolicySync:
    """Makes the rollout's weights those of the policy, and says so on every rank.

    `rollout.version` becomes `policy.version`, and every sample carries it as `weight_version`. A
    call of both roles: the weights of both are on the device while it runs, or the policy's are
    read from the host.

    Args:
        streams: on this rank the policy's weights need not be on the device.
        check_every: compare checksums after the first sync and every so many; 0: nothing is proved.
        canary: None: nobody scores fixed rows.
    """

    def __init__(
        self,
        policy: Policy,
        rollout: Rollout,
        weights: WeightSync,
        memory: Residency,
        *,
        streams: bool = False,
        check_every: int = 0,
        canary: Canary | None = None,
    ) -> None:
        self._policy, self._rollout = policy, rollout
        self._weights, self._memory = weights, memory
        self._streams, self._check_every, self._canary = streams, check_every, canary
        self._count = 0
        self._metrics: Metrics = {}

    @property
    def plan(self) -> SyncPlan:
        return self._weights.plan

    def run(self) -> None:
        """Every rank of the world calls it.

        Raises:
            ValueError: the engine does not hold the policy's weights, naming the first tensor that
                differs; or it makes other log-probabilities of the same weights.
        """
        policy, rollout = self._policy, self._rollout
        is_first, self._count = self._count == 0, self._count + 1
        if is_first or self.plan.moves:
            if self._canary is not None:
                self._canary.ask(policy)  # first, while the policy's weights are still there
            self._move()
            if self._check_every:
                self._compare(in_full=(self._count - 1) % self._check_every == 0)
            if self._canary is not None:
                self._prove(self._canary)
        rollout.version = policy.version

    def take_metrics(self) -> Metrics:
        """Of the last sync, where it moved weights (`gb` over all receivers)."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _move(self) -> None:
        policy, rollout = self._policy, self._rollout
        needs = [(policy.name, WEIGHTS)] if policy.mesh.is_member and not self._streams else []
        fills = [(rollout.name, WEIGHTS)] if rollout.mesh.is_member else []
        gigabytes, began = self._weights.moved_bytes / 1e9, time.perf_counter()
        if self._weights.has_work:
            self._memory.prepare(needs, fills=fills)
            self._weights.run()
            for part in fills:
                self._memory.filled(*part)
        if self.plan.moves:
            self._metrics = {"sync/gb": gigabytes}
            self._metrics["sync/gb_per_s"] = gigabytes / (time.perf_counter() - began)

    def _compare(self, *, in_full: bool) -> None:
        """Sums of tensors first, as they are cheap; where they differ, checksums say where."""
        if not in_full and not (differing := self._weights.sums.differing()):
            return
        found = first_difference(self._weights)
        if found is not None:
            raise ValueError(f"weight sync {self._count}: {found}")
        assert in_full, f"sums of {differing} differ, and no checksum does"

    def _prove(self, canary: Canary) -> None:
        gap = canary.gap(self._rollout)
        if self.plan.moves:
            self._metrics["sync/canary_gap"] = gap
        if not canary.accepts(gap):
            found = first_difference(self._weights)
            if found is None:
                found = (
                    "every tensor is the policy's, bit for bit: the engine computes something else "
                    "(a cache of old weights, another architecture, graphs over freed memory)"
                )
            raise ValueError(
                f"weight sync {self._count}: the canary's log-probabilities of engine and policy "
                f"differ by {gap:.2e} on average, where {canary.limit:.2e} is expected: {found}"
            )
