"""RUN/run.json: what a run was started with, one entry for each start.

Commands take a run's directory where they take a configuration: that of its last start is read
from here (`config.load`).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from spmdrl.atomic_files import replace_file, set_aside
from spmdrl.config.load import RUN_FILE
from spmdrl.config.sections import Config
from spmdrl.world import World

PACKAGES = (
    *("spmdrl", "torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets"),
    *("vllm", "megatron-core", "deepspeed", "peft", "triton"),
)
"""Packages whose versions an entry has, where they are installed."""


def write_start(config: Config, world: World, attempt: Path) -> None:
    """Add an entry to run.json; the first rank writes it. A file that is none is set aside."""
    if not world.is_first:
        return
    file = Path(config.run_dir) / RUN_FILE
    starts = []
    if file.is_file():
        try:
            starts = json.loads(file.read_text(encoding="utf-8"))["starts"]
        except (ValueError, KeyError, TypeError):
            set_aside(file)
    content = {"version": 1, "starts": [*starts, start_entry(config, world, attempt)]}
    replace_file(file, (json.dumps(content, indent=1) + "\n").encode())


def start_entry(config: Config, world: World, attempt: Path) -> dict[str, Any]:
    """Describe this start as JSON values: configuration as given, command, commit of the working
    directory, versions, hardware.
    """
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "attempt": attempt.name,
        "command": shlex.join(sys.argv),
        "directory": str(Path.cwd()),
        "commit": _commit(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "ranks": world.size,
        "ranks_per_node": world.local_size,
        "host": platform.node(),
        "device": _device(world),
        "python": platform.python_version(),
        "versions": _versions(),
        # only what was given: what a section takes from another must not look as if it were its own
        "config": config.model_dump(mode="json", exclude_unset=True),
    }


def _device(world: World) -> str:
    if world.device.type != "cuda":
        return f"{world.device.type} ({os.cpu_count()} cores)"
    return torch.cuda.get_device_name(world.device)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _commit() -> str | None:
    """Commit of the repository around the working directory, with `+` if files differ from it."""
    with suppress(OSError, subprocess.SubprocessError):
        told = [
            subprocess.run(
                ["git", *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
        return told[0] + "+" * bool(told[1])
    return None
