"""Loader of a checked `Config` from YAML files, the environment and `key=value` words;
configurations that come with the package go by name, in a checkout as in an installed wheel.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from spmdrl.config.data import PromptsSection
from spmdrl.config.data_sets import (
    described_sets,
    held_out_set,
    mixed_source,
    set_data,
    set_sampling,
    turns_of,
)
from spmdrl.config.faults import ConfigError, Fault, read_fault
from spmdrl.config.key_table import WILDCARDS, known_keys
from spmdrl.config.migrate import new_name
from spmdrl.config.rules import check_rules
from spmdrl.config.sections import Config

SUFFIX = ".yaml"
RUN_FILE = "run.json"
"""File of a run's directory that has the configurations of its starts."""
FOLDER = Path(__file__).parents[1] / "configs"


def shipped_names() -> list[str]:
    """Names of the shipped configurations: `quickstart`, `rlhf/ppo`."""
    return sorted(str(p.relative_to(FOLDER).with_suffix("")) for p in FOLDER.rglob(f"*{SUFFIX}"))


def find_config(name: str | Path, *, included_by: Path | None = None) -> Path:
    """Find a configuration: a file, otherwise a shipped one by name.

    Args:
        name: path of a file, or `quickstart`, `rlhf/ppo`; a name may end in `.yaml`.
        included_by: file that names it, in whose folder relative paths start; None: they start in
            the working directory.

    Raises:
        ValueError: neither exists; similar names are suggested.
    """
    path = Path(name) if included_by is None else included_by.parent / name
    if path.is_file():
        return path
    known, short = shipped_names(), str(name).removesuffix(SUFFIX)
    if short in known:
        return FOLDER / f"{short}{SUFFIX}"
    near = difflib.get_close_matches(short, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "`spmdrl configs` lists the shipped ones"
    origin = "" if included_by is None else f" (included by {included_by})"
    raise ValueError(f"there is no config file {path.absolute()}{origin}; {hint}")


def list_configs() -> str:
    """Names of the shipped configurations, each with the first line of its comment."""
    names = shipped_names()
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {_title(find_config(name))}" for name in names)


def _title(path: Path) -> str:
    """First line of the comment that a configuration begins with."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def shipped_text(name: str) -> str:
    """Text of a shipped configuration.

    Raises:
        ValueError: none has this name.
    """
    short = name.removesuffix(SUFFIX)
    if short not in shipped_names():
        raise ValueError(f"there is no shipped configuration {name!r}: `spmdrl configs` lists them")
    return (FOLDER / f"{short}{SUFFIX}").read_text(encoding="utf-8").rstrip()


_ENVIRONMENT = re.compile(r"^\s*#.*|\$\{([A-Z][A-Z0-9_]*)(?::([^}]*))?\}", re.MULTILINE)
"""A whole comment line (left as it is), or `${NAME}` or `${NAME:default}`."""


def load_config(path: Path | str, overrides: Sequence[str] = (), *, trains: bool = True) -> Config:
    """Read a configuration with its includes, apply `key=value` overrides, check everything.

    Args:
        path: path of a YAML file, or a name as `find_config` takes it; so are the includes. The
            directory of a run stands for the configuration of its last start.
        trains: the configuration is for training; False: only for generation.

    Raises:
        ValueError: a missing or malformed file, an unknown key, a wrong value, or two keys that do
            not fit together; the message names the keys, the values and the fix.
    """
    return config_reader(path, trains=trains)(overrides)


def config_reader(path: Path | str, *, trains: bool = True) -> Callable[[Sequence[str]], Config]:
    """Return `load_config` of a configuration as a function of its overrides. The files are read
    once: a search for the fastest layout asks for hundreds of lists of overrides.

    Raises:
        ValueError: a missing or malformed file; the function raises the other errors.
    """
    is_run = Path(path).is_dir() and str(path) not in shipped_names()
    given = OmegaConf.create(run_values(Path(path))) if is_run else _read(find_config(path), ())
    written = pickle.dumps(given)  # read back in a tenth of the time that a deep copy takes

    def load(overrides: Sequence[str]) -> Config:
        merged = pickle.loads(written)
        for word in overrides:
            _override(merged, word)
        try:
            plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ValueError(f"{path}: {error}") from None
        model = parse_config(plain, str(path))
        check_rules(model, trains=trains)
        return model

    return load


def run_values(directory: Path) -> dict[str, Any]:
    """Read the configuration with which a run was last started, as given.

    Raises:
        ValueError: the directory is no run's, or that of a run of spmdrl 0.1, which wrote none.
    """
    given = last_start(directory).get("config")
    if not isinstance(given, dict):
        raise ValueError(f"{directory / RUN_FILE} has no configuration of a start")
    return {**given, "run_dir": str(directory)}


def last_start(directory: Path) -> dict[str, Any]:
    """Read what a run's last start wrote about itself.

    Raises:
        ValueError: see `run_values`.
    """
    file = directory / RUN_FILE
    if not file.is_file():
        raise ValueError(
            f"{directory} is a directory without {RUN_FILE}: name the configuration that its run "
            "was started with, and run_dir as it was"
        )
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["starts"][-1])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{file} has no configuration of a start: {error!r}") from None


def parse_config(values: Any, origin: str) -> Config:
    """Make a `Config` of nested dicts; ConfigError lists every bad key with a suggestion."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_faults(error, values, Place()), origin) from None
    if faults := _inherited_faults(config):
        raise ConfigError(faults, origin)
    return config


@dataclass(frozen=True, kw_only=True)
class Place:
    """Place of a mapping whose keys change those of a section.

    Args:
        where: what a message calls it; "" for the whole configuration.
        section: the section whose keys it has; "" for its own.
        inner: key of the mapping within `where`; "" if that is the mapping.
    """

    where: str = ""
    section: str = ""
    inner: str = ""

    def key(self, name: str) -> str:
        return ".".join(part for part in (self.where, self.inner, name) if part)


def _inherited_faults(config: Config) -> list[Fault]:
    """Bad keys of all mappings that override a section."""
    faults = []
    for name, role in config.roles.items():
        place = Place(where=f"roles.{name}.train", section="train")
        faults += _made(place, role.train, partial(config.train_section, name))
    for number, entry in enumerate(config.data.mix):
        place = Place(where=f"data.mix.{number}", section="data.train")
        found = _made(place, entry, partial(mixed_source, config, entry))
        where = f"data.mix.{number}"
        faults += found or _faults_of_turns(config, where, mixed_source(config, entry))
    faults += _faults_of_turns(config, "data.train", config.data.train)
    place = Place(where="evaluation", section="sampling", inner="sampling")
    if found := _made(place, config.evaluation.sampling, lambda: set_sampling(config, {})):
        return faults + found  # every set has them
    for name, given in described_sets(config).items():
        faults += _faults_of_set(config, f"evaluation.sets.{name}", given)
    return faults


def _faults_of_turns(config: Config, key: str, source: PromptsSection) -> list[Fault]:
    place = Place(where=f"{key}.turns", section="rollout.turns")
    return _made(place, source.turns, lambda: turns_of(config, source))


def _faults_of_set(config: Config, where: str, given: Mapping[str, Any]) -> list[Fault]:
    data, sampling = given.get("data", {}), given.get("sampling", {})
    place = Place(where=where, section="data.train", inner="data")
    found = _made(place, data, lambda: set_data(config, given))
    own = None if found else set_data(config, given)
    found += [] if own is None else _faults_of_turns(config, f"{where}.data", own)
    place = Place(where=where, section="sampling", inner="sampling")
    found += _made(place, sampling, lambda: set_sampling(config, given))
    place = Place(where=where, section="evaluation")
    return found or _made(place, given, lambda: held_out_set(config, given))


def _made(place: Place, values: Any, make: Callable[[], object]) -> list[Fault]:
    """Bad keys of a mapping, found by making the section that it changes."""
    try:
        make()
    except ValidationError as error:
        return _faults(error, values, place)
    return []


def _faults(error: ValidationError, values: Any, place: Place) -> list[Fault]:
    """One fault per bad key."""
    problems: dict[str, list[Any]] = {}
    for detail in error.errors():
        problems.setdefault(_key_of(detail, values), []).append(detail)
    return [_fault(place, *item) for item in problems.items()]


def _read(path: Path, chain: tuple[Path, ...]) -> DictConfig:
    path = path.resolve()
    if path in chain:
        raise ValueError(f"{path} includes itself: {' -> '.join(map(str, (*chain, path)))}")
    try:
        content = OmegaConf.create(substitute(path.read_text(encoding="utf-8"), str(path)))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path}: the file must hold `key: value` lines at its top level")
    includes = content.pop("includes", OmegaConf.create([]))
    if not isinstance(includes, ListConfig):
        raise ValueError(f"{path}: includes={includes!r} must be a list of files")
    chain = (*chain, path)
    parts = [_read(find_config(str(name), included_by=path), chain) for name in includes]
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
    text = substitute(text, f"override {word!r}")
    try:
        # update also reaches into lists (rewards.0.weight)
        OmegaConf.update(config, key, copy.deepcopy(_typed(text)), merge=True)
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"override {word!r}: {error}") from None


