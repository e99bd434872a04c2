"""Keys that each shipped flow and kind of role reads; keys that they would ignore are refused.

A user's own trainer or flow may read any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from spmdrl.config.data import FLOW_DATA
from spmdrl.config.sections import Config

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

SAMPLING_FLOWS = ("grpo", "ppo", "online_dpo")
"""Shipped flows with an environment, which can sample one step ahead."""


UPDATED: Mapping[str, tuple[str, ...]] = {
    "reward_model": ("reward",),
    "ppo": ("policy", "value"),
    **dict.fromkeys(("sft", "dpo", "online_dpo", "grpo"), ("policy",)),
}
"""Shipped flow -> the roles that it updates; each has its kind as its name."""


def check_updated(config: Config) -> None:
    """ValueError: a role that the shipped trainer updates is not trained, or of another kind."""
    if config.trainer is not None:
        return
    for name in UPDATED.get(config.flow, ()):
        if name not in config.roles:
            continue
        if config.role_kind(name) != name:
            raise ValueError(
                f"roles.{name}.kind={config.role_kind(name)} with flow={config.flow}, which "
                f"updates a {name} of that name: leave the key out"
            )
        if not config.is_trained(name):
            raise ValueError(
                f"roles.{name}.trained=false with flow={config.flow}, which updates it: set it to "
                "true"
            )


def check_used(config: Config) -> None:
    """ValueError: a key is set that the shipped flow ignores; the flows that read it are named."""
    if config.flow not in ALGORITHM_KEYS:
        return
    own_parts = config.trainer is not None or config.environment is not None
    if config.data.kind not in (None, FLOW_DATA[config.flow]) and not own_parts:
        raise ValueError(
            f"data.kind={config.data.kind} with flow={config.flow}, which reads "
            f"{FLOW_DATA[config.flow]}: leave the key out"
        )
    # a trainer of the user's own may read any key of an algorithm
    given = _of_sampling(config) if config.trainer is not None else _given(config)
    for key, value, flows in given:
        if config.flow not in flows:
            raise ValueError(
                f"{key}={value} with flow={config.flow}, which does not read it (that do "
                f"{', '.join(flows)}): leave the key out"
            )


def _given(config: Config) -> Iterator[tuple[str, object, list[str]]]:
    """Keys that are set, their values, and the shipped flows that read them."""
    yield from _of_sampling(config)
    for name in sorted(config.algorithm.model_fields_set):
        flows = [flow for flow, keys in ALGORITHM_KEYS.items() if name in keys]
        yield f"algorithm.{name}", getattr(config.algorithm, name), flows
    for name in sorted(config.preference.model_fields_set):
        yield f"preference.{name}", getattr(config.preference, name), list(PREFERENCE_FLOWS)


def _of_sampling(config: Config) -> Iterator[tuple[str, object, list[str]]]:
    """Keys that only flows that sample read, whatever the trainer is."""
    if config.lag:
        yield "lag", config.lag, list(SAMPLING_FLOWS)
    if config.environment is not None:
        yield "environment", config.environment, list(SAMPLING_FLOWS)


def check_role_used(config: Config, name: str) -> None:
    """ValueError: options of a built-in role, or training keys of a rollout or a user's role."""
    role, kind = config.roles[name], config.role_kind(name)
    if role.options and ":" not in kind:
        raise ValueError(
            f"roles.{name}.options={role.options}: {name} is a {kind}, and only a module:Class "
            "takes options: leave the key out"
        )
    if kind != "rollout" and ":" not in kind:
        return
    if role.trained:
        raise ValueError(
            f"roles.{name}.trained=true: {name} is a {kind}, which has no train backend: leave the "
            "key out"
        )
    for key, value in role.train.items():
        raise ValueError(
            f"roles.{name}.train.{key}={value}: {name} is a {kind}, which has no train backend: "
            "leave the key out"
        )
