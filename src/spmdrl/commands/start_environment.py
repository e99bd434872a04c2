"""Environment variables that a start sets for libraries, unless the user has set them: caches of
compiled code in a directory of the node, and the flight recorder of NCCL.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
}
"""Variables of directories of compiled code, and their names below the node's directory."""

RECORDER = {
    ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",
    ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
}
"""Names of a setting of the recorder, the present one first (torch warns of older ones)."""

RECORDER_FILES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Names of the path of the recorder's files, to which torch appends the rank."""


def set_start_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the directories of compiled code, and switch the flight recorder on.

    A home directory on a file system that all nodes share makes every rank wait for it, and ranks
    of several nodes write the same files. Call it before the process group is made.
    """
    missing = [name for name in CACHES if name not in environment]
    if missing:
        directory = node_directory(Path(tempfile.gettempdir()))
        environment.update({name: str(directory / CACHES[name]) for name in missing})
    for names, value in RECORDER.items():
        if not any(name in environment for name in names):
            environment[names[0]] = value


def set_recorder_files(attempt: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch write the flight recorder's files to `stacks/` of an attempt's directory.

    torch reads the path when it first writes one, so it may come after the process group.
    """
    if not any(name in environment for name in RECORDER_FILES):
        environment[RECORDER_FILES[0]] = str(attempt / "stacks" / "nccl_rank_")


def node_directory(parent: Path) -> Path:
    """Make `spmdrl-UID` in a directory of this node, and return it.

    Compiled code is executed, so a directory that somebody else may write is not used: another user
    can make one of this name first.
    """
    directory = parent / f"spmdrl-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if is_own and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return directory
    return Path(tempfile.mkdtemp(prefix="spmdrl-", dir=parent))
