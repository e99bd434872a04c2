"""Objects that a configuration names: `module:name`, or `path/to/file.py:name`."""

from __future__ import annotations

import dis
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Protocol

from spmdrl.config.user_errors import headline, told

FILE = ".py"
"""Suffix of a place that is a file instead of a module."""


def load_object(where: str, key: str | None = None) -> Any:
    """Load the object that `module:name` or `path/to/file.py:name` names.

    Args:
        key: key of the configuration, for messages.

    Raises:
        ValueError: no such module, file or name, or an error while the module was imported (then
            chained).
    """
    what = repr(where) if key is None else f"{key}={where}"
    place, colon, name = where.rpartition(":")
    if not colon:
        raise ValueError(f"{what}: write it as module:name or path/to/file.py:name")
    try:
        module = load_module(place)
    # A user's module may raise anything while it is imported; all of it means the same here.
    except Exception as error:
        text = f"{what}: {place} cannot be imported: {headline(error)}"
        raise ValueError(told(text, error)) from error
    if name not in vars(module):
        raise ValueError(f"{what}: {place} has no {name!r}; it has {_own_names(module)}")
    return vars(module)[name]


def _own_names(module: ModuleType) -> list[str]:
    """The functions and classes that a module defines."""
    return [
        name
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


def misfit(function: Callable[..., Any], arguments: Sequence[str]) -> str | None:
    """Reason why a call with these positional arguments would fail, to follow the function's name;
    None: its signature accepts them.
    """
    if inspect.iscoroutinefunction(function):
        return "is `async`, and nobody awaits it: write `def`"
    if inspect.isgeneratorfunction(function):
        return "has a `yield`, so that a call of it runs nothing: return what it makes"
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # some functions of C libraries have no signature
        return None
    try:
        signature.bind(*arguments)
    except TypeError as error:
        given = ", ".join(arguments)
        return f"takes {signature}, but is called with ({given}): {error}"
    return None


def lacks(
    part: Any,
    methods: Mapping[str, Sequence[str]],
    optional: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> str | None:
    """Find the first method that a class or object lacks, in words to follow its name.

    Args:
        methods: name -> the positional arguments of a call.
        optional: methods that may be absent.

    Returns:
        None if it has all of them and they take these arguments.
    """
    owner = part if inspect.isclass(part) else type(part)
    for name, arguments in {**methods, **optional}.items():
        call = f"{name}({', '.join(arguments)})"
        if name not in dir(part) or _is_stub(owner, name):
            if name in optional or (part is owner and _is_found_later(owner, name)):
                continue
            return f"has no {name!r}: add {call}"
        method = getattr(part, name)
        if not callable(method):
            return f"has {name!r}, but it is no function: make it {call}"
        static = inspect.getattr_static(part, name)
        is_bound = part is not owner or isinstance(static, staticmethod | classmethod)
        wrong = misfit(method, arguments if is_bound else ["self", *arguments])
        if wrong is not None:
            return f"cannot be used, as its {name!r} {wrong}"
    # set by ABCMeta, only on abstract classes
    abstract = sorted(vars(owner)["__abstractmethods__"]) if inspect.isabstract(owner) else []
    return f"is abstract: add {', '.join(abstract)}" if abstract else None


def may_have(owner: type, name: str) -> bool:
    """Whether an object of a class may have an attribute."""
    return name in dir(owner) or _is_found_later(owner, name)


def _is_found_later(owner: type, name: str) -> bool:
    """Whether a function of the class sets the attribute, or `__getattr__` may find it."""
    functions = [f for base in owner.__mro__ for f in vars(base).values() if inspect.isfunction(f)]
    code = [line for function in functions for line in dis.get_instructions(function)]
    is_set = any(line.opname == "STORE_ATTR" and line.argval == name for line in code)
    return is_set or "__getattr__" in dir(owner)


def _is_stub(owner: type, name: str) -> bool:
    """Whether a method is inherited from a protocol, and so does nothing."""
    holder = next((base for base in owner.__mro__ if name in vars(base)), None)
    return holder is not None and Protocol in holder.__bases__


def load_module(place: str) -> ModuleType:
    """Import a module by name (the working directory is searched too) or a file as a module.

    A file is imported once, whatever path names it.

    Raises:
        FileNotFoundError, ModuleNotFoundError: it does not exist.
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
    """Digest of the file that `path/to/file.py:name` names; "" for anything else."""
    place = where.rpartition(":")[0]
    if not place.endswith(FILE):
        return ""
    return blake2b(Path(place).read_bytes(), digest_size=16).hexdigest()


def _look_in(directory: str) -> None:
    if directory not in sys.path:
        sys.path.append(directory)
