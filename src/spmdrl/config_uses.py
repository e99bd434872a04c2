"""Which keys of the algorithm a shipped flow reads: what it would ignore is refused.

A trainer or a flow of the user's own may read any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from spmdrl.config import Config

_CLIPPED = {
    *("policy_loss", "loss_mean", "clip_low", "clip_high", "dual_clip", "kl_coef"),
    *("old_logprobs", "entropy_coef", "importance_cap", "routing_replay", "refill_attempts"),
}
_GRPO = {
    *("advantage", "advantage_std", "teacher_coef", "kl_estimator", "kl_in"),
    *("overlong_buffer", "overlong_penalty"),
}
_PPO = {
    *("kl_target", "kl_horizon", "gamma", "gae_lambda", "whiten_advantages", "value_clip"),
    *("value_warmup_steps", "score_scaling", "score_clip", "cut_penalty"),
}

ALGORITHM_KEYS: Mapping[str, frozenset[str]] = {
    "sft": frozenset(),
    "reward_model": frozenset({"centre_coef"}),
    "dpo": frozenset(),
    "online_dpo": frozenset({"refill_attempts"}),
    "grpo": frozenset(_CLIPPED | _GRPO),
    "ppo": frozenset(_CLIPPED | _PPO),
}
"""Shipped flow -> the keys of `algorithm` that it reads."""

PREFERENCE_FLOWS = ("dpo", "online_dpo")
"""Shipped flows that read `preference`."""

LAGGING_FLOWS = ("grpo", "ppo", "online_dpo")
"""Shipped flows that can draw samples ahead."""


def check_used(config: Config) -> None:
    """That the flow reads what is said of its algorithm.

    Raises:
        ValueError: a key that is set and that the shipped flow ignores, naming who reads it.
    """
    if config.flow not in ALGORITHM_KEYS or config.trainer is not None:
        return
    for key, value, flows in _given(config):
        if config.flow not in flows:
            raise ValueError(
                f"{key}={value} with flow={config.flow}, which does not read it (that do "
                f"{', '.join(flows)}): leave the key out"
            )


def _given(config: Config) -> Iterator[tuple[str, object, list[str]]]:
    """The keys that are set, their values, and the shipped flows that read them."""
    if config.lag:
        yield "lag", config.lag, list(LAGGING_FLOWS)
    for name in sorted(config.algorithm.model_fields_set):
        flows = [flow for flow, keys in ALGORITHM_KEYS.items() if name in keys]
        yield f"algorithm.{name}", getattr(config.algorithm, name), flows
    for name in sorted(config.preference.model_fields_set):
        yield f"preference.{name}", getattr(config.preference, name), list(PREFERENCE_FLOWS)