@lru_cache(maxsize=1024)
def _typed(text: str) -> Any:
    """The value of an override, with YAML's types."""
    return OmegaConf.from_dotlist([f"value={text}"])["value"]


def substitute(text: str, origin: str) -> str:
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
    if detail["type"] in ("missing", "value_error"):
        return ".".join(map(str, detail["loc"]))
    parts: list[str] = []
    for part in detail["loc"]:
        if not (part in values if isinstance(values, dict) else isinstance(part, int)):
            break
        parts.append(str(part))
        values = values[part]
    return ".".join(parts)


def _fault(place: Place, name: str, details: Sequence[Mapping[str, Any]]) -> Fault:
    """Fault of one key; pydantic gives one detail for each choice of a union."""
    key = f"{place.section}.{name}" if place.section else name
    kind, value = details[0]["type"], details[0]["input"]
    if kind == "extra_forbidden" and (new := new_name(place.key(name))) is not None:
        fix = f"`spmdrl migrate CONFIG` renames it in the file, or write {new}"
        message = f"{place.key(name)} is now {new}: {fix}"
    elif kind == "extra_forbidden":
        fix = _suggestion(key)
        message = f"unknown key {key!r}; {fix}"
    elif kind == "missing":
        message, fix, value = f"the key {key!r} is required", f"add {key}", None
    elif kind == "value_error" and isinstance(value, dict):
        # a rule of the section, which names its keys itself
        read = read_fault(f"{key.rstrip('.')}.{_message(details[0])}")
        message, fix, value = read.message, read.fix, read.value
        name = read.key.removeprefix(place.section and f"{place.section}.")
    elif kind == "tuple_type" and isinstance(value, str | int | float):
        fix = f"write {key}=[{value}]"
        message = f"{key}={value!r}: the key takes a list: {fix}"
    else:
        fix = " or: ".join(map(_message, details))
        message = f"{key}={value!r}: {fix}"
    where = place.where and f"{place.where}: "
    return Fault(key=place.key(name), value=value, message=f"{where}{message}", fix=fix)


def _message(detail: Mapping[str, Any]) -> str:
    own = detail["type"] == "value_error"  # pydantic's text of it begins with its type
    return str(detail["ctx"]["error"] if own else detail["msg"])


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
        return f"did you mean {'.'.join([*parts[:-1], near[0]])!r}?"
    near = [k for k in known if k.split(".")[-1] == parts[-1]]
    if near:
        return f"did you mean {near[0]!r}?"
    return f"the keys there are {', '.join(sorted(neighbours))}"
