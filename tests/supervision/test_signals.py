"""What SIGINT means: a request, the same one, the end; and a debugger's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from spmdrl.supervision.signals import EXIT_INTERRUPTED, Interrupts
from torchrun import wait_until

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


@pytest.mark.parametrize(
    ("saves", "under_agent", "sent", "meanings"),
    [
        # Slurm signals a launcher and its ranks, and the launcher passes it on
        (True, True, [(INT, 0.0), (INT, 0.4), (INT, 0.9), (INT, 1.1)], "ask same same end"),
        # what torchrun sends at a second Ctrl-C
        (True, True, [(INT, 0.0), (TERM, 0.5), (TERM, 1.5)], "ask ask end"),
        # without torchrun SIGTERM is a scheduler's
        (True, False, [(INT, 0.0), (TERM, 1.5), (INT, 2.0)], "ask ask end"),
        (True, True, [(TERM, 0.0), (TERM, 9.0), (USR1, 9.0), (INT, 9.5)], "ask ask ask ask"),
        (False, True, [(INT, 0.0)], "end"),
    ],
)
def test_meaning(saves: bool, under_agent: bool, sent, meanings: str) -> None:
    interrupts = Interrupts(saves=saves, under_agent=under_agent)
    assert [interrupts.meaning(*pair) for pair in sent] == meanings.split()


def start(code: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **variables},
    )


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Read what a process says up to the text; kill one that says nothing for a minute."""
    assert process.stdout is not None
    found = ""
    limit = threading.Timer(60, process.kill)
    limit.start()
    try:
        while not found.endswith(text):
            letter = process.stdout.read(1)
            assert letter, found
            found += letter
    finally:
        limit.cancel()
        limit.join()
    return found


def interrupt_at_prompt(process: subprocess.Popen[str]) -> None:
    """SIGINT once pdb reads its input: Python's handlers do not run between a prompt and that."""
    wait_until(lambda: "pipe_read" in Path(f"/proc/{process.pid}/wchan").read_text(), 60)
    process.send_signal(INT)


STARVED = """
import time
from spmdrl.supervision.signals import Signals
signals = Signals()
print("ready", flush=True)
while signals.noted is None:
    time.sleep(0.01)
print("busy", flush=True)
began = time.monotonic()
while time.monotonic() - began < 1.2:
    sum(range(40_000_000))  # no other thread runs meanwhile
time.sleep(0.2)
print(signals.wait(0.0), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_two_deliveries_of_one_request_are_one_whatever_keeps_the_reader(rank: str) -> None:
    """They count by when they were sent; a later one ends the process, in a line of rank 0."""
    with start(STARVED, RANK=rank) as process:
        read_until(process, "ready\n")
        process.send_signal(INT)
        told = read_until(process, "busy\n")
        process.send_signal(INT)
        read_until(process, f"[{int(INT)}]\n")
        process.send_signal(INT)
        rest = process.communicate(timeout=20)[0]
    assert process.returncode == EXIT_INTERRUPTED
    assert told.count("SIGINT: stops where") == (rank == "0")
    last = "spmdrl train: interrupted again: ends at once, without saving\n"
    assert rest == (last if rank == "0" else "")


DEBUGGED = """
import time
from spmdrl.supervision.signals import Signals
signals = Signals()
breakpoint()
print("goes on", flush=True)
time.sleep(5)
print("noted", signals.noted, flush=True)
"""


def test_in_a_debugger_sigint_is_the_debuggers() -> None:
    with start(DEBUGGED) as process:
        assert process.stdin is not None
        read_until(process, "(Pdb) ")
        interrupt_at_prompt(process)
        assert "--KeyboardInterrupt--" in read_until(process, "(Pdb) ")
        process.stdin.write("c\n")
        process.stdin.flush()
        read_until(process, "goes on\n")
        process.send_signal(INT)
        assert "Program interrupted" in read_until(process, "(Pdb) ")
        rest = process.communicate("p signals.noted\nc\n", timeout=30)[0]
    assert "None" in rest and "noted None" in rest and process.returncode == 0, rest
