"""Rules on what a flow and a kind of role read; a key that they would ignore is refused.

A user's own trainer or flow may read any key.
"""

from __future__ import annotations

from collections.abc import Iterator

from spmdrl.config.data_sets import held_out_sets
from spmdrl.config.roles import WITH_ENGINE
from spmdrl.config.sections import Config
from spmdrl.config.shipped_flows import is_shipped, shipped_flows


def check_needed(config: Config) -> None:
    """ValueError: a role that the flow needs is missing."""
    for role in config.flow_row.needs:
        if role not in config.roles:
            raise ValueError(
                f"flow={config.flow} needs roles.{role}, and roles={sorted(config.roles)} has "
                f"none: add roles.{role}: {{}}"
            )


def check_updated(config: Config) -> None:
    """ValueError: a role that the shipped trainer updates is not trained, or of another kind."""
    if config.trainer is not None:
        return
    for name in (name for name in config.flow_row.updates if name in config.roles):
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
    if not is_shipped(config.flow):
        return
    kind = config.flow_row.data
    own_parts = config.trainer is not None or config.environment is not None
    if config.data.kind not in (None, kind) and not own_parts:
        raise ValueError(
            f"data.kind={config.data.kind} with flow={config.flow}, which reads {kind}: leave the "
            "key out"
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
        flows = [row.name for row in shipped_flows() if name in row.algorithm_keys]
        yield f"algorithm.{name}", getattr(config.algorithm, name), flows
    flows = [row.name for row in shipped_flows() if row.reads_preference]
    for name in sorted(config.preference.model_fields_set):
        yield f"preference.{name}", getattr(config.preference, name), flows


def _of_sampling(config: Config) -> Iterator[tuple[str, object, list[str]]]:
    """Keys that only flows that sample read, whatever the trainer is."""
    if config.lag:
        yield "lag", config.lag, [row.name for row in shipped_flows() if row.may_lag]
    if config.environment is not None:
        flows = [row.name for row in shipped_flows() if row.samples]
        yield "environment", config.environment, flows


def check_role_used(config: Config, name: str) -> None:
    """ValueError: options of a built-in role, or training keys of a role without train backend."""
    role, kind = config.roles[name], config.role_kind(name)
    if role.options and ":" not in kind:
        raise ValueError(
            f"roles.{name}.options={role.options}: {name} is a {kind}, and only a module:Class "
            "takes options: leave the key out"
        )
    if kind not in WITH_ENGINE and ":" not in kind:
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


def check_best(config: Config) -> None:
    """ValueError: no evaluation, or no checkpoint of one, has what `checkpoint.keep_best` names."""
    wanted, every, saves = config.checkpoint.keep_best, config.evaluation.every, config.checkpoint
    if wanted is None:
        if config.evaluation.stop_after:
            raise ValueError(
                f"evaluation.stop_after={config.evaluation.stop_after} with checkpoint.keep_best="
                "null: name the metric by which evaluations are compared"
            )
        return
    begins = [f"eval/{name}/" for name in held_out_sets(config)]
    if not wanted.removeprefix("-").startswith(tuple(begins)):
        raise ValueError(
            f"checkpoint.keep_best={wanted} is no metric of a held-out set: theirs begin with "
            f"{', '.join(begins) or 'eval/NAME/, and there is no set'}"
        )
    if every == 0 or saves.every == 0 or every % saves.every:
        raise ValueError(
            f"checkpoint.keep_best={wanted} with evaluation.every={every} and checkpoint.every="
            f"{saves.every}: set the first to a multiple of the second, so that what is evaluated "
            "has a checkpoint"
        )
