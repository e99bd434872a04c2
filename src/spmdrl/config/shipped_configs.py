"""Configurations that come with the package, by name, in a checkout as in an installed wheel."""

from __future__ import annotations

import difflib
from pathlib import Path

SUFFIX = ".yaml"
FOLDER = Path(__file__).parents[1] / "configs"


def shipped_names() -> list[str]:
    """Names of the shipped configurations: `quickstart`, `rlhf/ppo`."""
    return sorted(str(p.relative_to(FOLDER).with_suffix("")) for p in FOLDER.rglob(f"*{SUFFIX}"))


def find_config(name: str | Path, *, included_by: Path | None = None) -> Path:
    """Find a configuration: a file, otherwise a shipped one by name.

    Args:
        name: path of a file, or `quickstart`, `rlhf/ppo`; a name may end in `.yaml`.
        included_by: file that names it, in whose folder relative paths start; None: they start in
            the working directory.

    Raises:
        ValueError: neither exists; similar names are suggested.
    """
    path = Path(name) if included_by is None else included_by.parent / name
    if path.is_file():
        return path
    known, short = shipped_names(), str(name).removesuffix(SUFFIX)
    if short in known:
        return FOLDER / f"{short}{SUFFIX}"
    near = difflib.get_close_matches(short, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "`spmdrl configs` lists the shipped ones"
    origin = "" if included_by is None else f" (included by {included_by})"
    raise ValueError(f"there is no config file {path.absolute()}{origin}; {hint}")


def list_configs() -> str:
    """Names of the shipped configurations, each with the first line of its comment."""
    names = shipped_names()
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {_title(find_config(name))}" for name in names)


def _title(path: Path) -> str:
    """First line of the comment that a configuration begins with."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def shipped_text(name: str) -> str:
    """Text of a shipped configuration.

    Raises:
        ValueError: none has this name.
    """
    short = name.removesuffix(SUFFIX)
    if short not in shipped_names():
        raise ValueError(f"there is no shipped configuration {name!r}: `spmdrl configs` lists them")
    return (FOLDER / f"{short}{SUFFIX}").read_text(encoding="utf-8").rstrip()
