"""The role calls of a usual step of the configured flow, in order, with their phases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from spmdrl.config.roles import JUDGE
from spmdrl.config.sections import Config
from spmdrl.planning.step_calls import scoring_roles
from spmdrl.role_spec import RoleSpec

Method = Literal["generate", "score", "logprobs", "values", "update"]


@dataclass(frozen=True, kw_only=True)
class FlowCall:
    """A call of a role.

    Args:
        phase: the phase of a run's metrics that it is in.
        stage: calls of one stage are made together; the next stage waits for all of them.
        others: it also reads prompts with the responses to others (KTO).
    """

    role: str
    method: Method
    phase: str
    stage: int
    others: bool = False

    @property
    def name(self) -> str:
        """Its name in memory plans."""
        return f"{self.role}.{self.method}"


_STAGES = ("sync", "rollout", "reward", "logprobs", "update")


def flow_calls(config: Config, specs: Mapping[str, RoleSpec], *, lag: bool) -> list[FlowCall]:
    """The calls of a step, syncs not included; a user's own flow is taken to make those of a
    shipped one with the same roles.

    Args:
        lag: the next step's samples are drawn together with the update.
    """
    kinds = {name: spec.kind for name, spec in specs.items()}
    found = [*_sampling(config, kinds), *_reading(config, kinds), *_updating(config, kinds)]
    if lag:
        drawn = [call for call in found if call.phase == "rollout"]
        found = [call for call in found if call.phase != "rollout"]
        at = next((i for i, call in enumerate(found) if call.method == "update"), len(found))
        stage = _STAGES.index("update")
        found[at:at] = [
            FlowCall(role=call.role, method="generate", phase="update", stage=stage)
            for call in drawn
        ]
    return found


def _call(role: str, method: Method, phase: str, *, others: bool = False) -> FlowCall:
    return FlowCall(
        role=role, method=method, phase=phase, stage=_STAGES.index(phase), others=others
    )


def _of_kind(kinds: Mapping[str, str], *wanted: str) -> list[str]:
    return [name for kind in wanted for name, own in kinds.items() if own == kind]


def _sampling(config: Config, kinds: Mapping[str, str]) -> Iterator[FlowCall]:
    if config.data_kind() != "prompts":
        return
    for name in _of_kind(kinds, "rollout"):
        yield _call(name, "generate", "rollout")
    for role in scoring_roles(config):
        if role in kinds:
            yield _call(role, "generate" if kinds[role] == JUDGE else "score", "reward")


def _reading(config: Config, kinds: Mapping[str, str]) -> Iterator[FlowCall]:
    algorithm, flow = config.algorithm, config.flow_row
    if config.data_kind() == "conversations" or flow.name == "reward_model":
        return
    if flow.name == "dpo":
        kto = config.preference.loss == "kto"
        if config.preference.needs_reference and config.preference.reference == "step":
            for name in _of_kind(kinds, "reference"):
                yield _call(name, "logprobs", "logprobs", others=kto)
        if kto:
            yield from (_call(n, "logprobs", "logprobs") for n in _of_kind(kinds, "policy"))
        return
    for name in _of_kind(kinds, "value"):
        yield _call(name, "values", "logprobs")
    if algorithm.kl_coef > 0 or flow.pairs_samples:
        for name in _of_kind(kinds, "reference"):
            yield _call(name, "logprobs", "logprobs")
    if algorithm.teacher_coef > 0:
        for name in _of_kind(kinds, "teacher"):
            yield _call(name, "logprobs", "logprobs")
    if not flow.pairs_samples and _reads_policy(config, kinds):
        for name in _of_kind(kinds, "policy"):
            yield _call(name, "logprobs", "logprobs")


def _reads_policy(config: Config, kinds: Mapping[str, str]) -> bool:
    """Whether the trainer computes the old log-probabilities before the update."""
    algorithm, source = config.algorithm, config.algorithm.old_logprobs
    if source != "auto" or config.flow_row.name == "ppo":
        return source != "rollout"
    [policy] = _of_kind(kinds, "policy") or [""]
    train = config.train_section(policy) if policy else config.train
    in_reward = algorithm.kl_coef > 0 and algorithm.kl_in == "reward"
    several = train.epochs * train.num_minibatches > 1
    return several or in_reward or algorithm.teacher_coef > 0


def _updating(config: Config, kinds: Mapping[str, str]) -> Iterator[FlowCall]:
    updated = config.flow_row.updates or ("value", "policy")
    order = ("value", "policy", "reward")
    for name in _of_kind(kinds, *[kind for kind in order if kind in updated]):
        if config.is_trained(name):
            yield _call(name, "update", "update")
