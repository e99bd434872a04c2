"""Plain English: docstrings open with a verb or a noun, and `Args` say what a value is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "spmdrl"
DONE: list[str] = [
    "algorithms",
    "checkpoint",
    "data",
    "distributed",
    "evaluation",
    "flows",
    "memory",
    "models",
    "observe",
    "rewards",
    "rollout",
    "runtime",
    "training",
    "weights",
    "__main__.py",
    "amounts.py",
    "assemble.py",
    "batch.py",
    "calls.py",
    "canary.py",
    "cli.py",
    "config.py",
    "config_algorithms.py",
    "config_data.py",
    "config_doubts.py",
    "config_files.py",
    "config_keys.py",
    "config_rules.py",
    "config_sets.py",
    "config_uses.py",
    "custom_role.py",
    "doctor.py",
    "engines.py",
    "errors.py",
    "explain.py",
    "files.py",
    "generation.py",
    "kept.py",
    "keyed.py",
    "launch.py",
    "launcher.py",
    "launcher_signals.py",
    "ledger.py",
    "memory_report.py",
    "objects.py",
    "origin.py",
    "passes.py",
    "placement.py",
    "policy_sync.py",
    "ragged.py",
    "role_plan.py",
    "roles.py",
    "sharing.py",
    "step_calls.py",
    "step_sizes.py",
    "storages.py",
    "working_memory.py",
]  # packages, and loose modules with their ".py"

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


@pytest.mark.parametrize("name", DONE)
def test_docstrings_open_with_a_verb_or_a_noun(name: str) -> None:
    files = [SOURCE / name] if name.endswith(".py") else sorted((SOURCE / name).rglob("*.py"))
    assert files, name
    found = {str(file.relative_to(SOURCE)): fragments(file.read_text()) for file in files}
    assert not {file: lines for file, lines in found.items() if lines}


def test_the_lint_sees_a_fragment() -> None:
    source = '"""Of a role."""\ndef f(x):\n    """Cut.\n\n    Args:\n        x: of rows.\n    """\n'
    assert sorted(line for line, _ in fragments(source)) == [1, 3]
    assert not fragments('"""Tokens of a role."""\nx = 1\n"""Rows per rank."""\n')
