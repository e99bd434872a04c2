"""The stages in order of worth, what each needs, and which of them a budget leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ENGINE = ("torch", "numpy", "pydantic")
FLOW = (*ENGINE, "safetensors", "tokenizers", "transformers", "xxhash", "yaml", "omegaconf")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Args:
        name: its name in lines and in `--stages`.
        module: module with a function `cases(setting)`.
        seconds: expected duration on a card, for `--budget`.
        needs: modules that it imports from wheels.
        program: module that runs as the stage's process.
    """

    name: str
    module: str
    seconds: int
    needs: tuple[str, ...] = ENGINE
    program: str = "first_minutes.measure"


STAGES = (
    Stage(name="ceilings", module="first_minutes.ceilings", seconds=25, needs=("torch",)),
    Stage(name="exactness", module="first_minutes.exactness", seconds=15),
    Stage(name="attention", module="first_minutes.attention", seconds=35),
    Stage(name="decode", module="first_minutes.decode", seconds=120),
    Stage(
        name="training",
        module="first_minutes.training",
        seconds=75,
        needs=(*ENGINE, "safetensors"),
    ),
    Stage(name="moves", module="first_minutes.moves", seconds=60),
    Stage(name="sampling", module="first_minutes.sampling", seconds=15),
    Stage(name="tests", module="first_minutes.suite", seconds=120, needs=(*FLOW, "pytest")),
    Stage(name="flow", module="first_minutes.flow", seconds=90, needs=FLOW),
)
"""Stages in order of worth: later ones rest on the first; tests and flow take longest."""


def select(names: str | None, stages: Sequence[Stage] = STAGES) -> tuple[Stage, ...]:
    """Return the stages of a comma-separated list in the table's order; all of them for None.

    Raises:
        ValueError: a name is unknown.
    """
    if names is None:
        return tuple(stages)
    wanted = names.split(",")
    unknown = [name for name in wanted if name not in {stage.name for stage in stages}]
    if unknown:
        raise ValueError(
            f"--stages: {unknown[0]!r} is unknown; stages are {','.join(s.name for s in stages)}"
        )
    return tuple(stage for stage in stages if stage.name in wanted)


def within(budget: float | None, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the longest beginning of `stages` whose expected seconds fit into the budget."""
    if budget is None:
        return tuple(stages)
    kept, left = [], budget
    for stage in stages:
        left -= stage.seconds
        if left < 0:
            break
        kept.append(stage)
    return tuple(kept)


def missing_modules(stage: Stage) -> tuple[str, ...]:
    """Return the modules that the stage needs and this interpreter does not find."""
    return tuple(name for name in stage.needs if find_spec(name) is None)


DISTRIBUTIONS = {"yaml": "pyyaml"}
"""Modules whose wheel has another name."""


def install_command(python: str, modules: Sequence[str], requirements: Sequence[Path]) -> str:
    """Return the command that brings the modules, in the versions that the files pin."""
    pins: dict[str, str] = {}
    for file in requirements:
        for line in file.read_text(encoding="utf-8").splitlines():
            name, separator, _ = line.partition("==")
            if separator:
                pins.setdefault(name.strip().lower(), line.strip())
    names = [DISTRIBUTIONS.get(module, module) for module in modules]
    return f"{python} -m pip install {' '.join(pins.get(name, name) for name in names)}"
