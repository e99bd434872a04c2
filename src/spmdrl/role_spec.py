"""`RoleSpec`: a role with a model as planned, once configuration, placement and model meet.

A spec is a value: it needs no device and no process group, so that plans for any number of ranks
can be made anywhere. Planning, assembly and engines take it in place of the whole configuration
and a role's name. Users' own roles (`kind: module:Class`) have none: they may have no model.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from spmdrl.config.roles import JUDGE, WITH_ENGINE, AdapterSection, RoleSection
from spmdrl.config.sections import Config
from spmdrl.config.training import TrainSection
from spmdrl.distributed.mesh import expert_degrees, format_ranks
from spmdrl.models.adapters import Adapter, find_targets, is_expert_target, make_adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.peft import open_peft
from spmdrl.models.model_classes import skipped_token
from spmdrl.models.sharding import Head
from spmdrl.placement import DeviceType, Placement, role_device_type

HEADS: Mapping[str, Head] = {
    "policy": "lm",
    "reference": "lm",
    "teacher": "lm",
    "reward": "score",
    "value": "score",
    "rollout": "lm",
    JUDGE: "lm",
}
"""Kind of role -> the head of its model."""


@dataclass(frozen=True, kw_only=True)
class RoleSpec:
    """A role with a model as planned.

    Args:
        kind: a key of `HEADS`.
        section: the role's own keys, `roles.NAME`.
        train: `train` with the keys of `roles.NAME.train`.
        path: directory of its model's files.
        model: its model's configuration, at a toy size if `is_tiny`.
        device_type: device of its ranks.
        dtype: dtype that it computes in.
        trained: whether it has an optimizer.
        backend: train backend (`train.backend`), or engine of a rollout or a judge.
        is_tiny: whether its model is made of random weights (`model.tiny`).
        adapter: the additions to its weights, which then do not train; a rollout has the policy's
            if its engine applies them unmerged, a judge its own if it shares a base.
        base: the role whose weights it shares, or None for weights of its own.
    """

    name: str
    kind: str
    section: RoleSection
    train: TrainSection
    placement: Placement
    path: Path
    model: ModelConfig
    device_type: DeviceType
    dtype: torch.dtype
    trained: bool
    backend: str
    is_tiny: bool
    adapter: Adapter | None = None
    base: str | None = None

    @property
    def head(self) -> Head:
        return HEADS[self.kind]

    @property
    def skipped(self) -> int | None:
        """The token that a reward model passes over at a row's end, to read its score before it."""
        if self.kind != "reward" or self.section.readout == "last":
            return None
        if self.section.readout == "auto":
            return skipped_token(self.model.source, self.model.pad_id)
        return self.model.pad_id

    @property
    def device(self) -> torch.device:
        """The device of its ranks, without an index."""
        return torch.device(self.device_type)

    @property
    def is_rollout(self) -> bool:
        """Whether it samples with the policy's weights, which syncs bring."""
        return self.kind == "rollout"

    @property
    def is_judge(self) -> bool:
        """Whether it answers questions with fixed weights, on an engine."""
        return self.kind == JUDGE

    @property
    def has_engine(self) -> bool:
        """Whether it has an engine in place of a train backend."""
        return self.kind in WITH_ENGINE

    @property
    def has_fixed_base(self) -> bool:
        """Whether its model's matrices never change, so that they have no masters."""
        return not self.trained or self.adapter is not None or self.base is not None

    @property
    def shares_experts(self) -> bool:
        """Whether its replicas hold different experts, and so exchange tokens."""
        return expert_degrees(self.placement.degrees)["exchange"] > 1

    @property
    def is_vllm(self) -> bool:
        return self.backend == "vllm"

    def key(self, name: str) -> str:
        """The role's setting of a key of `train`, as KEY=VALUE."""
        value = getattr(self.train, name)
        where = f"roles.{self.name}.train" if name in self.section.train else "train"
        return f"{where}.{name}={str(value).lower() if isinstance(value, bool) else value}"


