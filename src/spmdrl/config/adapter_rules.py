"""Rules on adapters and shared bases: which roles have them, and which keys fit together."""

from __future__ import annotations

from collections.abc import Mapping

from spmdrl.config.roles import JUDGE, WITH_ENGINE
from spmdrl.config.sections import Config

SCALAR = ("reward", "value")
"""Kinds of role whose model has a scalar head."""


def check_adapters(config: Config) -> None:
    """Refuse adapters and bases that a role cannot have, and keys that they make useless.

    Raises:
        ValueError: such a key is set; the message names it and the fix.
    """
    for name, role in config.roles.items():
        if role.adapter is not None:
            _check_kind(config, name, "adapter")
            _check_adapter(config, name)
        if role.base is not None:
            _check_kind(config, name, "base")
            _check_owner(config, name, role.base)
            _check_borrower(config, name, role.base)
        _check_freeze(config, name)
        _check_residency(config, name)
    _check_rollout(config)
    _check_export(config)


def has_adapter(config: Config, kind: str) -> bool:
    """Whether a role of this kind has an adapter."""
    return any(
        config.role_kind(name) == kind and role.adapter is not None
        for name, role in config.roles.items()
    )


def trains_adapter(config: Config) -> bool:
    """Whether a role trains an adapter."""
    return any(
        config.is_trained(name) and role.adapter is not None for name, role in config.roles.items()
    )


def _check_kind(config: Config, name: str, key: str) -> None:
    kind, given = config.role_kind(name), f"roles.{name}.{key}"
    if key == "base":
        given += f"={config.roles[name].base}"
    if kind == "rollout":
        raise ValueError(
            f"{given}: {name} is a rollout, which samples with the policy's weights and adapter: "
            "leave the key out"
        )
    if ":" in kind:
        raise ValueError(
            f"{given}: {name} is a {kind}, and only models on a train backend, and judges, have an "
            "adapter or share a base: leave the key out"
        )


def _check_adapter(config: Config, name: str) -> None:
    role, trained = config.roles[name], config.is_trained(name)
    own = role.adapter
    assert own is not None, name
    where = f"roles.{name}.adapter"
    if own.path is None and not trained:
        or_train = "" if config.role_kind(name) == JUDGE else f", or roles.{name}.trained=true"
        raise ValueError(
            f"{where}: {name} is not trained, and a new adapter adds nothing: set {where}.path"
            f"{or_train}"
        )


def _check_owner(config: Config, name: str, owner: str) -> None:
    """Check that the role that `base` names has a fixed base that the role can use."""
    key, others = f"roles.{name}.base={owner}", sorted(set(config.roles) - {name})
    if owner == name or owner not in config.roles:
        what = "the role itself" if owner == name else "no role"
        raise ValueError(f"{key} is {what}: name one of {others}, or leave the key out")
    kind, role = config.role_kind(owner), config.roles[owner]
    if kind in WITH_ENGINE or ":" in kind:
        raise ValueError(
            f"{key}: {owner} is a {kind}, and only a model on a train backend has a base: name "
            "another role"
        )
    if role.base is not None:
        raise ValueError(
            f"{key}, which shares the base of {role.base} itself: set roles.{name}.base={role.base}"
        )
    if config.is_trained(owner) and role.adapter is None:
        raise ValueError(
            f"{key}, which trains its weights, and only a fixed base can be shared: give "
            f"roles.{owner} an adapter (roles.{owner}.adapter: {{}}), or leave the key out"
        )
    if kind in SCALAR and config.role_kind(name) not in SCALAR:
        raise ValueError(
            f"{key}: {owner} is a {kind}, whose model has a scalar head where {name} needs logits: "
            f"let {owner} share the base of {name}, or leave the key out"
        )


