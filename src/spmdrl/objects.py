"""Objects that a configuration names: `module:name`, or `path/to/file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any


def load_object(where: str) -> Any:
    """What `module:name` or `path/to/file.py:name` names.

    Raises:
        ValueError: no such module, file or name.
    """
    place, colon, name = where.rpartition(":")
    if not colon:
        raise ValueError(f"{where!r}: write it as module:name or path/to/file.py:name")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None or not Path(place).is_file():
            raise ValueError(f"{where!r}: there is no file {Path(place).absolute()}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(f"{where!r}: {error}") from None
    if name not in vars(module):
        raise ValueError(f"{where!r}: {place} has no {name!r}")
    return vars(module)[name]
