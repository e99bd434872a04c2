"""Heartbeats, which every rank writes every few seconds to a file system that all share."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import spmdrl.supervision.watcher as watcher_module
from harness import run_ranks
from spmdrl.supervision.attempt import begin_attempt
from spmdrl.supervision.pulse import Pulse
from spmdrl.supervision.signals import Signals
from spmdrl.supervision.watcher import Watcher, heartbeat_file
from spmdrl.world import World


def beat_often(world: World, root: Path) -> tuple[int, list[str]]:
    """Heartbeats that came one after the other, and which of the watcher's calls waited for the
    disk meanwhile.
    """
    waited: list[str] = []
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        waited.append(threading.current_thread().name)
        sync(descriptor)

    attempt = begin_attempt(root, world)
    file, count = heartbeat_file(attempt.directory, world.rank), 0
    watcher_module.TICK_S, watcher_module.HEARTBEAT_S = 0.01, 0.0
    os.fsync = fsync
    with Watcher(world, attempt, Pulse(), Signals(), {"default": 60.0}):
        deadline = time.monotonic() + 20
        while count < 3 and time.monotonic() < deadline:
            if file.exists():
                file.unlink()
                count += 1
            time.sleep(0.001)
    return count, [name for name in waited if name == "spmdrl-watcher"]


def test_heartbeats_do_not_wait_for_the_disk(tmp_path: Path) -> None:
    assert run_ranks(beat_often, 1, tmp_path) == [(3, [])]
