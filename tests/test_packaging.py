"""What the package imports is what its metadata declares."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]


def declared() -> set[str]:
    """The names of the requirements of the package and its extras, but for `dev`, normalised."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = [text for name, text in parser["options.extras_require"].items() if name != "dev"]
    lines = "\n".join([parser["options"]["install_requires"], *extras]).replace(";", "\n")
    found = (re.match(r"\s*([\w.-]+)", line) for line in lines.splitlines())
    return {normal(match[1]) for match in found if match}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> dict[str, str]:
    """Each package from elsewhere that is imported anywhere, and a file that does."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
                names = [node.module]
            found |= {name.split(".")[0]: path.name for name in names}
    return {k: v for k, v in found.items() if k not in (*sys.stdlib_module_names, "spmdrl")}


def test_every_import_is_declared() -> None:
    known, distributions = declared(), packages_distributions()
    assert {"torch", "megatron-core", "flash-attn", "psutil"} <= known
    missing = {
        f"{package} ({file})"
        for package, file in imported().items()
        if not {normal(package), *map(normal, distributions.get(package, []))} & known
    }
    assert not missing