def _check_borrower(config: Config, name: str, owner: str) -> None:
    """Check that both roles describe one model in one place, and that something would train."""
    role, other, key = config.roles[name], config.roles[owner], f"roles.{name}.base={owner}"
    path, path_there = config.model_path(name), config.model_path(owner)
    if path != path_there:
        raise ValueError(
            f"{key} with the models {path} and {path_there}, and a base is one model: give both "
            f"roles the same, or leave roles.{name}.base out"
        )
    if role.device != other.device:
        raise ValueError(
            f"roles.{name}.device={role.device} with {key}, whose device is {other.device}: set "
            f"roles.{name}.device={other.device}"
        )
    if config.role_kind(name) == JUDGE:
        return  # its engine is of no backend, and trains nothing
    backend, backend_there = (config.train_section(n).backend for n in (name, owner))
    if backend != backend_there:
        raise ValueError(
            f"{key} with train.backend={backend} for {name} and {backend_there} for {owner}: set "
            f"roles.{name}.train.backend={backend_there}"
        )
    if role.megatron != other.megatron:
        raise ValueError(
            f"roles.{name}.megatron={_mapping(role.megatron)} with {key}, where it is "
            f"{_mapping(other.megatron)}: what both share is cut once: set "
            f"roles.{name}.megatron={_mapping(other.megatron)}"
        )
    if config.is_trained(name) and role.adapter is None:
        raise ValueError(
            f"{key} without an adapter: {name} is trained, and would change what both share: add "
            f"roles.{name}.adapter: {{}}, or leave roles.{name}.base out"
        )


def _mapping(given: Mapping[str, object]) -> str:
    """Write a mapping as it is written in YAML."""
    return "{" + ", ".join(f"{key}: {str(value).lower()}" for key, value in given.items()) + "}"


def _check_freeze(config: Config, name: str) -> None:
    role = config.roles[name]
    if not role.freeze or (role.adapter is None and role.base is None):
        return
    key = "adapter" if role.adapter is not None else f"base={role.base}"
    raise ValueError(
        f"roles.{name}.freeze={list(role.freeze)} with roles.{name}.{key}: the model's weights are "
        "fixed already: leave the key out"
    )


def _check_residency(config: Config, name: str) -> None:
    """Check that the parts `base` and `weights` exist where their residency is set."""
    role = config.roles[name]
    owner = config.roles.get(role.base) if role.base is not None else None
    there = None
    if owner is not None:
        there = f"roles.{role.base}.residency.{'weights' if owner.adapter is None else 'base'}"
    for part, wish in role.residency.items():
        where = f"roles.{name}.residency.{part}={wish}"
        if part == "base" and there is not None:
            raise ValueError(f"{where}: {name} shares the base of {role.base}: set {there} instead")
        if part == "base" and role.adapter is None:
            raise ValueError(
                f"{where}: {name} has no adapter, so that its weights are one part: set "
                f"roles.{name}.residency.weights instead"
            )
        has_own = role.adapter is not None or config.role_kind(name) in SCALAR
        if part == "weights" and there is not None and not has_own:
            raise ValueError(
                f"{where}: {name} has no weights but the base of {role.base}: set {there} instead"
            )


def _check_rollout(config: Config) -> None:
    rollout = config.rollout
    if rollout.engine == "vllm" and rollout.adapters == "unmerged":
        raise ValueError(
            f"rollout.adapters={rollout.adapters} with rollout.engine=vllm, which samples with "
            "merged weights: set rollout.adapters=merged, or rollout.engine=native"
        )


def _check_export(config: Config) -> None:
    """Refuse trained roles of which one's directory is also that of another one's adapter."""
    checkpoint = config.checkpoint
    if not checkpoint.export or checkpoint.export_as != "both":
        return
    trained = [name for name in config.roles if config.is_trained(name)]
    first = "policy" if "policy" in trained else next(iter(trained), None)
    for name in trained:
        if config.roles[name].adapter is None:
            continue
        other = "adapter" if name == first else f"{name}_adapter"
        if other in trained:
            raise ValueError(
                f"roles.{other} with checkpoint.export_as=both: its model and the adapter of "
                f"{name} have one directory: rename the role, or set checkpoint.export_as to "
                "adapter or merged"
            )
