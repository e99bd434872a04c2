"""The rooms' dependency direction (the map in docs/design.md), read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "spmdrl"

LEVELS: list[set[str]] = [
    {"config", "memory", "batch", "world", "keyed_random", "atomic_files", "sandbox"},
    {"distributed", "algorithms", "rehearsal"},
    {"models", "supervision", "observe", "placement"},
    {"role_spec"},
    {"training", "rollout", "weights", "data"},
    {"roles"},
    {"planning", "checkpoint", "rewards", "turns"},
    {"evaluation", "verification"},
    {"run"},
    {"flows"},
    {"run.assembly"},
    {"commands", "api", "testing", "__main__"},
]
"""A room imports from lower levels only, and from its own level where it does not stand apart."""

APART = {"training", "rollout", "weights", "algorithms", "models", "config", "memory", "batch"}

ONE_FILE = ("vllm", "flash_attn", "deepspeed", "fla", "wandb", "mlflow", "trackio", "textarena")
"""Imported in one file each, and there inside a function: they are optional."""

MEGATRON, LIGHT = "spmdrl.training.megatron", "spmdrl.training.megatron.checks"
"""The package that imports megatron-core, and its one module that does not."""


TRITON = SOURCE / "models" / "kernels" / "cuda"
"""The package of kernels in Triton, which spmdrl does not need; its `language.py` imports it."""


def files() -> list[Path]:
    return sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[ast.stmt, str]]:
    """Every import statement with each absolute module that it may name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node, f"{module}.{alias.name}"


def package_of(path: Path) -> list[str]:
    return ["spmdrl", *path.relative_to(SOURCE).parent.parts]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(path: Path) -> list[tuple[ast.stmt, str]]:
    return list(imports(tree_of(path), package_of(path)))


def room(parts: Sequence[str]) -> str:
    """The package or module of a path within the project; `run.assembly` stands above the flows."""
    return "run.assembly" if list(parts[:2]) == ["run", "assembly"] else parts[0]


def room_of(path: Path) -> str:
    return room(path.relative_to(SOURCE).with_suffix("").parts)


def rooms_imported(found: Iterable[tuple[ast.stmt, str]]) -> set[str]:
    names = [name.split(".") for _, name in found]
    return {room(parts[1:]) for parts in names if parts[0] == "spmdrl" and len(parts) > 1}


def level(name: str) -> int:
    found = [i for i, rooms in enumerate(LEVELS) if name in rooms]
    assert found, f"{name!r} is in no level: add it to LEVELS, and to docs/design.md"
    return found[0]


def allowed(name: str, other: str) -> bool:
    if name == other:
        return True
    if level(other) == level(name):
        return name not in APART
    return level(other) < level(name)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_room_imports_only_what_lies_below(path: Path) -> None:
    name = room_of(path)
    found = rooms_imported(imports_of(path))
    assert sorted(other for other in found if not allowed(name, other)) == []


def test_rooms_form_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in files():
        found = rooms_imported(imports_of(path))
        graph.setdefault(room_of(path), set()).update(found - {room_of(path)})
    while graph:
        leaves = [name for name, others in graph.items() if not others & graph.keys()]
        assert leaves, f"import cycle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


@pytest.mark.parametrize("name", ONE_FILE)
def test_an_optional_package_has_one_file_and_is_imported_late(name: str) -> None:
    users = []
    for path in files():
        found = [node for node, full in imports_of(path) if full.split(".")[0] == name]
        if not found:
            continue
        users.append(path.relative_to(SOURCE))
        functions = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.FunctionDef)]
        late = {node for function in functions for node in ast.walk(function)}
        assert late.issuperset(found), f"{path} imports {name} at module level"
    assert len(users) <= 1, users


def test_megatron_is_imported_in_its_package_alone_and_that_is_imported_late() -> None:
    for path in files():
        tree, found = tree_of(path), imports_of(path)
        inside = path.parent == SOURCE / "training" / "megatron"
        users = [node for node, full in found if full.split(".")[0] == "megatron"]
        assert inside or not users, f"{path} imports megatron"
        if inside and path.stem != "checks":
            continue
        assert not users, f"{path} imports megatron: those who only check would need it"
        at_start = {node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
        for node, full in found:
            if full.startswith(MEGATRON) and not full.startswith(LIGHT):
                assert node not in at_start, f"{path} imports {full} at module level"


def test_triton_is_imported_in_one_package_and_that_is_imported_late() -> None:
    for path in files():
        inside, found = path.parent == TRITON, imports_of(path)
        users = [node for node, full in found if full.split(".")[0] == "triton"]
        assert not users or path == TRITON / "language.py", f"{path} imports triton"
        own = f"spmdrl.{'.'.join(TRITON.relative_to(SOURCE).parts)}"
        at_start = {n for n in tree_of(path).body if isinstance(n, ast.Import | ast.ImportFrom)}
        for node, full in found:
            if full.startswith(own) and (not inside or path.stem == "__init__"):
                assert node not in at_start, f"{path} imports {full} at module level"


def test_relative_and_absolute_imports_are_both_seen() -> None:
    text = (
        "import spmdrl.run.assembly.factories\nfrom spmdrl import commands\n"
        "import spmdrl.run.run\n"
        "from ..weights.plan import key\nfrom . import sampling\n"
        "from ...keyed_random import key64\ndef f():\n    from ... import roles\n"
    )
    found = rooms_imported(imports(ast.parse(text), ["spmdrl", "rollout", "native"]))
    assert found == {"run.assembly", "run", "commands", "rollout", "keyed_random", "roles"}
    assert rooms_imported(imports(ast.parse(text), ["spmdrl", "rollout"])) >= {"weights"}
    assert not allowed("training", "rollout")
    assert not allowed("distributed", "models")
    assert allowed("evaluation", "roles")


def test_light_modules_do_not_import_torch() -> None:
    """Reward workers start from a server that has neither torch nor CUDA in it."""
    modules = [
        "spmdrl",
        "spmdrl.api.backends",
        *(f"spmdrl.rewards.{m}" for m in ("server", "process", "functions")),
        "spmdrl.turns.serving",
    ]
    code = f"import sys\nimport {', '.join(modules)}\nprint('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("False\n", "")
