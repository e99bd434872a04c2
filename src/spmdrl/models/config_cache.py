"""Values of configurations kept between processes: `transformers` takes 2 s to import, which a plan
needs for nothing else.

They lie in the user's cache directory, one file for a config.json, under a name with a hash of it,
of the version of `transformers` and of the code that reads it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spmdrl.atomic_files import replace_file
from spmdrl.models.kernels.c_code import cache_directory

log = logging.getLogger(__name__)

_READER = Path(__file__).with_name("config_reading.py")


def kept(
    model_type: str, source: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Return what `make` returns for a config.json, from the cache if it has one.

    Nothing is kept of a configuration that `make` refuses, without a cache directory, and with a
    version of `transformers` that is still changing.
    """
    reader = _reader()
    if reader is None:
        return make()
    name = hashlib.sha256(repr((reader, model_type, source)).encode()).hexdigest()[:32]
    try:
        file = cache_directory("configs") / f"{name}.txt"
        if file.exists():
            return dict(ast.literal_eval(file.read_text(encoding="utf-8")))
    except OSError as error:
        log.info("configurations are read anew: %s", error)
        return make()
    values = make()
    text = repr(dict(values))
    if _is_whole(text, values):
        _write(file, text)
    return values


def _is_whole(text: str, values: Mapping[str, Any]) -> bool:
    """Whether a text is all of the values: an object in them would be lost."""
    try:
        return bool(ast.literal_eval(text) == values)
    except (ValueError, SyntaxError):
        return False


def _write(file: Path, text: str) -> None:
    try:
        replace_file(file, text.encode(), lasting=False)
    except OSError as error:  # a full disk, or another rank that wrote the same
        log.info("%s is not kept: %s", file, error)


@functools.cache
def _reader() -> str | None:
    """Name what reads configurations; None if that may change under the same name."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        return None
    if "dev" in found:
        return None
    return f"{found} {hashlib.sha256(_READER.read_bytes()).hexdigest()}"
