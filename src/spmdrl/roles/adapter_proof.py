"""`AdapterProof`: shows before training that the engine computes with the policy's adapter.

Sums and checksums prove that the engine holds the adapter's tensors, but not that it uses them with
the right scale and in the right place; nor does the canary, to which an adapter whose B is 0 is
invisible. So before the first sync B is filled with noise at the policy, synced, and both sides
score the canary's rows. Then B gets its values back, and the real first sync follows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from spmdrl.models.adapters import Adapter
from spmdrl.roles.adapter_noise import AdapterNoise
from spmdrl.roles.canary import Canary
from spmdrl.roles.generation import Rollout
from spmdrl.roles.handles import Policy

log = logging.getLogger(__name__)

_SIZES = (0.5, 2.0, 8.0, 32.0)
"""Sizes of noise to try, until the policy's log-probabilities change enough."""

_VISIBLE = 2.0
"""A change is large enough if it is this many times the gap that a first sync may show."""

_FACTOR, _SHARE = 2.0, 0.01
"""Noise may enlarge rounding errors: its gap may be this many times the canary's limit, or this
share of the change that it makes. A matrix in which the engine differs, among hundreds, shows more.
"""

_SHARE_OF_ONE = 0.1
"""A matrix that is wrong and has noise alone makes at least this share of its change a gap."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scored:
    """The canary's rows under noise.

    Args:
        gap: mean distance between engine and policy.
        effect: mean distance between the policy with noise and without.
    """

    gap: float
    effect: float


class AdapterProof:
    """Compares engine and policy with noise in the adapter's B.

    Every rank of the world makes it and calls its methods.

    Args:
        noise: the policy's B.
        sync: brings the policy's tensors to the engine, and compares their bits.
    """

    def __init__(
        self,
        adapter: Adapter,
        noise: AdapterNoise,
        canary: Canary,
        policy: Policy,
        rollout: Rollout,
        sync: Callable[[], None],
    ) -> None:
        self._targets, self._noise, self._canary = list(adapter.distinct), noise, canary
        self._b_of = {target: adapter.factors(target)[1] for target in self._targets}
        self._policy, self._rollout, self._sync = policy, rollout, sync
        self._scored: _Scored | None = None

    def score(self) -> None:
        """Score the canary's rows with noise, after the policy was asked without; a sync must
        follow.

        Raises:
            ValueError: the policy does not compute with its adapter, or gives no finite numbers,
                or the sync failed.
        """
        scored = self._score(self._targets)
        if not math.isfinite(scored.effect):
            raise ValueError(
                "the policy's log-probabilities of fixed rows are not finite, without or with "
                "noise in its adapter: look for NaN in its model's files or its adapter's"
            )
        if scored.effect == 0:
            raise ValueError(
                f"the policy's log-probabilities do not depend on {self._first_name}, nor on any "
                "other B of its adapter: training does not apply it"
            )
        if scored.effect < _VISIBLE * self._canary.first_limit:
            log.warning(
                "noise in the policy's adapter changes the canary's log-probabilities by %.1e only:"
                " whether the engine applies it is not proved, only that it holds its values",
                scored.effect,
            )
        self._scored = scored

    def judge(self) -> str | None:
        """Describe the fault of an engine that computes something else with noise in B, or None.

        Called after the sync that followed has been accepted, whose gap tells how much rounding
        there is.
        """
        assert self._scored is not None
        limit = max(_FACTOR * self._canary.limit, _SHARE * self._scored.effect)
        if self._scored.gap <= limit:
            return None
        return (
            "with noise in the B of the policy's adapter, the canary's log-probabilities of engine "
            f"and policy differ by {self._scored.gap:.2e} on average, where {limit:.2e} is "
            "expected: every tensor is the policy's, bit for bit, but "
            f"{self.locate() or 'no single matrix of it shows why'}"
        )

    def locate(self) -> str | None:
        """Describe the first target whose noise the engine does not see as the policy does; None
        if there is none, or if the two differ in the base.
        """
        targets = self._targets
        if self._is_off([]):
            return None
        while len(targets) > 1:
            half = targets[: len(targets) // 2]
            targets = half if self._is_off(half) else targets[len(half) :]
        if not self._is_off(targets):
            return None
        return (
            f"{self._b_of[targets[0]]} is not applied in the engine as in training (not at all, "
            "with another scale or another A, or in another place)"
        )

    @property
    def _first_name(self) -> str:
        return self._b_of[self._targets[0]]

    def _is_off(self, targets: Collection[str]) -> bool:
        scored = self._score(targets)
        share = _SHARE_OF_ONE if targets else 0.0
        return scored.gap > max(_FACTOR * self._canary.limit, share * scored.effect)

    def _score(self, targets: Collection[str]) -> _Scored:
        canary = self._canary
        try:
            noisy, effect = self._noisy(targets)
            self._sync()
            found = canary.engine_scores(self._rollout)["engine_logprobs"]
        finally:
            self._noise.restore()
        return _Scored(gap=canary.distance(found, noisy), effect=effect)

    def _noisy(self, targets: Collection[str]) -> tuple[Tensor, float]:
        """Fill in noise of a size that shows; return the policy's scores, and the change."""
        for size in _SIZES:
            self._noise.fill(size, targets)
            noisy = self._canary.scores(self._policy)["logprobs"]
            effect = self._canary.distance(noisy, self._canary.expected)
            if effect >= _VISIBLE * self._canary.first_limit or not targets:
                break
        return noisy, effect
