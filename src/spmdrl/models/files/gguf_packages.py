"""GGUF files in Python packages, wheels and folders."""

from __future__ import annotations

import importlib.util
import re
import shutil
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

_PART = re.compile(r"(?P<name>.+\.gguf)\.part(?P<number>\d+)")
"""Names of the parts that packages cut a file into, numbered from 0."""


def find_packaged_gguf(package: str) -> Path:
    """Find the .gguf file: itself, in a package, in a wheel (unpacked next to it), or in a folder.

    A folder may hold several wheels with one part of the file each.

    Raises:
        ValueError: there is none, or more than one, or a part of it is missing.
    """
    place = Path(package)
    if place.suffix == ".gguf" and place.is_file():
        return place
    if place.is_dir():
        found, wheels = sorted(place.rglob("*.gguf")), sorted(place.glob("*.whl"))
        if not found and len(wheels) == 1:
            return _unpack(wheels[0])
        if not found and wheels:
            return _join(wheels, place)
        return _only(found, package)
    if place.suffix == ".whl":
        return _unpack(place)
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{package!r} is no installed package, wheel, directory or .gguf file")
    roots = [Path(root) for root in spec.submodule_search_locations]
    return _only(sorted(file for root in roots for file in root.rglob("*.gguf")), package)


def _only(found: list[Path], package: str) -> Path:
    if len(found) != 1:
        names = ", ".join(str(file) for file in found) or "none"
        raise ValueError(f"{package} must hold one .gguf file; found: {names}")
    return found[0]


def _opened(wheel: Path) -> zipfile.ZipFile:
    if not zipfile.is_zipfile(wheel):
        raise ValueError(f"{wheel} is no wheel (a zip file)")
    return zipfile.ZipFile(wheel)


def _unpack(wheel: Path) -> Path:
    with _opened(wheel) as archive:
        inside = [Path(name) for name in archive.namelist() if name.endswith(".gguf")]
        name = _only(inside, str(wheel))
        target = wheel.parent / name.name
        if not target.exists():
            _write(target, [(archive, name.as_posix())])
    return target


def _join(wheels: list[Path], folder: Path) -> Path:
    """Join the parts that wheels hold, in the folder."""
    with ExitStack() as stack:
        parts: dict[str, dict[int, tuple[zipfile.ZipFile, str]]] = {}
        for wheel in wheels:
            archive = stack.enter_context(_opened(wheel))
            for inside in archive.namelist():
                found = _PART.fullmatch(Path(inside).name)
                if found is not None:
                    own = parts.setdefault(found["name"], {})
                    own[int(found["number"])] = (archive, inside)
        target = folder / _only([Path(name) for name in parts], str(folder))
        numbered = parts[target.name]
        if sorted(numbered) != list(range(len(numbered))):
            raise ValueError(
                f"{folder} holds parts {sorted(numbered)} of {target.name}, which are numbered "
                "from 0: some are missing"
            )
        _write(target, [numbered[i] for i in range(len(numbered))])
    return target


def _write(target: Path, parts: Iterable[tuple[zipfile.ZipFile, str]]) -> None:
    scratch = target.with_suffix(".part")
    with scratch.open("wb") as unpacked:
        for archive, inside in parts:
            with archive.open(inside) as packed:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    scratch.rename(target)
