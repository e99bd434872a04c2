"""A watcher outlives what files do, its end is noticed, and a look at all ranks is cheap."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import spmdrl.supervision.watcher as watcher_module
from flow_cases import questions, write_config
from harness import run_ranks
from spmdrl.batch import Batch
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.rewards.server import start_reward_server
from spmdrl.supervision.attempt import begin_attempt
from spmdrl.supervision.pulse import Pulse, Signs, behind
from spmdrl.supervision.signals import Signals
from spmdrl.supervision.watcher import Watcher
from spmdrl.world import World
from stopping import Wrapped
from tiny_model import make_tiny_model
from torchrun import attempt_of, outcome_of

ERRORS = 1000


@contextmanager
def file_system_out_of_order(count: int) -> Iterator[list[str]]:
    """The watcher's thread meets `count` OSErrors: at heartbeats and at stop files in turn."""
    met: list[str] = []
    write, exists = watcher_module.replace_file, Path.exists

    def fails(where: str) -> bool:
        here = threading.current_thread().name == "spmdrl-watcher" and len(met) < count
        if here:
            met.append(where)
        return here

    def replace_file(*words: Any, **options: Any) -> None:
        if fails("heartbeat"):
            raise OSError(116, "Stale file handle")
        write(*words, **options)

    def path_exists(path: Path, **options: Any) -> bool:
        if path.name == "stop" and fails("stop file"):
            raise OSError(5, "Input/output error")
        return exists(path, **options)

    tick, heartbeat = watcher_module.TICK_S, watcher_module.HEARTBEAT_S
    watcher_module.TICK_S, watcher_module.HEARTBEAT_S = 0.001, 0.0
    watcher_module.replace_file, Path.exists = replace_file, path_exists  # type: ignore[assignment]
    try:
        yield met
    finally:
        watcher_module.TICK_S, watcher_module.HEARTBEAT_S = tick, heartbeat
        watcher_module.replace_file, Path.exists = write, exists


class TermAfterErrors(Wrapped):
    """Collects the second step once the watcher has met all errors; then SIGTERM comes."""

    met: list[str]

    def collect(self, step: int) -> Batch:
        if step == 1:
            deadline = time.monotonic() + 60
            while len(self.met) < ERRORS and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
        return self.inner.collect(step)


class BreaksTheWatcher(Wrapped):
    """In the second step the watcher's thread meets an error of no kind that it knows."""

    def collect(self, step: int) -> Batch:
        if step == 1:
            watcher = self.run._life.watcher

            def broken() -> str | None:
                raise KeyError("nobody foresaw this")

            watcher.look_after(broken)
            watcher._thread.join(20)
            assert not watcher._thread.is_alive()
        return self.inner.collect(step)


def outlive(world: World, path: str) -> tuple[int, set[str]]:
    with file_system_out_of_order(ERRORS) as met, start_reward_server() as server:
        TermAfterErrors.met = met
        train(load_config(path, []), world, server)
    return len(met), set(met)


def lose_the_watcher(world: World, path: str) -> str:
    with start_reward_server() as server, pytest.raises(RuntimeError) as caught:
        train(load_config(path, []), world, server)
    return str(caught.value)


def configure(root: Path, name: str) -> str:
    make_tiny_model(root / "model")
    return str(
        write_config(
            root / f"{name}.yaml",
            root / "model",
            root / name,
            data=questions(root / "questions.jsonl"),
            environment=f"{__name__}:{name}",
        )
    )


def test_a_thousand_os_errors_later_sigterm_is_heard_and_the_run_saved(tmp_path: Path) -> None:
    name = "TermAfterErrors"
    found = run_ranks(outlive, 1, configure(tmp_path, name))
    assert found == [(ERRORS, {"heartbeat", "stop file"})]
    run_dir = tmp_path / name
    assert outcome_of(run_dir) == "stopped"
    assert (attempt_of(run_dir) / "stopped_by").read_text() == "SIGTERM\n"
    assert (run_dir / "checkpoints" / "latest").read_text().startswith("step_00000001")


