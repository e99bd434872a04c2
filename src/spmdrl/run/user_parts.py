"""Checks of a user's flow, environment and trainer, made before any model is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from spmdrl.config.sections import Config
from spmdrl.config.shipped_flows import is_shipped
from spmdrl.config.user_objects import lacks, load_object, may_have, misfit

Methods = Mapping[str, Sequence[str]]

ENVIRONMENT: Methods = {"collect": ("step",), "ahead": ("step",), "metrics": ()}
"""Methods that a shipped flow calls on its environment: method -> arguments of the call."""

WITH_CALL: Methods = {"step": ("step", "batch", "call")}
"""Call of a trainer's `step` with the next step's rollout alongside."""

NO_HELD_OUT = (
    "has no 'held_out', which evaluates the held-out pairs: set it in __init__, to "
    "HeldOutPreferences(...) as the flow's own trainer does"
)


@runtime_checkable
class HasHeldOut(Protocol):
    """Trainer of preference pairs; its `held_out` evaluates them with `evaluate(step)`."""

    held_out: object


def check_flow(config: Config, flow: Callable[..., Any]) -> None:
    """Raise ValueError if a user's flow is not a function of one argument, the run."""
    if ":" not in config.flow:
        return
    where = f"flow={config.flow}"
    if inspect.isclass(flow) or not callable(flow):
        kind = "class" if inspect.isclass(flow) else type(flow).__name__
        raise ValueError(f"{where} is a {kind}: name a function of one argument, the run")
    wrong = misfit(flow, ["run"])
    if wrong is not None:
        raise ValueError(f"{where} cannot be a flow, as it {wrong}")


def check_parts(config: Config) -> None:
    """Check the environment and trainer that the configuration names, before they are made.

    Raises:
        ValueError: one cannot be loaded or made with a run, or lacks what the flow needs; one line
            names the key, the file, the attribute and the fix.
    """
    for key, where in (("environment", config.environment), ("trainer", config.trainer)):
        if where is None:
            continue
        part = load_object(where, key)
        if not callable(part):
            raise ValueError(
                f"{key}={where} is a {type(part).__name__}: name a class that is made with the run"
            )
        if inspect.isclass(part):
            _check_methods(config, key, where, part)
            has_pairs = key == "trainer" and config.flow_row.reads_preference
            if has_pairs and not may_have(part, "held_out"):
                raise ValueError(f"{key}={where}: the class {part.__name__} {NO_HELD_OUT}")
        wrong = misfit(part, ["run"])
        if wrong is not None:
            raise ValueError(f"{key}={where} is made with the run, and {wrong}")


def check_made(config: Config, where: str, made: object) -> None:
    """Check the object made by such a class or function, before the first step.

    Raises:
        ValueError: as `check_parts`; also if it lacks an attribute that its `__init__` should set.
    """
    for key, named in (("environment", config.environment), ("trainer", config.trainer)):
        if where != named:
            continue
        _check_methods(config, key, where, made)
        if key == "trainer" and config.flow_row.reads_preference:
            what = f"{key}={where}: the class {type(made).__name__}"
            if not isinstance(made, HasHeldOut):
                raise ValueError(f"{what} {NO_HELD_OUT}")
            lacking = lacks(made.held_out, {"evaluate": ("step",)})
            if lacking is not None:
                raise ValueError(f"{what}: its 'held_out' {lacking}")


def _check_methods(config: Config, key: str, where: str, part: object) -> None:
    """Check the methods of a class or object; a user's own flow may call other ones."""
    for methods in _asked(config, key) if is_shipped(config.flow) else [{}]:
        lacking = lacks(part, methods)
        if lacking is not None:
            name = part.__name__ if inspect.isclass(part) else type(part).__name__
            raise ValueError(f"{key}={where}: the class {name} {lacking}")


def _asked(config: Config, key: str) -> list[Methods]:
    """Methods that the flow calls: one entry for each way of calling them."""
    if key == "environment":
        return [ENVIRONMENT]
    plain: Methods = {"step": ("step", "batch")}
    # the last step has nothing alongside
    return [plain, WITH_CALL] if config.flow_row.may_lag and config.lag > 0 else [plain]
