"""Variables that a start sets: caches on the node, the flight recorder's files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from spmdrl.commands.start_environment import (
    CACHES,
    node_directory,
    set_recorder_files,
    set_start_environment,
)


def test_what_the_user_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found: dict[str, str] = {}
    set_start_environment(found)
    own = tmp_path / f"spmdrl-{os.getuid()}"
    assert {name: found.pop(name) for name in CACHES} == {
        name: str(own / folder) for name, folder in CACHES.items()
    }
    assert found == {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    # an older name counts as well: torch would prefer the new one
    users = dict.fromkeys(CACHES, "/mine")
    users |= {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    users |= {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/mine/rank_"}
    given = dict(users)
    set_start_environment(given)
    set_recorder_files(tmp_path, given)
    assert given == users


def test_a_directory_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    first = node_directory(tmp_path)
    assert first == node_directory(tmp_path) and first.stat().st_mode & 0o777 == 0o700
    first.chmod(0o777)
    other = node_directory(tmp_path)
    assert other != first and other.stat().st_mode & 0o777 == 0o700
    first.rmdir()
    first.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    assert node_directory(tmp_path) != first


DUMPED = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from spmdrl.commands.start_environment import set_recorder_files, set_start_environment
from spmdrl.world import start_world

directory = Path(sys.argv[1])
set_start_environment()
start_world(device="cuda")
dist.all_reduce(torch.ones(4, device="cuda"))
torch.cuda.synchronize()
set_recorder_files(directory)  # when the group exists, as a run does
time.sleep(0.5)
(directory / "pipe_0.pipe").write_text("1")
file, deadline = directory / "stacks" / "nccl_rank_0", time.monotonic() + 20
while not (file.is_file() and file.stat().st_size) and time.monotonic() < deadline:
    time.sleep(0.1)
print(file.stat().st_size)
os._exit(0)
"""


@pytest.mark.fakegpu
def test_torch_writes_the_recorder_to_the_attempts_stacks(tmp_path: Path) -> None:
    """Its monitor writes at a byte in a pipe, as it does after a collective's timeout."""
    (tmp_path / "stacks").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", DUMPED, str(tmp_path)],
        env={**os.environ, "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(tmp_path / "pipe_")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and int(done.stdout) > 100, done.stderr
