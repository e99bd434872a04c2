"""`spmdrl launch`: torchrun's launcher with Ctrl-C as a request, and one error shown once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from flow_cases import questions, write_config
from interrupted import PHASE, Started, busy, living
from spmdrl.commands.cli import parse
from spmdrl.commands.launch import show_failure, torchrun_options
from spmdrl.supervision.error_file import EXIT_CODE, LOST_PEER
from tiny_model import make_tiny_model
from torchrun import attempt_of, wait_until

WORDS = ["train", "configs/gsm8k.yaml", "steps=2"]


@pytest.fixture
def variables(monkeypatch) -> Iterator[None]:
    # a shell ignores some of them for what it starts in the background, and so does `launch` then
    before = {one: signal.signal(one, signal.SIG_DFL) for one in (signal.SIGHUP, signal.SIGQUIT)}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("SPMDRL_LAUNCH", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


def test_options_are_torchruns_and_the_script_is_the_command(variables, tmp_path: Path) -> None:
    options = torchrun_options(["--nproc-per-node=2", *WORDS], ["--traceback"], str(tmp_path))
    assert (options.module, options.training_script) == (True, "spmdrl")
    assert options.training_script_args == ["--traceback", *WORDS]
    assert options.nproc_per_node == "2" and options.log_dir == str(tmp_path)
    assert options.signals_to_handle.split(",") == ["SIGHUP", "SIGQUIT"]
    cores = len(os.sched_getaffinity(0))
    assert os.environ["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    os.environ["OMP_NUM_THREADS"] = "7"
    torchrun_options(["--nproc-per-node=2", *WORDS], [], str(tmp_path))
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("words", [["--fold", *WORDS], [*WORDS, "--fold"]])
def test_a_fold_is_the_commands_word(variables, tmp_path: Path, words: list[str]) -> None:
    options = torchrun_options(["--nproc-per-node=2", *words], [], str(tmp_path))
    assert options.training_script_args == [*WORDS, "--fold"]
    assert parse(options.training_script_args).fold


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain", "configs/gsm8k.yaml"], "'explain' is no command of the ranks"),
        (["-m", *WORDS], "name a program, which is known"),
        (["--nproc-per-node=0", *WORDS], "it must be at least 1"),
        (["--nproc-per-node=many", *WORDS], "many"),
        (["--nnodes=2:1", *WORDS], "--nnodes=2:1: it must be a number or MIN:MAX"),
        (["--nnodes=two", *WORDS], "--nnodes=two"),
        (["--max-restarts=-1", *WORDS], "--max-restarts=-1"),
        (["--signals-to-handle=SIGNO", *WORDS], "SIGNO"),
    ],
)
def test_wrong_options_are_one_error(variables, tmp_path: Path, words, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        torchrun_options(words, [], str(tmp_path))
    assert message in str(caught.value)


def failure(directory: Path, rank: int, code: int, content: object = None) -> ProcessFailure:
    file = directory / f"error_{rank}.json"
    if content is not None:
        file.write_text(json.dumps({"message": content}))
    return ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=code, error_file=str(file))


def error(text: str, timestamp: int, *, code: int = 1, lost: bool = False) -> dict[str, object]:
    more = {EXIT_CODE: code, LOST_PEER: lost}
    stack = f"stack of {text}\n"
    information = {"py_callstack": stack, "timestamp": str(timestamp), **more}
    return {"message": text, "extraInfo": information}


def test_the_first_own_error_is_shown_alone(tmp_path: Path, capsys) -> None:
    failures = {
        0: failure(tmp_path, 0, 1, error("lost", 5, lost=True)),
        1: failure(tmp_path, 1, 1, error("late", 9)),
        2: failure(tmp_path, 2, 1, error("early", 8)),
        3: failure(tmp_path, 3, -signal.SIGTERM),
    }
    assert show_failure(failures) == 1
    assert capsys.readouterr().err == "rank 2:\nstack of early\n"
    # a rank that was killed says nothing itself
    dead = {0: failures[0], 3: failures[3], 4: failure(tmp_path, 4, -signal.SIGKILL)}
    assert show_failure(dead) == 128 + signal.SIGKILL
    assert capsys.readouterr().err == ("spmdrl launch: rank 4 (process 104) died of SIGKILL\n")
    # bad input is one line, also of a rank that was ended while it left; on another node nothing
    # but what was lost
    line = error("spmdrl train: error: x", 3, code=2)
    mistakes = {5: failure(tmp_path, 5, -signal.SIGTERM, line), 6: failure(tmp_path, 6, 2, line)}
    assert show_failure(mistakes) == 2
    assert capsys.readouterr().err == "spmdrl train: error: x\n"
    assert show_failure({0: failures[0]}) == 1
    assert capsys.readouterr().err == "lost\n"


def test_a_mistake_is_one_line_whoever_finds_it(tmp_path: Path) -> None:
    """A key that is unknown is found before there are ranks; a device that is none, by them."""
    config = write_config(tmp_path / "a.yaml", tmp_path / "model", tmp_path / "run")
    command = [sys.executable, "-m", "spmdrl", "launch", "--nproc-per-node=2"]
    for words, start in (
        (["train", str(config), "stepz=3"], "spmdrl launch: error: "),
        (["doctor", "--device=tpu"], "spmdrl doctor: error: device='tpu'"),
    ):
        done = subprocess.run(
            [*command, *words], capture_output=True, text=True, timeout=100, check=False
        )
        assert (done.returncode, done.stdout) == (2, ""), done
        assert done.stderr.count("\n") == 1 and done.stderr.startswith(start), done.stderr


@pytest.mark.parametrize("command", ["train", "eval"])
def test_ctrl_c_while_the_launcher_imports_torch(tmp_path: Path, command: str) -> None:
    log = tmp_path / "log"
    with Started("launch", command, "none.yaml", log=log, terminal=True) as run:
        wait_until(lambda: "libtorch" in Path(f"/proc/{run.process.pid}/maps").read_text(), 30)
        run.interrupt("typed")
        code = run.wait(20)
    lines = [line for line in run.output().splitlines() if line.strip("^C\r\n")]
    if command == "train":
        assert lines == ["spmdrl launch: stopped before any rank was started: nothing was to save"]
    else:
        assert lines == ["spmdrl eval: interrupted"]
    assert code == (0 if command == "train" else 130)


@pytest.mark.parametrize(
    ("starter", "way"),
    [
        ("one", "typed"),
        pytest.param("launch", "typed", marks=pytest.mark.full),
        pytest.param("launch", "all", marks=pytest.mark.full),
        pytest.param("torchrun", "typed", marks=pytest.mark.full),
    ],
)
def test_eval_ends_in_one_line(tmp_path: Path, starter: str, way: str) -> None:
    make_tiny_model(tmp_path / "model")
    config = write_config(
        tmp_path / "eval.yaml",
        tmp_path / "model",
        tmp_path / "run",
        data=questions(tmp_path / "questions.jsonl"),
        evaluation={"held_out": 30, "num_samples": 16},
        sampling={"max_tokens": 400},
    )
    log = tmp_path / "log"
    with Started(starter, "eval", str(config), log=log, terminal=way == "typed") as run:
        wait_until((tmp_path / "run").exists, 60)
        time.sleep(1.0)
        pids = run.tree()
        run.interrupt(way)
        code = run.wait(20)
        wait_until(lambda: not living(pids), 2)
    assert code == (1 if starter == "torchrun" else 130), run.output()
    assert run.output().count("spmdrl eval: interrupted") == 1
    assert starter == "torchrun" or "Traceback" not in run.output(), run.output()


HERE = Path(__file__).parents[1]


def configure(root: Path, environment: str) -> list[str]:
    """The words of a small run with an environment of the tests'."""
    make_tiny_model(root / "model")
    data = questions(root / "questions.jsonl")
    config = write_config(root / "run.yaml", root / "model", root / "run", data=data)
    return [str(config), f"environment={HERE / environment}"]


