"""Loader of a checked `Config` from YAML files, the environment and `key=value` words."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from spmdrl.config.data_sets import (
    described_sets,
    held_out_set,
    mixed_source,
    set_data,
    set_sampling,
)
from spmdrl.config.key_table import WILDCARDS, known_keys
from spmdrl.config.rules import check_crossed, check_training
from spmdrl.config.sections import Config

_ENVIRONMENT = re.compile(r"^\s*#.*|\$\{([A-Z][A-Z0-9_]*)(?::([^}]*))?\}", re.MULTILINE)
"""A whole comment line (left as it is), or `${NAME}` or `${NAME:default}`."""


def load_config(path: Path | str, overrides: Sequence[str] = (), *, trains: bool = True) -> Config:
    """Read `path` with its includes, apply `key=value` overrides, check everything.

    Args:
        trains: the configuration is for training; False: only for generation.

    Raises:
        ValueError: a missing or malformed file, an unknown key, a wrong value, or two keys that do
            not fit together; the message names the keys, the values and the fix.
    """
    merged = _read(Path(path), ())
    for word in overrides:
        _override(merged, word)
    try:
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error}") from None
    config = parse_config(plain, str(path))
    check_crossed(config)
    if trains:
        check_training(config)
    return config


def parse_config(values: Any, origin: str) -> Config:
    """Make a `Config` of nested dicts; ValueError lists every bad key with a suggestion."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(_problems(error, values, "", origin)) from None
    for name, role in config.roles.items():
        with _told(role.train, f"{origin}: roles.{name}.train", "train."):
            config.train_section(name)
    for number, entry in enumerate(config.data.mix):
        with _told(entry, f"{origin}: data.mix.{number}", "data.train."):
            mixed_source(config, entry)
    with _told(config.evaluation.sampling, f"{origin}: evaluation", "sampling."):
        set_sampling(config, {})
    for name, given in described_sets(config).items():
        where = f"{origin}: evaluation.sets.{name}"
        with _told(given.get("data", {}), where, "data.train."):
            set_data(config, given)
        with _told({**config.evaluation.sampling, **given.get("sampling", {})}, where, "sampling."):
            set_sampling(config, given)
        with _told(given, where, "evaluation."):
            held_out_set(config, given)
    return config


@contextmanager
def _told(values: Any, where: str, prefix: str) -> Iterator[None]:
    """Turn the bad keys of a mapping into one ValueError that names its place."""
    try:
        yield
    except ValidationError as error:
        raise ValueError(_problems(error, values, prefix, where)) from None


def _problems(error: ValidationError, values: Any, prefix: str, origin: str) -> str:
    """One line per bad key; `prefix` completes the key's name."""
    problems: dict[str, list[Any]] = {}
    for detail in error.errors():
        problems.setdefault(prefix + _key_of(detail, values), []).append(detail)
    return "\n".join(f"{origin}: {_problem(*item)}" for item in problems.items())


def _read(path: Path, chain: tuple[Path, ...]) -> DictConfig:
    path = path.resolve()
    if path in chain:
        raise ValueError(f"{path} includes itself: {' -> '.join(map(str, (*chain, path)))}")
    if not path.is_file():
        origin = f" (included by {chain[-1]})" if chain else ""
        raise ValueError(f"there is no config file {path}{origin}")
    try:
        content = OmegaConf.create(_substitute(path.read_text(encoding="utf-8"), str(path)))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path}: the file must hold `key: value` lines at its top level")
    includes = content.pop("includes", OmegaConf.create([]))
    if not isinstance(includes, ListConfig):
        raise ValueError(f"{path}: includes={includes!r} must be a list of files")
    parts = [_read(path.parent / str(name), (*chain, path)) for name in includes]
    try:
        merged = OmegaConf.merge(*parts, content)
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"{path} does not fit the files that it includes: {error}") from None
    assert isinstance(merged, DictConfig)
    return merged


def _override(config: DictConfig, word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ValueError(f"override {word!r}: write it as key=value, e.g. train.lr=1e-5")
    text = _substitute(text, f"override {word!r}")
    try:
        # "value=..." is read with YAML's types; update also reaches into lists (rewards.0.weight)
        value = OmegaConf.from_dotlist([f"value={text}"])["value"]
        OmegaConf.update(config, key, value, merge=True)
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"override {word!r}: {error}") from None


def _substitute(text: str, origin: str) -> str:
    """Replace `${NAME:default}` from the environment, before YAML gives the text its types."""

    def value_of(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        if name is None:
            return match.group()
        value = os.environ.get(name, default)
        if value is None:
            raise ValueError(
                f"{origin}: ${{{name}}} is not set in the environment and has no default: "
                f"set it, or write ${{{name}:default}}"
            )
        return value

    return _ENVIRONMENT.sub(value_of, text)


def _key_of(detail: Mapping[str, Any], values: Any) -> str:
    """The dotted key of an error, without the names that pydantic adds for a union's choices."""
    if detail["type"] == "missing":
        return ".".join(map(str, detail["loc"]))
    parts: list[str] = []
    for part in detail["loc"]:
        if not (part in values if isinstance(values, dict) else isinstance(part, int)):
            break
        parts.append(str(part))
        values = values[part]
    return ".".join(parts)


def _problem(key: str, details: Sequence[Mapping[str, Any]]) -> str:
    """Message on one key; pydantic gives one detail for each choice of a union."""
    if details[0]["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_suggestion(key)}"
    if details[0]["type"] == "missing":
        return f"the key {key!r} is required"
    value = details[0]["input"]
    if details[0]["type"] == "value_error" and isinstance(value, dict):
        # a rule of the section, which names its keys itself
        return f"{key.rstrip('.')}.{details[0]['ctx']['error']}"
    if details[0]["type"] == "tuple_type" and isinstance(value, str | int | float):
        return f"{key}={value!r}: the key takes a list: write {key}=[{value}]"
    return f"{key}={value!r}: {' or: '.join(d['msg'] for d in details)}"


def _suggestion(key: str) -> str:
    """The nearest known key: a neighbour, else a namesake elsewhere."""
    parts = key.split(".")
    general = list(parts)
    if len(parts) > 2 and parts[0] in WILDCARDS:
        general[1] = WILDCARDS[parts[0]]
    known = known_keys()
    prefix = "".join(f"{part}." for part in general[:-1])
    neighbours = {k.removeprefix(prefix).split(".")[0] for k in known if k.startswith(prefix)}
    near = difflib.get_close_matches(parts[-1], sorted(neighbours), n=1, cutoff=0.7)
    if near:
        return f"; did you mean {'.'.join([*parts[:-1], near[0]])!r}?"
    near = [k for k in known if k.split(".")[-1] == parts[-1]]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; the keys there are {', '.join(sorted(neighbours))}"
