"""Objects that a configuration names: `module:name`, or `path/to/file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

FILE = ".py"
"""The end of a place that is a file, not a module."""


def load_object(where: str) -> Any:
    """What `module:name` or `path/to/file.py:name` names.

    Raises:
        ValueError: no such module, file or name.
    """
    place, colon, name = where.rpartition(":")
    if not colon:
        raise ValueError(f"{where!r}: write it as module:name or path/to/file.py:name")
    try:
        module = load_module(place)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise ValueError(f"{where!r}: {error}") from None
    if name not in vars(module):
        raise ValueError(f"{where!r}: {place} has no {name!r}")
    return vars(module)[name]


def load_module(place: str) -> ModuleType:
    """The module of that name, the working directory's too, or that file as a module.

    A file that is named twice, by whatever path, is one module.

    Raises:
        FileNotFoundError, ModuleNotFoundError: there is none.
        Exception: whatever the module raises while it is executed.
    """
    if not place.endswith(FILE):
        _look_in(os.getcwd())
        return importlib.import_module(place)
    path = Path(place).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    number = blake2b(os.fsencode(path), digest_size=4).hexdigest()
    name = f"spmdrl_user_{path.stem}_{number}"
    if name in sys.modules:
        return sys.modules[name]
    _look_in(str(path.parent))  # for its neighbours
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look it up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def source_digest(where: str) -> str:
    """Of the file that `path/to/file.py:name` names; "" for anything else."""
    place = where.rpartition(":")[0]
    if not place.endswith(FILE):
        return ""
    return blake2b(Path(place).read_bytes(), digest_size=16).hexdigest()


def _look_in(directory: str) -> None:
    if directory not in sys.path:
        sys.path.append(directory)
