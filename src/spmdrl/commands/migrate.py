"""`spmdrl migrate`: rename the keys of a configuration that have another name now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from spmdrl.atomic_files import replace_file
from spmdrl.config.load import find_config, substitute
from spmdrl.config.migrate import composed, find_renames, renamed


def migrate(path: Path, done: set[Path] | None = None) -> Iterator[str]:
    """Rename old keys in a file, and in those that it includes; comments stay.

    Args:
        done: files that need not be read again; they grow.

    Yields:
        What was renamed, with file and line.

    Raises:
        ValueError: a file is no YAML mapping, or has a key by both of its names.
        OSError: a file cannot be read or written.
    """
    path, done = find_config(path).resolve(), set() if done is None else done
    if path in done:
        return
    done.add(path)
    text = path.read_text(encoding="utf-8")
    content = substitute(text, str(path))
    try:
        renames, root = find_renames(text), composed(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if renames:
        replace_file(path, renamed(text, renames).encode())
    for rename in renames:
        yield f"{path}:{rename.line}: {rename.old} is now {rename.new}"
    for name in _included(root):
        yield from migrate(find_config(name, included_by=path), done)


def _included(root: yaml.MappingNode) -> Iterator[str]:
    for key, value in root.value:
        if key.value == "includes" and isinstance(value, yaml.SequenceNode):
            yield from (str(name.value) for name in value.value)
