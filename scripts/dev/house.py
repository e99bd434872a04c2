"""Figures of the house, as one JSON line: how many rooms and levels, how large files and functions
are, how far a reader of one GRPO step walks.

    python scripts/dev/house.py [--checkout DIR] [--traced]

`--traced` runs one GRPO step of a tiny model as well (some ten seconds) and counts the files that
it enters. A figure whose source does not exist in that checkout is null.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PACKAGE = "spmdrl"
NEW = ("api", "schema", "check", "migrate")
"""Modules that `statements_src` leaves out: they add what there was not before."""

FRAGMENT = re.compile(r"^(Of|What|How|Which|Where|Who|From|For|With|As|In|By|To)\b")
ARGUMENT = re.compile(r"^\s+\w+: of ", re.MULTILINE)

CLOSURE = """
import sys
import spmdrl.flows.grpo
print(len([name for name in sys.modules if name.split(".")[0] == "spmdrl"]))
"""

KEYS = """
from importlib import import_module as load
try:
    table = load("spmdrl.config.key_table")
except ImportError:
    table = load("spmdrl.config_keys")
basic = len(table.basic_keys()) if hasattr(table, "basic_keys") else "-"
print(len(table.known_keys()), basic)
"""

TRACED = """
import json, os, sys
from pathlib import Path
root = Path(sys.argv[1])
sys.path[:0] = [str(root / "tests")]
from flow_cases import write_config
from tiny_model import make_tiny_model
from spmdrl.rewards.server import start_reward_server
place = Path(sys.argv[2])
make_tiny_model(place / "model")
write_config(place / "c.yaml", place / "model", place / "run", steps=1)
entered, inside = set(), False
def note(frame, event, argument):
    global inside
    code = frame.f_code
    if code.co_name == "grpo" and code.co_filename.endswith("flows/grpo.py"):
        inside = event == "call"
    if inside and "/src/spmdrl/" in code.co_filename:
        entered.add(code.co_filename)
with start_reward_server() as server:
    try:
        from spmdrl.commands.train import train
        from spmdrl.config.load import load_config
        from spmdrl.world import start_world
    except ImportError:
        from spmdrl.config_files import load_config
        from spmdrl.flows.start import train
        from spmdrl.launch import start_world
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    world = start_world(timeout_s=60, device="cpu")
    sys.setprofile(note)
    train(load_config(str(place / "c.yaml")), world, server)
    sys.setprofile(None)
print(len(entered))
"""


def modules(source: Path) -> dict[str, tuple[Path, ast.Module]]:
    """Each module's dotted name, with its file and syntax tree."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(source).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path, ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(name: str, path: Path, tree: ast.Module, known: Mapping[str, Any]) -> set[str]:
    """The package's modules that a module imports, inside functions too."""
    base = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                found.add(whole if whole in known else module)
    return {other for other in found if other in known and other != name}


def room_of(name: str) -> str:
    """The package, or loose module, that a module lies in; `run.assembly` is a room of its own."""
    parts = name.split(".")[1:]
    return ".".join(parts[:2]) if parts[:2] == ["run", "assembly"] else (parts or [PACKAGE])[0]


def components(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Strongly connected components, each after those that it points to (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            cut = stack.index(node)
            found.append(set(stack[cut:]))
            del stack[cut:]

    sys.setrecursionlimit(10_000)
    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def depth(graph: Mapping[str, set[str]]) -> int:
    """Nodes on the longest way through the graph, a circle counting as one."""
    parts = components(graph)
    of = {node: i for i, part in enumerate(parts) for node in part}
    longest: list[int] = []
    for i, part in enumerate(parts):
        below = {of[other] for node in part for other in graph[node]} - {i}
        longest.append(1 + max((longest[j] for j in below), default=0))
    return max(longest)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def takes_config_and_role(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function has a whole `Config` and the name of a role among its parameters."""
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    notes = [(a.arg, ast.unparse(a.annotation)) for a in every if a.annotation is not None]
    whole = any(note.strip("'\"").split(".")[-1] == "Config" for _, note in notes)
    return whole and any(
        name in ("name", "role", "role_name") and note.strip("'\"") == "str" for name, note in notes
    )


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Strings that stand by themselves: of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            value = child.value if isinstance(child, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value


def statements(tree: ast.Module) -> int:
    """Statements, docstrings left out."""
    own = sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
    return own - sum(1 for _ in docstrings(tree))


def walked_files(checkout: Path) -> int | None:
    """Files that the design's walk of one GRPO step names."""
    text = (checkout / "docs" / "design.md").read_text(encoding="utf-8")
    walk = re.search(r"^## One GRPO step\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return None if walk is None else len(set(re.findall(r"`([\w/]+\.py)`", walk[1])))


def run_python(checkout: Path, code: str, *words: str) -> str | None:
    """The last line that the code prints with the checkout's package; None where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words],
        env=environment,
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    return done.stdout.strip().splitlines()[-1]


def keys_of(checkout: Path) -> tuple[int | None, int | None]:
    """Count the configuration's keys, and the basic ones among them."""
    every = run_python(checkout, KEYS)
    first, second = (every or "- -").split()
    return (int(first) if first != "-" else None), (int(second) if second != "-" else None)


def figures(checkout: Path, traced: bool) -> dict[str, int | float | None]:
    source = checkout / "src" / PACKAGE
    known = modules(source)
    graph = {name: imported(name, path, tree, known) for name, (path, tree) in known.items()}
    rooms: dict[str, set[str]] = {}
    for name, others in graph.items():
        rooms.setdefault(room_of(name), set()).update(room_of(other) for other in others)
    every = [(f, name) for name, (_, tree) in known.items() for f in functions(tree)]
    lines = {
        name: len(p.read_text(encoding="utf-8").splitlines()) for name, (p, _) in known.items()
    }
    trees = [tree for _, tree in known.values()]
    docs = [text for tree in trees for text in docstrings(tree)]
    closure = run_python(checkout, CLOSURE)
    keys, basic = keys_of(checkout)
    entered = None
    if traced:
        with tempfile.TemporaryDirectory() as place:
            entered = run_python(checkout, TRACED, str(checkout), place)
    return {
        "loose_modules": sum(
            p.parent == source and not p.stem.startswith("__") for p, _ in known.values()
        ),
        "rooms": len(rooms),
        "circles": sum(len(part) > 1 for part in components(graph)),
        "levels": depth(rooms),
        "config_and_role_functions": sum(
            takes_config_and_role(f)
            for f, name in every
            if not name.startswith((f"{PACKAGE}.config.", f"{PACKAGE}.role_spec"))
        ),
        "statements_src": sum(
            statements(tree) for name, (_, tree) in known.items() if name.split(".")[-1] not in NEW
        ),
        "lines_src": sum(lines.values()),
        "largest_file": max(lines.values()),
        "longest_function": max((f.end_lineno or f.lineno) - f.lineno + 1 for f, _ in every),
        "docstring_fragments": sum(
            bool(FRAGMENT.match(text.strip())) + len(ARGUMENT.findall(text)) for text in docs
        ),
        "files_for_one_grpo_step": walked_files(checkout),
        "files_traced": None if entered is None else int(entered),
        "import_closure_of_grpo": None if closure is None else round(int(closure) / len(known), 2),
        "basic_keys": basic,
        "keys": keys,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--traced", action="store_true", help="run one step of a tiny model too")
    given = parser.parse_args()
    print(json.dumps(figures(given.checkout.resolve(), given.traced)))


if __name__ == "__main__":
    main()
