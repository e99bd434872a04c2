"""Signals are not lost, positions say who is behind, time is kept, and a run has one owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from harness import run_ranks
from spmdrl.supervision.attempt import DEADLINE, DIRECTORY, OWNER, Fenced, begin_attempt
from spmdrl.supervision.error_file import one_line
from spmdrl.supervision.failures import is_lost_peer
from spmdrl.supervision.pulse import Pulse, behind
from spmdrl.supervision.signals import STOPPING, Signals
from spmdrl.supervision.stopping import Walltime
from spmdrl.supervision.watcher import Watcher
from spmdrl.world import World

SLOW_IMPORT = """
import os, signal, time
from spmdrl.supervision.signals import Signals
signals = Signals()
print("ready", flush=True)
time.sleep(0.5)   # an import that takes its time; nobody reads signals yet
child = os.fork()
if child == 0:    # what is forked off does not write to its parent's socket
    os.kill(os.getpid(), signal.SIGUSR1)
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(signals.wait(0.0), signals.wait(0.0), code)
signals.ignore()
signals.close()
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_signals_are_noted_before_anyone_reads_them_and_ignored_after_the_end() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_IMPORT], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert (out, process.returncode) == (f"[{int(signal.SIGTERM)}] [] -10\n", 0)


def test_a_later_object_takes_the_signals_over() -> None:
    handlers = [signal.getsignal(number) for number in STOPPING]
    first = Signals()
    second = Signals()
    first.close()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert second.wait(5.0) == [signal.SIGUSR1]
    second.close()
    assert [signal.getsignal(number) for number in STOPPING] == [signal.SIG_DFL] * 2
    for number, handler in zip(STOPPING, handlers, strict=True):
        signal.signal(number, handler)


def test_the_rank_in_the_earlier_call_is_behind() -> None:
    pulses = [Pulse() for _ in range(3)]
    for rank, pulse in enumerate(pulses):
        pulse.at_step(4)
        with pulse.phase("rollout"):
            pulse.at_call("rollout.generate", "sending")
            pulse.at_call("rollout.generate", "computing")
            if rank != 1:
                pulse.at_call("rollout.generate", "returning")
            lines = {r: p.heartbeat(r) for r, p in enumerate(pulses)}
    text = behind(lines | {1: pulses[1].heartbeat(1)}, 3)
    assert text.startswith("ranks [1] are behind: step 4, phase start, in rollout.generate (comp")
    assert "rank 0 is ahead: step 4" in text and "(returning)" in text
    assert behind({0: lines[0]}, 3) == "ranks [1, 2] have no heartbeat"
    # done is further than returning
    pulses[0].at_call("rollout.generate", "between")
    both = {rank: pulse.heartbeat(0) for rank, pulse in enumerate((pulses[0], pulses[2]))}
    assert behind(both, 2).startswith("ranks [1] are behind")
    assert behind({0: both[0]}, 1).startswith("all ranks are at one place")


def test_walltime_leaves_room_for_a_step_and_a_save() -> None:
    walltime = Walltime()
    assert walltime.fits(0.0, None) and walltime.fits(99.0, 100.0)  # nothing is known yet
    walltime.steps += [40.0, 10.0]
    # a save is taken for a step: 1.25 x 80 + 5
    assert walltime.fits(0.0, 105.0) and not walltime.fits(1.0, 105.0)
    walltime.save = 4.0
    assert walltime.fits(0.0, 60.0) and not walltime.fits(1.0, 60.0)
    assert walltime.stop_by(100.0) == 90.0
    walltime.steps += [10.0] * 8  # the long one is long ago
    assert walltime.fits(0.0, 22.5)


def test_whose_failure_it_is() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")
    wrapped = ValueError("in step 3")
    wrapped.__cause__ = lost
    assert is_lost_peer(lost) and is_lost_peer(wrapped)
    assert not is_lost_peer(RuntimeError("rank 1 had enough"))
    assert not is_lost_peer(ConnectionError("a reward server: Connection closed by peer"))
    assert one_line(wrapped).startswith("RuntimeError: [gloo")


