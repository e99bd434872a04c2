"""Every process that the product starts has an owner that notices its end, and names it.

The watcher's thread is in `test_watcher`, the checkpoint's in `test_checkpoints`, TensorBoard's in
`test_metrics_writer`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from flow_cases import questions, write_config
from harness import run_ranks
from spmdrl.batch import Batch
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.rewards.functions import RewardSpec
from spmdrl.rewards.judging import RewardJob
from spmdrl.rewards.pool import RewardPool
from spmdrl.rewards.server import RewardServer, ServerEnded, start_reward_server
from spmdrl.supervision.pulse import lives
from spmdrl.world import World
from stopping import Wrapped
from tiny_model import make_tiny_model
from torchrun import attempt_of, wait_until

SLOW = """
import time
def slow(prompt, response, answer, entry):
    time.sleep(float(response))
    return 1.0
"""


def pool_of(server: RewardServer, directory: Path, num_workers: int = 2) -> RewardPool:
    file = directory / "slow.py"
    file.write_text(SLOW)
    return RewardPool(
        server,
        [RewardSpec(name="slow", function=f"{file}:slow")],
        num_workers=num_workers,
        timeout_s=60,
    )


def jobs(*seconds: float) -> list[RewardJob]:
    return [RewardJob(prompt="", response=str(number), answer=None) for number in seconds]


def test_the_death_of_the_server_is_named_while_workers_are_busy(tmp_path: Path) -> None:
    with start_reward_server() as server, pool_of(server, tmp_path) as pool:
        assert [result.score for result in pool.score(jobs(0, 0, 0))] == [1.0] * 3
        workers = [worker.pid for worker in pool._workers]
        process = server._process
        threading.Timer(0.5, process.send_signal, [signal.SIGKILL]).start()
        began = time.monotonic()
        with pytest.raises(ServerEnded, match=rf"process {process.pid}\) ended with exit code -9"):
            pool.score(jobs(50, 50))
        assert time.monotonic() - began < 10
        # its workers do not outlive it, also where they do not listen
        wait_until(lambda: not any(map(lives, workers)), 10)
        assert "exit code -9" in (server.ended() or "")
    assert server.ended() is None  # closed


def test_a_worker_that_dies_between_calls_is_named_once_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with start_reward_server() as server, pool_of(server, tmp_path) as pool:
        pool.score(jobs(0, 0))
        first, *_ = pool._workers
        with caplog.at_level(logging.WARNING, "spmdrl"):
            pool.look()
            assert caplog.messages == []
            os.kill(first.pid, signal.SIGKILL)
            wait_until(lambda: not lives(first.pid), 10)
            pool.look()
            pool.look()
            assert [result.score for result in pool.score(jobs(0, 0, 0))] == [1.0] * 3
        assert caplog.messages == [
            f"a reward worker (process {first.pid}) died between two calls; another takes its place"
        ]
        assert first.pid not in [worker.pid for worker in pool._workers]


class KillsTheServer(Wrapped):
    """The second step's samples are scored when the reward server is killed, and a worker."""

    def collect(self, step: int) -> Batch:
        batch = self.inner.collect(step)
        if step == 1:
            pool = self.run._scorer.pool
            assert pool is not None
            os.kill(pool._server._process.pid, signal.SIGKILL)
            began = time.monotonic()
            wait_until(lambda: self.run._life.watcher.stop_asked, 20)
            print(f"noticed after {time.monotonic() - began:.1f} s", flush=True)
        return batch


def lose_the_server(world: World, path: str) -> str:
    with start_reward_server() as server, pytest.raises(RuntimeError) as caught:
        train(load_config(path, []), world, server)
    return str(caught.value)


def test_a_run_whose_reward_server_dies_saves_and_names_it(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    path = write_config(
        tmp_path / "config.yaml",
        tmp_path / "model",
        tmp_path / "run",
        data=questions(tmp_path / "questions.jsonl"),
        environment=f"{__name__}:KillsTheServer",
    )
    [message] = run_ranks(lose_the_server, 1, str(path))
    assert "rank 0: the reward server (process" in message and "exit code -9" in message
    assert "the reward server" in (attempt_of(tmp_path / "run") / "failed").read_text()
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text()
    assert latest.startswith("step_00000001+")  # within the step, what was scored is kept