@pytest.mark.full
def test_a_crash_is_the_first_ranks_stack_once(tmp_path: Path) -> None:
    words = configure(tmp_path, "misbehaving.py:Raises")
    with Started("launch", "train", *words, log=tmp_path / "log", terminal=False) as run:
        assert run.wait(100) == 1
    output = run.output()
    assert output.count("Traceback") == 1 and "\nrank 1:\nTraceback" in output, output
    assert output.rstrip().endswith("RuntimeError: rank 1 had enough")
    assert "Root Cause" not in output and "torch/distributed/run.py" not in output


@pytest.mark.full
def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    words = configure(tmp_path, "misbehaving.py:Dies")
    with Started("launch", "train", *words, log=tmp_path / "log", terminal=False) as run:
        assert run.wait(100) == 128 + signal.SIGKILL
    assert "Traceback" not in run.output(), run.output()
    assert run.output().splitlines()[-1].endswith("died of SIGKILL")


@pytest.mark.full
def test_ctrl_c_in_a_debugger_under_launch_is_the_debuggers(tmp_path: Path) -> None:
    words = configure(tmp_path, "interrupted.py:Breaks")
    log = tmp_path / "log"
    before = ("--nproc-per-node=1", "train", *words)
    with Started("launch", *before, log=log, terminal=True) as run:
        wait_until(lambda: "(Pdb)" in run.output(), 100)
        for number in (1, 2, 3):
            run.interrupt("typed")
            wait_until(lambda n=number: run.output().count("--KeyboardInterrupt--") == n, 20)
            time.sleep(1.5)
        os.write(run.terminal, b"c\n")
        assert run.wait(60) == 0, run.output()
    assert (attempt_of(tmp_path / "run") / "outcome").read_text() == "done\n"


