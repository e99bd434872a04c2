"""Signatures of the names in `spmdrl.api` and its `backends`, as text read from their source.

    PYTHONPATH=src python tests/api_signatures.py     # rewrites tests/api_signatures.txt

Functions and public methods stand with their parameters and annotations, dataclasses with their
fields, constants and type aliases with their values. A role's methods stand with what they return
under `.on`; called directly they return the result inside `Call[...]`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from spmdrl import api
from spmdrl.api import backends

FILE = Path(__file__).with_suffix(".txt")

FACES = (api, backends)

SPECIAL = ("__init__", "__call__", "__getitem__", "__contains__", "__len__", "__or__")

HANDLES = ("Policy", "Reference", "Reward", "Value", "Rollout", "CustomRole")
"""Roles: a flow gets them from the run, so only their methods and these attributes count."""

HANDLE_ATTRIBUTES = ("name", "version")

GIVEN = (*HANDLES, "Run", "StepRows", "ItemSet")
"""Classes that a user does not make, so their `__init__` does not count."""

SECTIONS = "Section"
"""Base of the configuration's sections, whose fields `docs/configuration.md` pins."""


def text() -> str:
    """The whole file: one paragraph per name, in alphabetical order."""
    places = {name: module for face in FACES for name, module in face._PLACES.items()}
    return "\n\n".join("\n".join(lines_of(places[name], name)) for name in sorted(places)) + "\n"


def lines_of(module: str, name: str) -> Iterator[str]:
    node = definition(module, name)
    if isinstance(node, ast.FunctionDef):
        yield signature(node)
    elif isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        yield f"class {name}({bases})" if bases else f"class {name}"
        yield from (f"    {line}" for line in members(node))
    else:
        yield ast.unparse(node)


def definition(module: str, name: str) -> ast.stmt:
    """The statement of a module that defines a name."""
    spec = find_spec(f"spmdrl.{module}")
    assert spec is not None and spec.origin is not None, module
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
        if isinstance(node, ast.Assign) and name in names_in(node.targets[0]):
            return node
    raise AssertionError(f"{module} does not define {name}: name the module that does")


def names_in(target: ast.expr) -> list[str]:
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]


def signature(node: ast.FunctionDef) -> str:
    result = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    arguments = ast.unparse(node.args).removeprefix("self, ").removeprefix("self")
    return f"{node.name}({arguments}){result}"


def members(owner: ast.ClassDef) -> Iterator[str]:
    """Fields, attributes and methods that are public."""
    functions = {node.name: node for node in owner.body if isinstance(node, ast.FunctionDef)}
    is_section = SECTIONS in [ast.unparse(base) for base in owner.bases]
    for node in owner.body:
        if isinstance(node, ast.AnnAssign | ast.Assign) and not is_section:
            yield ast.unparse(node)
    yield from attributes(owner.name, functions)
    for name, node in functions.items():
        is_known = name in SPECIAL and not (name == "__init__" and owner.name in GIVEN)
        if name.startswith("_") and not is_known:
            continue
        marks = [ast.unparse(mark) for mark in node.decorator_list]
        yield "".join(f"@{mark} " for mark in marks) + signature(node)


def attributes(owner: str, functions: dict[str, ast.FunctionDef]) -> Iterator[str]:
    """Attributes that `__init__` sets."""
    plain = set()
    for name in assigned(functions["__init__"]) if "__init__" in functions else ():
        if owner not in HANDLES or name in HANDLE_ATTRIBUTES:
            plain.add(name)
    if plain:
        yield f"attributes: {', '.join(sorted(plain))}"


def assigned(function: ast.FunctionDef) -> Iterator[str]:
    """Public attributes of `self` that a function sets."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            parts = [p for t in targets for p in (t.elts if isinstance(t, ast.Tuple) else [t])]
            for part in parts:
                own = isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self"
                if own and not part.attr.startswith("_"):
                    yield part.attr


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
