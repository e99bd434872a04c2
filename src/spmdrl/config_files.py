"""From YAML files, the environment and `key=value` words to a checked `Config`."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from spmdrl.config import Config, check_crossed

_ENVIRONMENT = re.compile(r"\$\{([A-Z][A-Z0-9_]*)(?::([^}]*))?\}")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read `path` with its includes, apply `key=value` overrides, check everything.

    Raises:
        ValueError: a missing or malformed file, an unknown key, a wrong value, or two keys that do
            not fit together; the message names the keys, the values and the mend.
    """
    merged = _read(Path(path), ())
    for word in overrides:
        merged = _override(merged, word)
    try:
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error}") from None
    config = parse_config(plain, str(path))
    check_crossed(config)
    return config


def parse_config(values: Any, origin: str) -> Config:
    """`values` (nested dicts) as a `Config`; ValueError lists every bad key with a suggestion."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain_error(detail, origin) for detail in error.errors()]
        raise ValueError("\n".join(lines)) from None


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All keys of the configuration, dotted; a role's keys stand under `roles.NAME`."""
    keys = []
    for name, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            keys.append(prefix + name)
            continue
        middle = {"roles": "roles.NAME", "rewards": "rewards.0"}.get(name, name)
        keys += known_keys(inner, f"{prefix}{middle}.")
    return keys


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if (inner := _section_of(argument)) is not None:
            return inner
    return None


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
    includes = content.pop("includes", [])
    parts = [_read(path.parent / name, (*chain, path)) for name in includes]
    merged = OmegaConf.merge(*parts, content)
    assert isinstance(merged, DictConfig)
    return merged


def _override(config: DictConfig, word: str) -> DictConfig:
    key, equals, _ = word.partition("=")
    if not equals or not key:
        raise ValueError(f"override {word!r}: write it as key=value, e.g. train.lr=1e-5")
    try:
        word = _substitute(word, f"override {word!r}")
        merged = OmegaConf.merge(config, OmegaConf.from_dotlist([word]))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"override {word!r}: {error}") from None
    assert isinstance(merged, DictConfig)
    return merged


def _substitute(text: str, origin: str) -> str:
    """`${NAME:default}` replaced from the environment, before YAML gives the text its types."""

    def value_of(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        value = os.environ.get(name, default)
        if value is None:
            raise ValueError(
                f"{origin}: ${{{name}}} is not set in the environment and has no default: "
                f"set it, or write ${{{name}:default}}"
            )
        return value

    return _ENVIRONMENT.sub(value_of, text)


def _explain_error(detail: Mapping[str, Any], origin: str) -> str:
    location = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        parts = detail["loc"]
        candidates = [
            k.replace("NAME", str(parts[1])) if len(parts) > 1 else k for k in known_keys()
        ]
        near = difflib.get_close_matches(location, candidates, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{origin}: unknown key {location!r}{hint}"
    if detail["type"] == "missing":
        return f"{origin}: the key {location!r} is required"
    return f"{origin}: {location}={detail['input']!r}: {detail['msg']}"
