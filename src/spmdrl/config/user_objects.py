"""Objects that a configuration names, `module:name` or `path/to/file.py:name`, and the errors that
they raise: printed by one rank, with only the frames of the user's own code.
"""

from __future__ import annotations

import ast
import difflib
import dis
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Protocol

MAX_STORY = 4000
"""Most characters of an error's text; the rest is cut off."""

_PACKAGE = f"{Path(__file__).resolve().parents[1]}/"


class AgreedError(ValueError):
    """Bad input on which every rank of the world raises the same error: rank 0 prints it."""


def own_story(error: BaseException) -> str:
    """Text of an error in a user's code: its type and message, the frames of that code, and the
    errors that caused it.

    Frames above the user's code, of this package and of imports, are left out.
    """
    return told(headline(error), error)


def told(text: str, error: BaseException) -> str:
    """`text`, which says what happened, followed by the place in the user's code."""
    parts = [text]
    seen: BaseException | None = error
    while seen is not None:
        parts += [f"from {headline(seen)}"] if seen is not error else []
        parts += [frame.rstrip("\n") for frame in own_frames(seen).format()]
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    story = "\n".join(parts)
    return story if len(story) <= MAX_STORY else f"{story[:MAX_STORY]} ..."


def headline(error: BaseException) -> str:
    """Type and message of an error, `KeyError: 'x'`; only the type if it has no message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def own_frames(error: BaseException) -> traceback.StackSummary:
    """Frames from the user's first one on; none if the error comes from this package."""
    frames: list[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    while frames and is_ours(frames[0]):
        frames = frames[1:]
    return traceback.StackSummary.from_list(frames)


def is_ours(frame: traceback.FrameSummary) -> bool:
    """Whether a frame is of this package or of an import."""
    name = frame.filename
    return name.startswith(("<frozen ", _PACKAGE)) or "/importlib/" in name


FILE = ".py"
"""Suffix of a place that is a file instead of a module."""

PACKAGE, FACE, PARTS = "spmdrl", "spmdrl.api", "spmdrl.api.backends"
"""This package, the module of it that users' files import, and the one for authors of backends."""


def load_object(where: str, key: str | None = None) -> Any:
    """Load the object that `module:name` or `path/to/file.py:name` names.

    Modules are searched in the working directory too. Two paths to one file give one module, which
    may import the modules next to it.

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
    if place.endswith(FILE) and not Path(place).is_file():
        raise ValueError(f"{what}: there is no file {Path(place).absolute()}")
    try:
        module = _load_file(Path(place).resolve()) if place.endswith(FILE) else _load_module(place)
    # A user's module may raise anything while it is imported; all of it means the same here.
    except Exception as error:
        text = f"{what}: {place} cannot be imported: "
        moved = _wrong_import(error)
        if moved is not None:
            raise ValueError(text + moved) from error
        raise ValueError(told(text + headline(error), error)) from error
    if not hasattr(module, name):
        near = _nearest(name, dir(module))
        other = f"it has {_own_names(module)}" if near is None else f"did you mean {near!r}?"
        raise ValueError(f"{what}: {place} has no {name!r}; {other}")
    return getattr(module, name)


def make_object(where: str, options: Mapping[str, Any], key: str, options_key: str) -> Any:
    """Make an object of the class that `where` names.

    Args:
        options: keyword arguments.
        key, options_key: the keys that give both, for errors.

    Raises:
        ValueError: it cannot be loaded, is no class, or cannot be made with these options.
    """
    kind = load_object(where, key)
    if not callable(kind):
        raise ValueError(f"{key}={where} is a {type(kind).__name__}: name a class")
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        raise ValueError(
            f"{key}={where} is made with {options_key}={dict(options)}: {error}"
        ) from None
    try:
        return kind(**options)
    # The user's own code may raise anything; whatever it is, the object cannot be made.
    except Exception as error:
        raise ValueError(told(f"{key}={where} cannot be made: {headline(error)}", error)) from error


def look_in_working_directory() -> None:
    """Let Python find modules in the working directory, after everywhere else."""
    _look_in(os.getcwd())


def _load_module(name: str) -> ModuleType:
    look_in_working_directory()
    return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    """Import a file, once: by its own name if that finds it, so that its neighbours can import it
    too, or else by one that no other file has.

    Raises:
        ImportError: it imports a neighbour whose name finds another file.
        Exception: whatever it raises while it is executed.
    """
    _look_in(str(path.parent))
    _check_neighbours(path)
    if path.stem.isidentifier() and _is_found(path.stem, path):
        return importlib.import_module(path.stem)
    number = blake2b(os.fsencode(path), digest_size=4).hexdigest()
    name = re.sub(r"\W", "_", f"{PACKAGE}_user_{path.stem}_{number}")  # pickle splits at points
    if name in sys.modules:
        return sys.modules[name]
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


def _check_neighbours(path: Path) -> None:
    """Raise ImportError if the file, or a neighbour that it imports, imports a neighbour by a name
    that finds another file: a module of Python, of a package, or near another file of the user's.
    """
    todo, seen = [path], {path}
    while todo:
        file = todo.pop()
        for name in sorted(_imported(file)):
            own = [path.parent / f"{name}{FILE}", path.parent / name / f"__init__{FILE}"]
            for neighbour in {p.resolve() for p in own if p.is_file()} - seen:
                if not _is_found(name, neighbour):
                    raise ImportError(
                        f"{file.name} imports {name!r}, which is {_origin(name)} here, and not "
                        f"{neighbour}: rename that file"
                    )
                seen.add(neighbour)
                todo.append(neighbour)


def _imported(file: Path) -> set[str]:
    """Top-level names of the modules that a file imports anywhere."""
    found: set[str] = set()
    # without `ast.parse`, whose frame an error would show
    tree = compile(file.read_bytes(), str(file), "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def _is_found(name: str, path: Path) -> bool:
    """Whether `import name` finds this file."""
    origin = _origin(name)
    return origin is not None and Path(origin).resolve() == path


def _origin(name: str) -> str | None:
    """File behind the module that `import name` finds; None if there is none."""
    module = sys.modules.get(name)
    if module is not None:
        file: str | None = vars(module).get("__file__")
        return file
    spec = importlib.util.find_spec(name)
    return None if spec is None else spec.origin


def _wrong_import(error: Exception) -> str | None:
    """Text on an import that asks this package for what it does not have, with the place in the
    user's file; None for other errors.
    """
    if not isinstance(error, ImportError) or (error.name or "").partition(".")[0] != PACKAGE:
        return None
    frames = own_frames(error)
    if frames and is_ours(frames[-1]):
        return None
    text = error.msg.partition(" (")[0]
    if frames:
        text += f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    if error.name not in (FACE, PARTS):
        return f"{text}: import it from {FACE}"
    wanted = re.search(r"import name '(\w+)'", error.msg)
    near = None if wanted is None else _nearest(wanted[1], dir(sys.modules[error.name]))
    return text if near is None else f"{text}; did you mean {near!r}?"


def _nearest(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.7)), None)


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


def source_digest(where: str) -> str:
    """Digest of the file that `path/to/file.py:name` names; "" for anything else."""
    place = where.rpartition(":")[0]
    if not place.endswith(FILE):
        return ""
    return blake2b(Path(place).read_bytes(), digest_size=16).hexdigest()


def _look_in(directory: str) -> None:
    if directory not in sys.path:
        sys.path.append(directory)
    importlib.invalidate_caches()  # a file may be newer than the last look into its folder
