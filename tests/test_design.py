"""The design's map and walks, and the tour of CONTRIBUTING, name what exists in the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_imports import LEVELS, SOURCE

ROOT = SOURCE.parents[1]
DESIGN, TOUR = ROOT / "docs" / "design.md", ROOT / "CONTRIBUTING.md"

WALKS = [
    (DESIGN, "One GRPO step"),
    (DESIGN, "A weight, from optimizer to engine"),
    (TOUR, "A tour of the code in ten minutes"),
]
"""Pages and sections whose numbered steps are looked up."""


PAGES = [ROOT / "README.md", TOUR, *sorted((ROOT / "docs").glob("*.md"))]


def section(page: Path, title: str) -> str:
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, f"{page.name} has no section {title!r}"
    return found[1]


def walk(page: Path, title: str) -> list[str]:
    """The numbered steps of a section, each with its continued lines."""
    return re.findall(r"^\d+\. (.*?)(?=^\d+\. |^\n|\Z)", section(page, title) + "\n", re.M | re.S)


def files_of(step: str) -> list[str]:
    return re.findall(r"`([\w/]+\.py)`", step)


def names_of(step: str) -> list[str]:
    """The functions, classes and attributes that a step names in backticks."""
    return [n for n in re.findall(r"`([A-Za-z_][\w.]*)`", step) if not n.endswith(".py")]


def defined(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Functions, classes and attributes of a module or class, those set on `self` included."""
    for node in body:
        match node:
            case ast.FunctionDef(name=name):
                yield prefix + name
                if prefix:
                    for inner in ast.walk(node):
                        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                            yield prefix + inner.attr
            case ast.ClassDef(name=name):
                yield prefix + name
                yield from defined(node.body, f"{prefix}{name}.")
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name


def missing(step: str) -> list[str]:
    """The files that a step names and the package lacks, and names that none of them defines."""
    paths = [SOURCE / name for name in files_of(step)]
    lost = [str(path.relative_to(SOURCE)) for path in paths if not path.is_file()]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    known = {name for tree in trees for name in defined(tree.body)}
    return lost + [name for name in names_of(step) if name not in known]


@pytest.mark.parametrize(("page", "title"), WALKS, ids=[title for _, title in WALKS])
def test_each_step_of_a_walk_is_found_in_its_file(page: Path, title: str) -> None:
    steps = walk(page, title)
    assert len(steps) >= 5
    assert [step for step in steps if not files_of(step) or not names_of(step)] == []
    assert {step: lost for step in steps if (lost := missing(step))} == {}


def test_the_map_names_every_room_on_its_level() -> None:
    tree = re.search(r"^```text\n(.*?)^```", section(DESIGN, "The map"), re.M | re.S)
    assert tree
    number, levels, inner = 0, {}, []
    for line in tree[1].splitlines():
        found = re.match(r"(\d+)?\s*([\w/]+)  +\S", line)
        assert found, line
        number = int(found[1] or number)
        name = found[2].rstrip("/")
        if name == "run/assembly" or "/" not in name:
            levels.setdefault(number, set()).add(name.replace("/", "."))
        else:
            inner.append(name)
    assert levels == {i: rooms - {"__main__"} for i, rooms in enumerate(LEVELS, start=1)}
    packages = {str(p.parent.relative_to(SOURCE)) for p in SOURCE.rglob("*/__init__.py")}
    loose = {p.stem for p in SOURCE.glob("*.py") if not p.stem.startswith("__")}
    named = {name.replace(".", "/") for rooms in levels.values() for name in rooms}
    assert sorted([*named, *inner]) == sorted(packages | loose)


def test_the_picture_has_the_levels_of_the_imports() -> None:
    text = (ROOT / "docs" / "architecture.txt").read_text(encoding="utf-8").split("\n\n")[0]
    lines = [re.findall(r"\d+-\d+ ([\w.]+)", line) for line in text.splitlines()[1:]]
    assert [set(line) for line in reversed(lines)] == [rooms - {"__main__"} for rooms in LEVELS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:[\w.]+/)+[\w]+\.(?:py|sh|sbatch|yaml|txt|md))`", text)
    places = (ROOT, SOURCE)
    assert [name for name in named if not any((place / name).is_file() for place in places)] == []


@pytest.mark.parametrize("name", ["design.md", "weight-sync.md", "packing.md"])
def test_modules_that_a_page_names_exist(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    rooms = "|".join(path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file())
    named = re.findall(rf"`((?:{rooms})/[a-z_/]*[a-z_])(?:\.(\w+))?`", text)
    assert named
    assert [(module, name) for module, name in named if not has(SOURCE / module, name)] == []


def test_names_that_a_page_places_in_a_file_are_there() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    placed = re.findall(r"`([A-Za-z_][\w.]*)`\s(?:in|of|\()\s?`([\w/]+)\.py`", text)
    assert len(placed) > 5
    inside = [pair for pair in placed if (SOURCE / f"{pair[1]}.py").is_file()]
    assert [(name, file) for name, file in inside if not has(SOURCE / file, name)] == []


def has(module: Path, name: str) -> bool:
    """Whether a module or package exists, and defines the name if there is one."""
    file = module.with_suffix(".py")
    if not file.is_file():
        return module.is_dir() and not name
    known = set(defined(ast.parse(file.read_text(encoding="utf-8")).body))
    return name in ("", "py") or name in known


def test_a_step_with_a_lost_name_is_seen() -> None:
    step = "`roles/calls.py`: `together` and `Call.uses`, `Call.gone`, `elsewhere`; `gone.py`"
    assert missing(step) == ["gone.py", "Call.gone", "elsewhere"]
    assert missing("`roles/generation_rows.py`: `run_generation`, `Generation.seed`") == []
