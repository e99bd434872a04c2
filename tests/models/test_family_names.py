"""Code knows of a family through its file only: no other module has its names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import spmdrl
from spmdrl.models.family import families

SOURCE = Path(spmdrl.__file__).parent
FAMILIES = SOURCE / "models" / "families"

ELSEWHERE = {
    # a model that stands for all, on which something is tried
    SOURCE / "planning" / "support.py",
    SOURCE / "testing" / "cases.py",
    # formats of tool calls, which templates of several families share
    SOURCE / "turns" / "tool_calls.py",
    SOURCE / "turns" / "kinds.py",
}


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield the strings of a module that are no docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield node.value


def named(path: Path) -> list[str]:
    names = "|".join(f"{own.architecture}|{own.model_type}" for own in families().values())
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [text for text in texts(tree) if re.search(rf"\b({names})\b", text)]


def test_no_module_but_a_familys_own_names_it() -> None:
    # GGUF's architectures and tokenizers have llama.cpp's names, some of which are families'
    others = [
        path
        for path in SOURCE.rglob("*.py")
        if path.parent != FAMILIES and not path.name.startswith("gguf_") and path not in ELSEWHERE
    ]
    assert all(map(named, ELSEWHERE))
    assert {path: found for path in others if (found := named(path))} == {}
    assert named(SOURCE / "models" / "files" / "gguf_architectures.py")
    assert all(named(path) for path in FAMILIES.glob("[a-z]*.py"))
