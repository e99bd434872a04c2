"""A slow rank is named, with its host, phase and factor; ranks with more data are not."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from pathlib import Path

import pytest
import slow_update
import torch
import torch.distributed as dist

from flow_cases import run_configs, write_config
from harness import run_ranks
from spmdrl.observe.own_work import HOME, OwnWork, Waits, find_straggler, measured_waits
from spmdrl.run.stragglers import Stragglers
from spmdrl.world import World
from tiny_model import make_tiny_model

HERE = Path(__file__).parent


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run_slowly(world: World, config: str, where: str, words: list[str], replay: str) -> list[str]:
    os.environ[slow_update.WHERE] = where
    heard = Lines()
    logging.getLogger("spmdrl.run.stragglers").addHandler(heard)
    run_configs(world, [(config, words)], replay)
    return heard.lines


@pytest.mark.parametrize(
    ("where", "words", "place"),
    [
        ("inside", ["roles.policy.dp_shard=2"], r"update, in policy\.update"),
        pytest.param(
            *("inside", ["roles.policy.dp_shard=1"], r"update, in policy\.update"),
            marks=pytest.mark.full,
        ),
        pytest.param("before", [], "advantages", marks=pytest.mark.full),
    ],
)
def test_a_planted_sleep_is_named(tmp_path: Path, where: str, words: list[str], place: str) -> None:
    make_tiny_model(tmp_path / "model")
    trainer = f"{HERE / 'slow_update.py'}:SlowUpdate"
    config = write_config(
        tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run", steps=7, trainer=trainer
    )
    arguments = (str(config), where, words, str(tmp_path / "replay"))
    first, second = run_ranks(run_slowly, 2, *arguments)
    assert second == []
    (line,) = first  # of seven steps the first is left out, and five are compared
    found = re.fullmatch(
        rf"rank 1 on (\S+) is slow in {place}: ([\d.]+) times .*, ([\d.]+) s .*", line
    )
    assert found is not None, line
    assert found[1] == socket.gethostname() and float(found[2]) > 1.25
    assert float(found[3]) > 0.5 * 5 * slow_update.SLEEP_S


def waiting(world: World) -> dict[str, float]:
    stragglers = Stragglers(world)
    stragglers.begin()
    began = time.perf_counter()
    with stragglers.phase("update"):
        time.sleep(0.4 * world.rank)
        dist.all_reduce(torch.ones(1))  # rank 0 waits here
    with stragglers.phase("reward"):
        time.sleep(0.1)
    found = stragglers.idle({"update": time.perf_counter() - began - 0.1, "reward": 0.1})
    stragglers.close()
    return found


def test_the_share_that_ranks_wait_is_told_by_phase() -> None:
    one, other = run_ranks(waiting, 2)
    for found in (one, other):
        assert found["idle/update"] == pytest.approx(0.5, abs=0.1)
        assert found["idle/reward"] < 0.05


def work(world: World, seconds: list[float], tokens: list[int]) -> object:
    waits = Waits()
    with measured_waits(waits):
        meter, began = OwnWork(waits), time.perf_counter()
        with meter.phase("update"):
            meter.expect("policy.update")
            with meter.call("policy.update") as count:
                time.sleep(seconds[world.rank])
                dist.all_reduce(torch.ones(1))  # the others wait here
                count(tokens[world.rank])
        passed = time.perf_counter() - began
        found = meter.take(10)
    table = [torch.empty(len(found), 3, dtype=torch.float64) for _ in range(world.size)]
    dist.all_gather(table, torch.tensor(list(found.values()), dtype=torch.float64))
    own = found["update", "policy.update"]
    return find_straggler(torch.stack(table), list(found), passed), own[0], passed


@pytest.mark.parametrize(
    ("tokens", "named"), [([100, 100, 100], 2), ([100, 100, 300], None), ([100, 100, 50], 2)]
)
def test_waiting_is_not_work_and_more_data_is_not_slowness(
    tokens: list[int], named: int | None
) -> None:
    results = run_ranks(work, 3, [0.2, 0.2, 0.6], tokens)
    straggler, own, passed = results[0]
    assert own < 0.45 < passed
    if named is None:
        assert straggler is None
    else:
        assert straggler.rank == named and straggler.key == ("update", "policy.update")
        assert 2 < straggler.factor < 4


def table(*rows: tuple[float, float, int]) -> torch.Tensor:  # (seconds, tokens, kind) by rank
    return torch.tensor(rows, dtype=torch.float64)[:, None]


@pytest.mark.parametrize(
    ("rows", "seconds", "rank"),
    [
        ([(1, 10, 0), (1, 10, 0), (1.2, 10, 0)], 1, None),
        ([(1, 10, 0), (1, 10, 0), (1.5, 10, 0)], 1, 2),
        ([(1, 10, 0), (1, 10, 0), (1.5, 10, 0)], 100, None),  # not worth a line
        ([(1, 10, 0), (1.5, 10, 1), (1.5, 10, 1)], 1, None),  # another stage of a pipeline
        ([(1, 10, 0), (0, 0, 0), (0, 0, 0)], 1, None),  # ranks outside the role
        # little data: a larger share of what does not depend on it
        ([(1, 10, 0), (1, 10, 0), (0.8, 2, 0)], 1, None),
        ([*[(1, 10, 0)] * 40, (2, 10, 0), *[(1, 10, 0)] * 40], 2, 40),
    ],
)
def test_who_is_a_straggler(
    rows: list[tuple[float, float, int]], seconds: float, rank: int | None
) -> None:
    found = find_straggler(table(*rows), [("rollout", HOME)], seconds)
    assert (None if found is None else found.rank) == rank
    if found is not None:
        assert found.describe("n7").startswith(f"rank {rank} on n7 is slow in rollout: ")


def test_torch_waits_by_itself_again_after_the_block() -> None:
    before = dist.Work.wait
    with measured_waits(Waits()):
        assert dist.Work.wait is not before
    assert dist.Work.wait is before
