"""The package: what it imports is declared, and a wheel holds what it needs."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
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


OTHER_NAMES = {
    "fla": "flash-linear-attention",
    "flash_attn": "flash-attn-4",
    "cutlass": "flash-attn-4",  # whose kernels are written in it
}
"""Names of optional packages, which may not be installed here, by those they are imported by."""


def test_every_import_is_declared() -> None:
    known, distributions = declared(), packages_distributions()
    assert {"torch", "megatron-core", "flash-attn-4", "psutil"} <= known
    missing = {
        f"{package} ({file})"
        for package, file in imported().items()
        if not {
            normal(OTHER_NAMES.get(package, package)),
            *map(normal, distributions.get(package, [])),
        }
        & known
    }
    assert not missing


def build_wheel(place: Path) -> Path:
    """Build a wheel from a copy of what it is made of, without a network; the wheel's path."""
    copy = place / "checkout"
    shutil.copytree(
        ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    words = [
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        str(place),
    ]
    subprocess.run([sys.executable, "-m", "pip", *words], cwd=copy, check=True)
    (wheel,) = place.glob("*.whl")
    return wheel


USED = """
import sys
from spmdrl.config.load import load_config
from spmdrl.models.kernels import cpu
from spmdrl.models.kernels import cpu as panels
from spmdrl.rollout.native import paged_decode
import spmdrl
print(spmdrl.__file__)
print(load_config("quickstart").flow, load_config("rlhf/ppo").flow)
"""


def test_a_wheel_has_kernels_and_configurations(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        opened.extractall(tmp_path / "unpacked")
    files = [p for p in (ROOT / "src" / "spmdrl").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert {str(p.relative_to(ROOT / "src")) for p in files} == {
        name for name in names if name.startswith("spmdrl/")
    }
    assert {".c", ".h", ".yaml", ".py", ".typed"} <= {Path(name).suffix for name in names}
    done = subprocess.run(
        [sys.executable, "-c", USED],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [f"{tmp_path}/unpacked/spmdrl/__init__.py", "grpo", "ppo"], done
