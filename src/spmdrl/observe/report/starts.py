"""The starts of a run, as its run.json has them, and what differs between configurations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from spmdrl.config.load import RUN_FILE

FIELDS = ("attempt", "command", "directory", "commit", "job", "ranks", "ranks_per_node")
HARDWARE = ("host", "device", "python")


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run.

    Args:
        began: seconds since 1970; None: not recorded.
        told: what the entry says of command, commit, ranks and hardware, as texts.
        versions: package -> version.
        config: the given configuration, dotted key -> value as JSON.
    """

    began: float | None
    told: Mapping[str, str]
    versions: Mapping[str, str]
    config: Mapping[str, str]


def read_starts(run_dir: Path) -> list[Start]:
    """Read the starts, the first one first; none without a run.json.

    Raises:
        ValueError: the file is not as a run writes it.
    """
    file = run_dir / RUN_FILE
    if not file.is_file():
        return []
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["starts"]
        return [_start(entry) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} has no list of starts: {error!r}") from None


def _start(entry: Mapping[str, Any]) -> Start:
    began = entry.get("started")
    return Start(
        began=None if began is None else datetime.fromisoformat(began).timestamp(),
        told={
            name: str(entry[name]) for name in (*FIELDS, *HARDWARE) if entry.get(name) is not None
        },
        versions={str(k): str(v) for k, v in entry.get("versions", {}).items()},
        config=flat(entry.get("config", {})),
    )


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Write a nested configuration as dotted keys with values as JSON."""
    found: dict[str, str] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{key}.")
        else:
            found[key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found


def differences(texts: Sequence[Mapping[str, str]]) -> dict[str, list[str | None]]:
    """Find the keys that do not have one value in all mappings, with each one's; None: absent."""
    keys = dict.fromkeys(key for mapping in texts for key in mapping)
    found = {key: [mapping.get(key) for mapping in texts] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}
