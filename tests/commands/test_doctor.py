"""`spmdrl doctor` names the nodes that are bad, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import run_ranks
from spmdrl.commands.doctor import Diagnosis, Report, diagnose, doctor
from spmdrl.commands.node_links import neighbours
from spmdrl.commands.node_speed import RankSpeed, throttle_reasons
from spmdrl.commands.slow_nodes import (
    PlannedSpeed,
    SpeedLimits,
    judge_speeds,
    planned_speed,
    speed_file,
)
from spmdrl.planning.forecast.machines import load_machine
from spmdrl.world import World


def report(rank: int, *problems: str, torch: str = "2.13", node: str | None = None) -> Report:
    return Report(rank=rank, node=node or f"n{rank}", versions={"torch": torch}, problems=problems)


def ring(count: int, slow: set[int], speed: float = 10.0) -> dict[tuple[int, int], float]:
    """Neighbours' speeds: 1 where one of them is slow."""
    pairs = [(a, (a + 1) % count) for a in range(count)]
    return {pair: 1.0 if slow.intersection(pair) else speed for pair in pairs}


@pytest.mark.parametrize(
    ("reports", "intra", "inter", "bad", "words"),
    [
        ([report(r) for r in range(3)], [50.0] * 3, ring(3, set()), (), "n0 and n1: all-reduce"),
        (
            [report(0), report(1, "/dev/shm has 0.06 GB free"), report(2)],
            [50.0] * 3,
            ring(3, set()),
            ("n1",),
            "n1, rank 1: /dev/shm",
        ),
        (
            [report(0), report(1), report(2, torch="2.12")],
            [],
            ring(3, set()),
            ("n2",),
            "n2, rank 2: torch is 2.12, and 2.13 on most ranks",
        ),
        ([report(r) for r in range(3)], [50, 3, 50], {}, ("n1",), "n1: that is below 20 GB/s"),
        # of the pairs (1, 2) and (2, 3) only node 2 is slow with all that it was tried with
        ([report(r) for r in range(4)], [], ring(4, {2}), ("n2",), "n1 and n2: that is below 5"),
        ([report(r) for r in range(2)], [], {(0, 1): 1.0}, ("n0", "n1"), "n0 and n1: that is"),
    ],
)
def test_who_is_bad(
    reports: list[Report],
    intra: list[float],
    inter: dict[tuple[int, int], float],
    bad: tuple[str, ...],
    words: str,
) -> None:
    nodes = [r.node for r in reports]
    found = diagnose(reports, nodes, intra, inter, min_intra=20, min_inter=5)
    assert found.bad == bad
    assert any(words in line for line in found.lines), found.lines


def test_a_note_is_printed_and_makes_no_node_bad() -> None:
    noted = Report(rank=0, node="n0", versions={}, problems=(), notes=("torch finds an xpu",))
    found = diagnose([noted], ["n0"], [], {})
    assert found == Diagnosis(lines=("n0, rank 0: torch finds an xpu",), bad=())


