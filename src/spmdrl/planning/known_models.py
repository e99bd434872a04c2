"""Shapes of known models, so that a plan needs no model's files."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from spmdrl.models.config import ModelConfig, parse_config, read_config

TABLE = Path(__file__).with_name("known_models.yaml")


def known_models() -> list[str]:
    """Names of the models in the table."""
    return list(_table())


def is_known(name: str) -> bool:
    """Whether a model is in the table under this name."""
    return _short(name) in _table()


def _short(name: str) -> str:
    """The table's name of a model that may have an alias, or the name of its repository."""
    return _others().get(name.lower(), name.lower())


@cache
def _others() -> dict[str, str]:
    """Map aliases and names of repositories to the table's names."""
    return {
        other.lower(): name
        for name, row in _table().items()
        for other in (*row.get("aliases", ()), row.get("repository", name))
    }


def known_model(name: str) -> ModelConfig:
    """Shapes of a model by its name, that of its repository, or its directory.

    Args:
        name: `llama-3.1-70b`, an alias (`llama-70b`), `meta-llama/Llama-3.1-70B`, or a directory
            with a config.json.

    Raises:
        ValueError: no model has this name, or the directory's config.json is refused.
    """
    if (Path(name) / "config.json").is_file():
        return read_config(name)
    short = _short(name)
    if short not in _table():
        near = difflib.get_close_matches(short, [*_table(), *_others()], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"model {name!r}: {hint}known are {', '.join(_table())}; or give a directory with a "
            "config.json"
        )
    return parse_config(_table()[short]["config"], origin=f"{TABLE.name}: {short}")


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return table
