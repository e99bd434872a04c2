"""Features and families of models that backends and engines take, asked of their own checks.

A cell holds what a tiny model of the family passes at a run's start; whether the numbers are right
is the contract's to say (`spmdrl.testing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spmdrl.config.roles import RoleSection
from spmdrl.config.training import TrainSection
from spmdrl.distributed.mesh import AXES
from spmdrl.models.adapters import find_targets, make_adapter
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.family import Family, families
from spmdrl.placement import Placement
from spmdrl.planning.frozen import frozen_names
from spmdrl.planning.layouts import check_model
from spmdrl.planning.systems.registry import SYSTEMS
from spmdrl.role_spec import RoleSpec
from spmdrl.rollout.vllm_model import check_supported

DENSE, EXPERTS = "LlamaForCausalLM", "Qwen3MoeForCausalLM"
"""Families by which features are tried."""

_CUTS: Mapping[str, Mapping[str, int]] = {
    "dp_shard": {"dp_shard": 2},
    "tp": {"tp": 2},
    "cp": {"cp": 2},
    "pp": {"pp": 2},
    "ep": {"dp_shard": 2, "ep": 2},
}
"""Axis -> the degrees by which it is tried."""

_ENGINE_CUTS: Mapping[str, Mapping[str, int]] = {"tp": {"tp": 2}, "ep": {"tp": 2, "ep": 2}}

_NONE = "-"


@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """A train backend or a rollout engine in a table.

    Args:
        title: heading.
        backend: name in the registry, or of an engine.
        train: keys of `train` that choose it.
    """

    title: str
    backend: str
    train: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_engine(self) -> bool:
        return self.backend not in SYSTEMS


def columns() -> tuple[Column, ...]:
    """List every training system of the registry, those with stages once for each."""
    found = []
    for name in SYSTEMS:
        if name == "deepspeed":
            stages = (1, 2, 3)
            found += [
                Column(title=f"{name} {s}", backend=name, train={"deepspeed": {"stage": s}})
                for s in stages
            ]
        else:
            found.append(Column(title=name, backend=name))
    return tuple(found)


ENGINES = (Column(title="native", backend="native"), Column(title="vllm", backend="vllm"))


def tiny_of(family: Family) -> ModelConfig:
    """Make the configuration of a tiny model of a family, with heads that two ranks can divide."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    one_head = family.tiny.get("num_key_value_heads") == 1
    return parse_config(
        {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "vocab_size": 64,
            "hidden_size": 128,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "head_dim": 32,
            "max_position_embeddings": 64,
            **heads,
            **family.tiny,
            **(heads if one_head else {}),
        }
    )


def make_spec(
    model: ModelConfig,
    column: Column,
    *,
    name: str = "policy",
    kind: str = "policy",
    degrees: Mapping[str, int] | None = None,
    keys: Mapping[str, Any] | None = None,
    adapts: bool = False,
) -> RoleSpec:
    """Make the spec of a role on that backend or engine, as a configuration would make it.

    Args:
        degrees: axis -> degree, where it is not 1.
        keys: keys of the role's section.
        adapts: whether it has an adapter of its attention.
    """
    given = {} if degrees is None else degrees
    section = RoleSection.model_validate({} if keys is None else keys)
    size = 1
    for axis in AXES:
        size *= given.get(axis, 1)
    train = {} if column.is_engine else {"backend": column.backend, **column.train}
    return RoleSpec(
        name=name,
        kind="rollout" if column.is_engine else kind,
        section=section,
        train=TrainSection.model_validate(train),
        placement=Placement(
            ranks=tuple(range(size)), degrees={a: given.get(a, 1) for a in (*AXES, "ep")}
        ),
        path=Path(name),
        model=model,
        device_type="cpu",
        dtype=torch.float32,
        trained=kind in ("policy", "value") and not column.is_engine,
        backend=column.backend,
        is_tiny=False,
        adapter=make_adapter(find_targets(model, ("attention",)), rank=2, alpha=2.0)
        if adapts
        else None,
        base=section.base,
    )


def refusal(spec: RoleSpec, *others: RoleSpec) -> str | None:
    """Return why a run with the role would not start, or None if it would.

    Args:
        others: further roles of the run.
    """
    try:
        check_model(spec, {s.name: s for s in (spec, *others)}, replays_routing=False)
        if spec.is_vllm:
            check_supported(spec.model, {spec.model.architecture}, None)
        elif not spec.is_rollout:
            frozen_names(spec)
    except ValueError as error:
        return str(error)
    return None


