"""Times of phases with a clock that the test turns, and peak memory."""

import pytest
import torch

from spmdrl.observe.timeline import PhaseTimer, take_peak_memory, timing_metrics


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.synchronized = 0

    def __call__(self) -> float:
        return self.now

    def synchronize(self) -> None:
        self.synchronized += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timer(clock: Clock) -> PhaseTimer:
    return PhaseTimer(synchronize=clock.synchronize, clock=clock)


def test_phases_add_up_to_the_step_and_inner_phases_count_once(timer, clock):
    clock.now = 1.0
    with timer.phase("rollout"):
        clock.now = 4.0
        with timer.phase("reward"):
            clock.now = 4.5
        clock.now = 6.0
    with timer.phase("update"):
        clock.now = 8.0
    with timer.phase("rollout"):
        clock.now = 9.0
    clock.now = 9.25
    step = timer.finish()
    assert step == {"rollout": 5.5, "reward": 0.5, "update": 2.0, "other": 1.25}
    assert list(step)[-1] == "other"
    assert clock.synchronized >= 8
    clock.now = 10.0
    again = timer.finish()
    assert again == {"other": 0.75}


def test_a_failing_phase_is_left_without_waiting_for_the_device(timer, clock):
    before = clock.synchronized
    with pytest.raises(RuntimeError, match="boom"), timer.phase("update"):
        raise RuntimeError("boom")
    assert clock.synchronized == before + 1
    clock.now = 3.0
    assert timer.finish() == {"update": 0.0, "other": 3.0}


def test_metrics_of_times():
    metrics = timing_metrics({"rollout": 2.0, "update": 0.0, "other": 1.0}, {"rollout": 50.0})
    assert metrics == {
        "seconds/rollout": 2.0,
        "seconds/update": 0.0,
        "seconds/other": 1.0,
        "seconds/step": 3.0,
        "tokens_per_s/rollout": 25.0,
    }
    assert "tokens_per_s/update" not in timing_metrics({"update": 0.0}, {"update": 5.0})


def test_peak_memory_sees_an_allocation():
    before = take_peak_memory(torch.device("cpu"))
    block = torch.ones(60_000_000)  # 240 MB
    after = take_peak_memory(torch.device("cpu"))
    assert after >= before
    assert after >= block.numel() * 4
    del block
    assert take_peak_memory(torch.device("cpu")) >= after - 2**20