@pytest.mark.full
def test_a_rank_that_does_not_answer_is_killed(tmp_path: Path) -> None:
    words = configure(tmp_path, "interrupted.py:InPhase")
    log, terminal = tmp_path / "log", True
    with Started("launch", "train", *words, log=log, terminal=terminal, phase="rollout") as run:
        run.reach(tmp_path / "run", "rollout")
        pids = run.tree()
        rank = max(pid for pid in pids if b"-u" in words_of(pid))
        os.kill(rank, signal.SIGSTOP)
        run.interrupt("typed")
        time.sleep(1.2)
        run.interrupt("typed")
        began = time.monotonic()
        assert run.wait(20) == 130
        wait_until(lambda: not living(pids), 20)
        assert time.monotonic() - began < 2.0 * busy()
    assert "ranks that did not end were killed" in run.output()


def words_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


@pytest.mark.full
def test_patience_is_limited_where_the_user_limits_it(tmp_path: Path) -> None:
    words = configure(tmp_path, "interrupted.py:InPhase")
    before = ("--shutdown-timeout=1", "train", *words)
    log = tmp_path / "log"
    with Started("launch", *before, log=log, terminal=False, phase="rollout slow") as run:
        run.reach(tmp_path / "run", "rollout")
        pids = run.tree()
        run.interrupt("first")
        assert run.wait(20) == 130
        wait_until(lambda: not living(pids), 20)
    assert "spmdrl launch: ranks have not ended within 1 s: killed" in run.output()


@pytest.mark.full
def test_sigterm_saves_too(tmp_path: Path) -> None:
    words = configure(tmp_path, "interrupted.py:InPhase")
    log = tmp_path / "log"
    with Started("launch", "train", *words, log=log, terminal=False, phase="rollout") as run:
        run.reach(tmp_path / "run", "rollout")
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.wait(60) == 0, run.output()
    attempt = attempt_of(tmp_path / "run")
    assert (attempt / "outcome").read_text() == "stopped\n"
    assert (attempt / "stopped_by").read_text() == "SIGTERM\n"


@pytest.mark.full
def test_a_script_that_starts_it_beside_itself_may_interrupt_it(tmp_path: Path) -> None:
    """A shell lets what it starts with `&` ignore SIGINT."""
    words = configure(tmp_path, "interrupted.py:InPhase")
    log = (tmp_path / "log").open("wb")
    run = subprocess.Popen(
        [sys.executable, "-m", "spmdrl", "launch", "--nproc-per-node=2", "train", *words],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, PHASE: "rollout"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    with log, run:
        wait_until((tmp_path / "run" / "in_rollout").exists, 100)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 0
    assert (attempt_of(tmp_path / "run") / "stopped_by").read_text() == "SIGINT\n"