def computing_dtype(config: Config, device_type: DeviceType) -> torch.dtype:
    """`model.dtype`; `auto` is float32 on a CPU and bfloat16 on a GPU."""
    if config.model.dtype == "auto":
        return torch.bfloat16 if device_type == "cuda" else torch.float32
    return torch.float32 if config.model.dtype == "float32" else torch.bfloat16


def device_types(
    config: Config, placements: Mapping[str, Placement], ranks: Sequence[str]
) -> dict[str, DeviceType]:
    """Device type of every role, users' own ones too.

    Args:
        ranks: device type of every rank of the world.

    Raises:
        ValueError: a role is on ranks with and without a GPU.
    """
    return {
        name: role_device_type(name, config.roles[name].device, placement.ranks, ranks)
        for name, placement in placements.items()
    }


def make_specs(
    config: Config,
    placements: Mapping[str, Placement],
    models: Mapping[str, ModelConfig],
    devices: Mapping[str, DeviceType],
) -> dict[str, RoleSpec]:
    """Specs of the roles with a model, in the configuration's order.

    Args:
        models: configuration of each role's model.
        devices: device type of each role.

    Raises:
        ValueError: a role is of an unknown kind, an adapter does not fit its model, or roles that
            share a base have different places.
    """
    specs = {}
    for name in (n for n in config.roles if n in models):
        kind = config.role_kind(name)
        _check_kind(name, kind)
        train = config.train_section(name)
        # a process has one vLLM, which is the rollout's
        engine = config.rollout.engine if kind == "rollout" else "native"
        backend = engine if kind in WITH_ENGINE else train.backend
        specs[name] = RoleSpec(
            name=name,
            kind=kind,
            section=config.roles[name],
            train=train,
            placement=placements[name],
            path=config.model_path(name),
            model=models[name],
            device_type=devices[name],
            dtype=computing_dtype(config, devices[name]),
            trained=config.is_trained(name),
            backend=backend,
            is_tiny=config.model.tiny,
            adapter=None if _merges(config, name) else role_adapter(name, config, models[name]),
            base=config.roles[name].base,
        )
    for spec in specs.values():
        if spec.base is not None:
            _check_base(spec, specs[spec.base])
    return _with_policys_adapter(config, specs)


def _merges(config: Config, name: str) -> bool:
    """Whether a role has an engine that takes merged weights only."""
    kind, rollout = config.role_kind(name), config.rollout
    if kind == JUDGE:
        return config.roles[name].base is None
    return kind == "rollout" and (rollout.engine != "native" or rollout.adapters == "merged")


def _check_base(spec: RoleSpec, owner: RoleSpec) -> None:
    """Check that a role has the ranks and degrees of the role whose base it shares. An engine needs
    only what it computes with (`planning.judge_bases`).
    """
    name, own, there = spec.name, spec.placement, owner.placement
    key = f"roles.{name}.base={owner.name}"
    if own.ranks != there.ranks:
        raise ValueError(
            f"roles.{name}.ranks={spec.section.ranks!r} with {key}: they are ranks "
            f"{format_ranks(own.ranks)}, those of {owner.name} {format_ranks(there.ranks)}, and "
            f"what both share is on the same: set roles.{name}.ranks: same as {owner.name}"
        )
    assert spec.dtype == owner.dtype, (spec, owner)  # one model on one kind of device
    if spec.has_engine:
        return
    # dp_replicate last: the others decide it where it is not set
    for axis in sorted(own.degrees, key=lambda axis: axis == "dp_replicate"):
        degree, degree_there = own.degrees[axis], there.degrees[axis]
        if degree != degree_there:
            raise ValueError(
                f"roles.{name}.{axis}={degree} with {key}, where it is {degree_there}: what both "
                f"share is cut once: set roles.{name}.{axis}={degree_there}"
            )
    assert spec.backend == owner.backend, (spec, owner)


