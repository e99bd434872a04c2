"""Preferences of a policy on held-out pairs, by its implicit reward."""

from __future__ import annotations

from torch import Tensor

from spmdrl.algorithms.direct_preference import implicit_rewards
from spmdrl.batch import Batch
from spmdrl.config.algorithms import PreferenceSection
from spmdrl.data.preferences import Pair
from spmdrl.evaluation.metrics import pair_accuracy
from spmdrl.flows.preference_terms import REFERENCE
from spmdrl.flows.reference_sums import ReferenceSums, distinct_rows
from spmdrl.roles.handles import Policy
from spmdrl.run.protocols import Metrics
from spmdrl.run.run import Run


class HeldOutPreferences:
    """Measures how often, and how much, the policy prefers the chosen response of held-out pairs.

    Args:
        reference: adds the reference's log-probabilities; None if the loss has no reference.
    """

    def __init__(
        self,
        run: Run,
        policy: Policy,
        reference: ReferenceSums | None,
        settings: PreferenceSection,
    ) -> None:
        self._run, self._policy = run, policy
        self._reference, self._settings = reference, settings

    def evaluate(self, step: int) -> Metrics:
        """Metrics `eval/SET` (implicit reward's accuracy) and `eval/SET/margin`, with errors."""
        found: dict[str, float] = {}
        for name, batch in self._run.held_out(Pair):
            ratio = log_ratio(self._policy, self._reference, batch)
            tokens = batch.row_sum(batch["loss_mask"])
            rewards = implicit_rewards(ratio, tokens, self._settings)
            found |= pair_accuracy(name, batch, rewards)
        return found


def log_ratio(policy: Policy, reference: ReferenceSums | None, batch: Batch) -> Tensor:
    """Log-ratio of policy and reference (without one, log policy) per response: float64 [B]."""
    first, place = distinct_rows(batch)
    rows = batch.select(first)
    own = rows.row_sum(policy.logprobs(rows)["logprobs"].double())
    if reference is not None:
        own = own - reference.add(rows)[REFERENCE]
    return own[place]