Ask = Callable[[Column], str | None]


def _features() -> Mapping[str, Ask]:
    """Feature -> why a column's backend refuses it, or None."""
    known = families()
    dense, experts = tiny_of(known[DENSE]), tiny_of(known[EXPERTS])

    def cut(axis: str) -> Ask:
        model = experts if axis == "ep" else dense
        return lambda column: refusal(make_spec(model, column, degrees=_CUTS[axis]))

    def one(model: ModelConfig = dense, **given: Any) -> Ask:
        return lambda column: refusal(make_spec(model, column, **given))

    def shared(column: Column) -> str | None:
        policy = make_spec(dense, column, adapts=True)
        keys = {"base": "policy", "trained": False}
        reference = make_spec(dense, column, name="reference", kind="reference", keys=keys)
        return refusal(policy, reference) or refusal(reference, policy)

    return {
        **{f"`{axis}`": cut(axis) for axis in _CUTS},
        "mixtures of experts": one(experts),
        "scalar heads (value)": one(kind="value", name="value"),
        "frozen roles (reference, reward)": one(kind="reference", name="reference"),
        "`freeze` of some parameters": one(keys={"freeze": ["*embed_tokens*"]}),
        "adapters": one(adapts=True),
        "one base for several roles": shared,
        "optimizer away while passes run": partial(_splits, dense),
        "optimizer on the host, stepping in windows": partial(_streams, dense),
    }


def _splits(model: ModelConfig, column: Column) -> str | None:
    if not SYSTEMS[column.backend]().splits_optimizer:
        return "passes need it"
    return refusal(make_spec(model, column))


def _streams(model: ModelConfig, column: Column) -> str | None:
    spec, system = make_spec(model, column), SYSTEMS[column.backend]()
    weights = system.layout(spec)
    rank = spec.placement.ranks[0]
    held = system.memory(spec, weights[rank], system.state_layout(spec, weights)[rank])
    return refusal(spec) if held.can_stream else "it moves as a whole"


def feature_rows() -> Iterator[tuple[str, ...]]:
    """Yield a heading, and a row for each feature: its name, and yes or no for each backend."""
    shown = columns()
    yield ("feature", *(column.title for column in shown))
    for feature, ask in _features().items():
        yield (feature, *("yes" if ask(column) is None else _NONE for column in shown))


def family_rows() -> Iterator[tuple[str, ...]]:
    """Yield a heading, and a row for each family: the axes by which each backend and engine can
    divide a tiny model of it; "whole" if none, and a dash where it refuses the model.
    """
    shown = (*columns(), *ENGINES)
    yield ("family", *(column.title for column in shown))
    for family in families().values():
        model = tiny_of(family)
        name = f"`{family.architecture.removesuffix('ForCausalLM')}`"
        yield (name, *(_axes(model, column) for column in shown))


def _axes(model: ModelConfig, column: Column) -> str:
    if refusal(make_spec(model, column)) is not None:
        return _NONE
    cuts = _ENGINE_CUTS if column.is_engine else _CUTS
    tried = {axis: cut for axis, cut in cuts.items() if axis != "ep" or model.moe is not None}
    return " ".join(a for a, cut in tried.items() if _divides(model, column, cut)) or "whole"


def _divides(model: ModelConfig, column: Column, degrees: Mapping[str, int]) -> bool:
    # Megatron has tp of experts with sequence parallelism only
    needs_sp = column.backend == "megatron" and "tp" in degrees
    keys = {"megatron": {"sp": True}} if needs_sp else {}
    return refusal(make_spec(model, column, degrees=degrees, keys=keys)) is None


def missing() -> dict[str, str]:
    """Return the refusals of backends that take not even a plain model: their packages are missing.

    Without them a table would say that they take nothing.
    """
    model = tiny_of(families()[DENSE])
    asked = {column: refusal(make_spec(model, column)) for column in columns()}
    taken = {column.backend for column, reason in asked.items() if reason is None}
    return {
        column.backend: reason
        for column, reason in asked.items()
        if reason is not None and column.backend not in taken
    }


def support_tables() -> str:
    """Write both tables as Markdown.

    Raises:
        ValueError: a backend's package is not installed.
    """
    lacking = missing()
    if lacking:
        raise ValueError("; ".join(lacking.values()))
    return "\n\n".join(_markdown(rows) for rows in (feature_rows(), family_rows()))


def _markdown(rows: Iterator[tuple[str, ...]]) -> str:
    heading, *others = rows
    rule = ("---",) * len(heading)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *others))
