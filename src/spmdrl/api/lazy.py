"""Names of a public module that are looked up when they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any


def places(names: Mapping[str, str]) -> Mapping[str, str]:
    """Return each name's module.

    Args:
        names: module -> its names, with blanks between them.
    """
    return MappingProxyType(
        {name: module for module, listed in names.items() for name in listed.split()}
    )


def getter(face: str, found: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a public module.

    Args:
        face: the public module.
        found: name -> its module in this package.
    """

    def get(name: str) -> Any:
        if name not in found:
            raise AttributeError(f"{face} has no {name!r}")
        return getattr(import_module(f"spmdrl.{found[name]}"), name)

    return get