def own_attempts(world: World, root: Path) -> list[object]:
    first = begin_attempt(root, world)
    first.check_owner()
    dist.barrier()
    second = begin_attempt(root, world)
    with pytest.raises(Fenced, match=f"belongs to attempt {second.owner} by now"):
        first.check_owner()
    second.check_owner()
    dist.barrier()
    os.environ.update({DIRECTORY: str(root / "mine"), OWNER: "job.1", DEADLINE: "12.5"})
    with pytest.raises(OSError, match=r"rank 0: .* and this is job\.1"):
        begin_attempt(root, world)  # the launcher has not made it the owner, or a newer one has
    if world.is_first:
        (root / "owner").write_text("job.1\n")
    third = begin_attempt(root, world)
    if world.is_first:
        third.write_failed("rank 1: first")
        third.write_failed("rank 0: second")
    return [first.directory.name, second.directory.name, third]


def test_an_attempt_is_one_for_all_ranks_and_a_newer_one_owns_the_run(tmp_path: Path) -> None:
    one, two = run_ranks(own_attempts, 2, tmp_path / "run")
    assert one == two
    assert one[:2] == ["attempt_0000", "attempt_0001"]
    assert (one[2].directory, one[2].owner, one[2].deadline) == (
        tmp_path / "run" / "mine",
        "job.1",
        12.5,
    )
    assert one[2].read_failed() == "rank 1: first"


def unwritable(world: World, root: Path) -> str:
    with pytest.raises(OSError) as caught:
        begin_attempt(root, world)
    return str(caught.value)


def test_an_unwritable_run_dir_is_an_error_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one, two = run_ranks(unwritable, 2, tmp_path / "file" / "run")
    assert one == two and "Not a directory" in one


def ask(world: World, root: Path, how: str) -> list[bool]:
    """Every rank learns of what one rank was told, without a collective."""
    attempt = begin_attempt(root / how, world)
    with Watcher(world, attempt, Pulse(), Signals(), {"default": 60.0}) as watcher:
        before = watcher.stop_asked
        if world.rank == 1:
            if how == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
            elif how == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            elif how == "file":
                attempt.stop_files()[1].touch()
        if how == "deadline":
            watcher.stop_by = time.time() + 0.2
        began = time.monotonic()
        while not watcher.stop_asked and time.monotonic() < began + 20:
            time.sleep(0.05)
        return [before, watcher.stop_asked]


@pytest.mark.parametrize("how", ["signal", "term", "file", "deadline"])
def test_a_request_to_one_rank_reaches_all(tmp_path: Path, how: str) -> None:
    assert run_ranks(ask, 3, tmp_path, how) == [[False, True]] * 3


CPU_TIME = """
import resource, time
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
from spmdrl.supervision.signals import Signals
signals = Signals()
print(resource.getrlimit(resource.RLIMIT_CPU))
used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 1, 10))
while not (found := signals.wait(0.0)):
    sum(range(100_000))
print(found)
"""


def test_the_end_of_cpu_time_asks_for_a_stop_before_it_kills() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CPU_TIME], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == f"(9, 10)\n[{int(signal.SIGXCPU)}]\n", done.stderr


def write_from_two_threads(world: World, root: Path) -> str:
    attempt = begin_attempt(root, world)
    watched = Watcher(world, attempt, Pulse(), Signals(), {"default": 60.0})
    with watched as watcher, ThreadPoolExecutor(2) as threads:
        list(threads.map(watcher.write_stopped_by, ["SIGINT"] * 400))
    return (attempt.directory / "stopped_by").read_text()


def test_who_asked_may_be_written_by_the_run_and_its_watcher_at_once(tmp_path: Path) -> None:
    assert run_ranks(write_from_two_threads, 1, tmp_path / "run") == ["SIGINT\n"]
