"""Hostile programs are contained, score 0 and leave nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import KINDS

from spmdrl.rewards.code import Judge, Verdict
from spmdrl.sandbox.processes import descendants
from spmdrl.sandbox.run import Limits, unusable

SECRET = "48151623"

pytestmark = pytest.mark.skipif(unusable() is not None, reason=f"no sandbox here: {unusable()}")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A port of this host that tells the secret to whoever connects."""
    listening = socket.create_server(("127.0.0.1", 0))

    def tell() -> None:
        while True:
            try:
                found, _ = listening.accept()
            except OSError:
                return
            with found:
                found.sendall(SECRET.encode())

    threading.Thread(target=tell, daemon=True).start()
    yield listening.getsockname()[1]
    listening.close()


def tried(kind: str, number: int, directory: Path, port: int) -> Verdict:
    secret = directory / "secret"
    secret.write_text(SECRET)
    program = KINDS[kind].format(
        secret=secret, port=port, outside=directory, parent=os.getpid(), n=number, answer=SECRET
    )
    judge = Judge(limits=Limits(memory_mb=512, cpu_s=2), isolation="namespaces", timeout_s=2.0)
    return judge.of_tests(program, [f"assert f() == {SECRET}"], None)


def check(kind: str, number: int, directory: Path, port: int) -> None:
    os.environ["SPMDRL_SECRET"] = SECRET
    before = set(descendants(os.getpid()))
    try:
        verdict = tried(kind, number, directory, port)
    finally:
        del os.environ["SPMDRL_SECRET"]
    assert verdict.passed == 0, (kind, verdict)
    assert set(descendants(os.getpid())) <= before, kind
    assert sorted(p.name for p in directory.iterdir()) == ["secret"], kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_program_is_contained_and_scores_nothing(
    kind: str, tmp_path: Path, port: int
) -> None:
    check(kind, 1, tmp_path, port)


@pytest.mark.full
def test_two_hundred_hostile_programs(tmp_path: Path, port: int) -> None:
    """Each kind again with other numbers, 200 programs in all."""
    tried_so_far = 0
    for number in range(2, 9):
        for kind in KINDS:
            if tried_so_far == 200:
                return
            directory = tmp_path / f"{tried_so_far}"
            directory.mkdir()
            check(kind, number, directory, port)
            tried_so_far += 1
    assert tried_so_far == 200


def test_what_a_program_may_do_still_works() -> None:
    """Python's library, its packages, threads and files of its own."""
    program = """
import json, math, re, threading
import numpy
from pathlib import Path

def f(x):
    Path("/tmp/own").write_text(json.dumps([x]))
    found = []
    thread = threading.Thread(target=lambda: found.append(numpy.arange(4).sum() + x))
    thread.start()
    thread.join()
    return int(found[0]) + json.loads(Path("/tmp/own").read_text())[0]
"""
    judge = Judge(limits=Limits(), isolation="namespaces", timeout_s=10.0)
    assert judge.of_tests(program, ["assert f(2) == 10"], None) == Verdict(passed=1, total=1)


def test_a_killed_judge_leaves_nothing() -> None:
    """The process that started a program is killed: the kernel ends all below it."""
    code = (
        "import time; from spmdrl.sandbox.run import Confined, Limits; "
        "p = Confined('answering:sleeping', ('87{pid}',), limits=Limits(cpu_s=60)); "
        "print('started', flush=True); time.sleep(60)"
    )
    own = f"{os.getpid()}"
    child = subprocess.Popen(
        [sys.executable, "-c", code.replace("{pid}", own)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "started\n"
    below = descendants(child.pid)
    assert below
    child.kill()
    child.wait()
    child.stdout.close()
    for _ in range(200):
        left = [pid for pid in below if Path(f"/proc/{pid}").exists()]
        left = [pid for pid in left if "sandbox" in Path(f"/proc/{pid}/cmdline").read_text()]
        if not left:
            break
        threading.Event().wait(0.02)
    assert left == []