def test_a_watcher_that_ends_is_named_and_the_run_is_saved_first(tmp_path: Path) -> None:
    name = "BreaksTheWatcher"
    [message] = run_ranks(lose_the_watcher, 1, configure(tmp_path, name))
    assert "rank 0: the watcher's thread ended (KeyError: 'nobody foresaw this')" in message
    run_dir = tmp_path / name
    assert outcome_of(run_dir) == "crashed"
    assert "nobody foresaw this" in (attempt_of(run_dir) / "failed").read_text()
    assert (run_dir / "checkpoints" / "latest").read_text().startswith("step_00000001")


def hear_before_the_look(world: World, root: Path) -> bool:
    """SIGTERM on rank 0, whose look at the ranks takes its time: whether rank 1 hears of it."""

    def slow(self: Signs) -> list[int]:
        time.sleep(6)
        return []

    Signs.dead = slow  # type: ignore[method-assign]
    attempt = begin_attempt(root, world)
    with Watcher(world, attempt, Pulse(), Signals(), {"default": 60.0}) as watcher:
        dist.barrier()
        if world.is_first:
            os.kill(os.getpid(), signal.SIGTERM)
        began = time.monotonic()
        while not watcher.stop_asked and time.monotonic() < began + 20:
            time.sleep(0.01)
        heard = time.monotonic() - began
        dist.barrier()
        return heard < 5


def test_all_hear_of_a_stop_before_anyone_looks_for_the_dead(tmp_path: Path) -> None:
    assert run_ranks(hear_before_the_look, 2, tmp_path) == [True, True]


class Counting:
    """A store that counts what it is asked."""

    def __init__(self, store: Any) -> None:
        self.store, self.asked = store, 0

    def __getattr__(self, name: str) -> Any:
        self.asked += 1
        return getattr(self.store, name)


def test_a_look_at_all_ranks_is_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 500
    store = Counting(dist.HashStore())
    signs = [Signs(store, rank, size) for rank in range(size - 1)]
    store.set(f"seat/{size - 1}", f"elsewhere {os.getpid()}")
    store.set(f"sign/{size - 1}", "1")
    assert signs[0].dead() == []
    now = time.monotonic()
    clock = [now]
    monkeypatch.setattr("spmdrl.supervision.pulse.time.monotonic", lambda: clock[0])
    for later in (3.0, 6.0, 9.0, 11.0):
        clock[0] = now + later
        for other in signs:
            other.give()
        before = store.asked
        assert signs[0].dead() == []
        assert store.asked - before <= 2
    clock[0] = now + 15.0
    for other in signs:
        other.give()
    assert signs[0].dead() == [size - 1]  # of another host, and silent since the first look
    store.set(f"ended/{size - 1}", "")
    assert signs[0].dead() == []


def test_who_has_no_seat_or_is_gone_is_dead() -> None:
    store = dist.HashStore()
    signs = Signs(store, 0, 3)
    gone = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(gone, 0)
    other = Signs(store, 1, 3)
    assert signs.dead() == []
    assert other.dead() == []
    host = store.get("seat/1").split()[0].decode()
    store.set("seat/2", f"{host} {gone}")
    store.set("sign/2", "1")
    signs._next_look = 0.0
    assert signs.dead() == [2]


def test_half_a_heartbeat_is_none() -> None:
    assert behind({0: "", 1: '{"rank": 1, "st'}, 2) == "ranks [0, 1] have no heartbeat"


def test_a_stop_file_asks_for_a_stop_whatever_is_in_it(tmp_path: Path) -> None:
    file = tmp_path / "stop"
    file.write_text("")
    assert watcher_module.request_of(file) == f"the file {file}"
    file.write_text("the disk\nis full")
    assert watcher_module.request_of(file) == f"the disk is full (the file {file})"
    file.unlink()
    file.mkdir()  # cannot be read
    assert watcher_module.request_of(file) == f"the file {file}"
