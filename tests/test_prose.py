"""Plain English: docstrings open with a verb or a noun, and `Args` say what a value is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "spmdrl"
OPENING = re.compile(r"(Of|What|How|Which|Where|Who|From|For|With|As|In|By|To)\b")
ARGUMENT = re.compile(r"^\s+\w+: of ", re.MULTILINE)


def fragments(source: str) -> list[tuple[int, str]]:
    """Lines and openings of the docstrings (those of attributes too) that are fragments."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                if OPENING.match(text.strip()) or ARGUMENT.search(text):
                    found.append((node.lineno, text.strip()[:70]))
    return found


def test_docstrings_open_with_a_verb_or_a_noun() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert files
    found = {str(file.relative_to(SOURCE)): fragments(file.read_text()) for file in files}
    assert not {file: lines for file, lines in found.items() if lines}


def test_the_lint_sees_a_fragment() -> None:
    source = '"""Of a role."""\ndef f(x):\n    """Cut.\n\n    Args:\n        x: of rows.\n    """\n'
    assert sorted(line for line, _ in fragments(source)) == [1, 3]
    assert not fragments('"""Tokens of a role."""\nx = 1\n"""Rows per rank."""\n')