def role_adapter(name: str, config: Config, model: ModelConfig) -> Adapter | None:
    """Make the adapter that a role's section describes, or read it without its values.

    Raises:
        ValueError: a target selects no matrix of the model, a file is refused, or keys differ from
            what it says.
        OSError: a file cannot be read.
    """
    own = config.roles[name].adapter
    if own is None:
        return None
    key = f"roles.{name}.adapter"
    if own.path is not None:
        if config.model.tiny:
            raise ValueError(f"{key}.path={own.path}: it fits no model.tiny: remove one of them")
        return _adapter_of_file(key, own, own.path, model, HEADS[config.role_kind(name)])
    targets = _given_targets(key, own, model)
    made = make_adapter(
        targets,
        rank=own.rank,
        alpha=own.alpha,
        rslora=own.rslora,
        dropout=own.dropout,
        experts=own.experts,
    )
    return _checked_experts(key, made)


def _given_targets(key: str, own: AdapterSection, model: ModelConfig) -> tuple[str, ...]:
    try:
        return find_targets(model, own.targets)
    except ValueError as error:
        raise ValueError(f"{key}.targets: {error}") from None


def _adapter_of_file(
    key: str, own: AdapterSection, path: str, model: ModelConfig, head: Head
) -> Adapter:
    """Read an adapter's description; keys that the configuration also gives must agree with it."""
    try:
        opened = open_peft(path, model, head=head, experts=own.experts)
    except ValueError as error:
        raise ValueError(f"{key}.path: {error}") from None
    file, adapter = opened.file, opened.adapter
    given = own.model_fields_set

    def refuse(name: str, found: object) -> None:
        raise ValueError(
            f"{key}.{name}={getattr(own, name)}: the adapter in {path} has {found}, which counts: "
            "remove the key"
        )

    if "rslora" in given and own.rslora != file.rslora:
        refuse("rslora", file.rslora)
    modules = [name.removesuffix(".weight") for name in adapter.targets]
    if "rank" in given and (ranks := {file.rank_of(module) for module in modules}) != {own.rank}:
        refuse("rank", _listed(ranks))
    if "alpha" in given and (alphas := {file.alpha_of(module) for module in modules}) != {
        own.alpha
    }:
        refuse("alpha", _listed(alphas))
    if "targets" in given and adapter.targets.keys() != set(_given_targets(key, own, model)):
        refuse("targets", _listed({module.rpartition(".")[2] for module in modules}))
    if "init" in given:
        refuse("init", "values of its own")
    if "dropout" in given:
        adapter = replace(adapter, dropout=own.dropout)
    return _checked_experts(key, adapter)


def _checked_experts(key: str, adapter: Adapter) -> Adapter:
    """Return the adapter.

    Raises:
        ValueError: inputs of experts would be dropped, which PEFT lacks too; or it has no experts.
    """
    has_experts = any(map(is_expert_target, adapter.targets))
    if adapter.shares_experts and not has_experts:
        raise ValueError(
            f"{key}.experts=shared: no expert is adapted: add experts to {key}.targets, or leave "
            "the key out"
        )
    if adapter.dropout > 0 and has_experts:
        raise ValueError(
            f"{key}.dropout={adapter.dropout}: experts have no dropout: set it to 0, or targets to "
            "attention"
        )
    return adapter


def _listed(values: Collection[object]) -> str:
    return ", ".join(sorted(map(str, values)))


def _with_policys_adapter(config: Config, specs: dict[str, RoleSpec]) -> dict[str, RoleSpec]:
    """Give rollouts that apply the policy's adapter unmerged that adapter."""
    policy = next((spec for spec in specs.values() if spec.kind == "policy"), None)
    if policy is None or policy.adapter is None:
        return specs
    return {
        name: replace(spec, adapter=policy.adapter)
        if spec.is_rollout and not _merges(config, name)
        else spec
        for name, spec in specs.items()
    }


def _check_kind(name: str, kind: str) -> None:
    if kind in HEADS:
        return
    near = difflib.get_close_matches(kind, HEADS, n=1)
    fix = f"did you mean {near[0]}?" if near else "name one of them"
    raise ValueError(
        f"roles.{name}.kind={kind}: kinds are {', '.join(HEADS)}, and module:Class for a role of "
        f"your own: {fix}"
    )