def speed(flops: float = 1e12, **changed: object) -> RankSpeed:
    found = {
        "drift": 1.0,
        "copy": 1e11,
        "host": None,
        "disk": 1e9,
        "disk_error": None,
        "clocks": (),
    }
    return RankSpeed(flops=flops, **{**found, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("speeds", "slow", "words"),
    [
        ([speed(), speed(0.9e12)], [], "products: 0.95 TFLOP/s in the median, 0.9 at least"),
        ([speed(), speed(0.5e12)], ["n1"], "n1, rank 1: products at 0.5 TFLOP/s, 0.50 of the"),
        # of one rank each figure counts, and none says anything of the others
        ([speed(), speed(), speed(copy=2e10)], ["n2"], "n2, rank 2: copies in memory at 20 GB/s"),
        ([speed(), speed(disk=0.45e9)], [], "writes to the disk: 0.725 GB/s in the median"),
        ([speed(), speed(disk=0.3e9)], ["n1"], "n1, rank 1: writes to the disk at 0.3 GB/s, 0.30"),
        ([speed(), speed(disk=None)], [], "writes to the disk: 1 GB/s"),
        ([speed(), speed(disk=None, disk_error="full")], ["n1"], "no file could be written: full"),
        (
            [speed(2e11), speed(2e11)],
            ["n0", "n1"],
            "n0, rank 0: products at 0.2 TFLOP/s, below 0.3",
        ),
        (
            [speed(), speed(clocks=("power brake",))],
            ["n1"],
            "n1, rank 1: lowered clocks: power brake",
        ),
        ([speed(), speed(drift=0.5)], [], "n1, rank 1: products became slower"),
        ([*[speed()] * 20, speed(0.5e12)], ["n20"], "n20, rank 20: products at 0.5 TFLOP/s"),
    ],
)
def test_who_is_slow(speeds: list[RankSpeed], slow: list[str], words: str) -> None:
    nodes = [f"n{rank}" for rank in range(len(speeds))]
    limits = SpeedLimits(share=0.85, least={"flops": 0.3})
    lines, found = judge_speeds(speeds, nodes, limits)
    assert found == slow
    assert any(words in line for line in lines), lines


def test_a_plans_figures_are_those_of_its_machine() -> None:
    machine = load_machine("h100", num_nodes=2, devices_per_node=8)
    plan = planned_speed(machine)
    assert plan.machine == machine.device.name
    assert 2e14 < plan.flops < machine.device.flops["bfloat16"]
    assert 1e12 < plan.copy < machine.device.memory_rate
    assert plan.intra > plan.inter > 1e9 and plan.host > 1e10


def test_planned_figures_stand_beside_measured_ones() -> None:
    plan = PlannedSpeed(machine="h100", flops=5e14, copy=3e12, host=5e10, intra=4e11, inter=5e10)
    lines, _ = judge_speeds([speed()], ["n0"], SpeedLimits(share=0.0, least={}), plan)
    assert lines[0].endswith("1 at least; h100 is planned with 500")
    content = json.loads(speed_file([speed()], ["n0"], {"intra": []}, ["n0"], plan))
    assert content["plan"]["flops"] == 5e14 and content["ranks"][0]["flops"] == 1e12
    assert content["bad"] == ["n0"] and content["ranks"][0]["node"] == "n0"


def test_only_faults_count_as_lowered_clocks() -> None:
    assert throttle_reasons("0x0000000000000000") == throttle_reasons("[N/A]") == ()
    assert throttle_reasons("0x0000000000000004") == ()  # a power cap is usual under load
    assert throttle_reasons("0x0000000000000068") == (
        "hardware slowdown",
        "software thermal slowdown",
        "hardware thermal slowdown",
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_neighbours_meet_once_and_most_pairs_at_the_same_time(count: int) -> None:
    pairs = neighbours(count)
    wanted = {frozenset((a, (a + 1) % count)) for a in range(count)} if count > 1 else set()
    assert {frozenset(pair) for pair in pairs} == wanted and len(pairs) == len(wanted)
    first = [node for pair in pairs[: count // 2] for node in pair]
    assert len(set(first)) == len(first)


def examine(world: World, shared: Path, name: str) -> Diagnosis:
    if world.rank == 1 and name == "blind":
        shared = shared / "elsewhere"  # as if it were not mounted there
    return doctor(
        world,
        shared=shared,
        min_intra=1e9 if name == "slow" else 0.0,
        limits=SpeedLimits(share=0.0, least={}) if name == "measured" else None,
        seconds=0.2,
    )


def test_two_ranks_are_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run_ranks(examine, 2, tmp_path, "well")
    assert first == second and first.bad == ()
    assert any("all-reduce within the node" in line for line in first.lines)
    assert list(tmp_path.iterdir()) == []
    first, _ = run_ranks(examine, 2, tmp_path, "slow")
    assert len(first.bad) == 1
    first, second = run_ranks(examine, 2, tmp_path, "measured")
    assert first == second and first.bad == ()
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    assert [one["rank"] for one in content["ranks"]] == [0, 1] and content["plan"] is None
    assert all(one["flops"] > 1e8 and one["copy"] > 1e7 for one in content["ranks"])
    assert [one["disk"] is None for one in content["ranks"]] == [False, True]
    assert content["links_gb_s"]["intra"][0] > 0
