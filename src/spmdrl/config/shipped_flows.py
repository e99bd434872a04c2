"""The flows that are shipped, one row each: everything that the rest of the program knows of them.

A new flow is one row of `FLOWS` and the file that its `function` names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from spmdrl.config.data import DataKind


@dataclass(frozen=True, kw_only=True)
class ShippedFlow:
    """A flow, and what it uses of a configuration; the defaults are those of a user's own flow.

    Args:
        name: value of `flow`.
        function: `module:function`, called with the run; imported where the flow runs.
        data: kind of its rows, unless `data.kind` names another.
        needs: roles without which it does not train.
        asks: roles that it also calls where the configuration has them.
        updates: roles that it updates; each has its kind as its name.
        samples: whether it trains on samples of the policy that an environment collects.
        may_lag: whether it can sample one step ahead.
        algorithm_keys: keys of `algorithm` that it reads.
        reads_preference: whether it reads `preference`; its trainer then has `held_out`.
    """

    name: str
    function: str
    data: DataKind = "prompts"
    needs: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    updates: tuple[str, ...] = ()
    samples: bool = False
    may_lag: bool = False
    algorithm_keys: frozenset[str] = frozenset()
    reads_preference: bool = False

    @property
    def compares_groups(self) -> bool:
        """Whether an advantage compares a sample with the others of its prompt."""
        return "advantage" in self.algorithm_keys

    @property
    def pairs_samples(self) -> bool:
        """Whether it updates on pairs of samples, which need no ratio to what drew them."""
        return self.samples and self.reads_preference

    @property
    def weighs_ratios(self) -> bool:
        """Whether its loss weighs samples by the policy's ratio to what drew them."""
        return "policy_loss" in self.algorithm_keys

    @property
    def distils(self) -> bool:
        """Whether a teacher can take the place of rewards."""
        return "teacher_coef" in self.algorithm_keys

    @property
    def warms_value(self) -> bool:
        """Whether the policy can wait until the value model has learnt."""
        return "value_warmup_steps" in self.algorithm_keys

    @property
    def adapts_kl(self) -> bool:
        """Whether the KL's coefficient can follow a target."""
        return "kl_target" in self.algorithm_keys


_RATIO_KEYS = frozenset(
    {
        *("policy_loss", "loss_mean", "clip_low", "clip_high", "dual_clip", "kl_coef"),
        *("old_logprobs", "entropy_coef", "importance_cap", "routing_replay", "refill_attempts"),
    }
)

_ROWS = (
    ShippedFlow(
        name="sft",
        function="spmdrl.flows.sft:sft",
        data="conversations",
        needs=("policy",),
        updates=("policy",),
    ),
    ShippedFlow(
        name="reward_model",
        function="spmdrl.flows.reward_model:reward_model",
        data="preferences",
        needs=("reward",),
        updates=("reward",),
        algorithm_keys=frozenset({"centre_coef"}),
    ),
    ShippedFlow(
        name="dpo",
        function="spmdrl.flows.dpo:dpo",
        data="preferences",
        needs=("policy",),
        asks=("reference",),
        updates=("policy",),
        reads_preference=True,
    ),
    ShippedFlow(
        name="online_dpo",
        function="spmdrl.flows.online_dpo:online_dpo",
        needs=("policy", "rollout", "reference"),
        updates=("policy",),
        samples=True,
        may_lag=True,
        algorithm_keys=frozenset({"refill_attempts"}),
        reads_preference=True,
    ),
    ShippedFlow(
        name="grpo",
        function="spmdrl.flows.grpo:grpo",
        needs=("policy", "rollout"),
        asks=("reference", "teacher"),
        updates=("policy",),
        samples=True,
        may_lag=True,
        algorithm_keys=_RATIO_KEYS
        | {
            *("credit", "advantage", "advantage_std", "teacher_coef", "kl_estimator", "kl_in"),
            *("overlong_buffer", "overlong_penalty"),
        },
    ),
    ShippedFlow(
        name="ppo",
        function="spmdrl.flows.ppo:ppo",
        needs=("policy", "rollout", "value"),
        asks=("reference",),
        updates=("policy", "value"),
        samples=True,
        may_lag=True,
        algorithm_keys=_RATIO_KEYS
        | {
            *("kl_target", "kl_horizon", "gamma", "gae_lambda", "whiten_advantages", "value_clip"),
            *("value_warmup_steps", "score_scaling", "score_clip", "cut_penalty", "credit"),
        },
    ),
)

FLOWS: Mapping[str, ShippedFlow] = MappingProxyType({row.name: row for row in _ROWS})
"""Value of `flow` -> its row."""


def flow_row(name: str) -> ShippedFlow:
    """Find a flow's row; a user's `path/to/my_flow.py:function` has the defaults."""
    return FLOWS.get(name) or ShippedFlow(name=name, function=name)


def is_shipped(name: str) -> bool:
    return name in FLOWS


def shipped_flows() -> Iterable[ShippedFlow]:
    return FLOWS.values()
