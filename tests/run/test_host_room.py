"""A run whose parts do not fit on a node's host is refused before anything is loaded."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from flow_cases import run_configs, write_config
from harness import run_ranks
from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.models.config import read_config
from spmdrl.placement import place_roles
from spmdrl.planning.host_memory import host_memory, saved_bytes
from spmdrl.planning.plan import RolePlan, plan_roles
from spmdrl.run import host_room
from spmdrl.run.host_room import check_host, free_host_bytes
from spmdrl.world import World
from tiny_model import make_tiny_model

STREAM = "roles.policy.residency.optimizer=stream"


def planned(
    path: Path, *words: str, device: str = "cuda", ranks: int = 2
) -> tuple[Config, RolePlan]:
    config = load_config(path, words)
    placements = place_roles(config, ranks)
    shapes = {name: read_config(config.model_path(name)) for name in placements}
    plan = plan_roles(config, placements, shapes, [device] * ranks, gpu_bytes=10**9)
    return config, plan


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "model")
    return write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")


def checked(world: World, path: Path) -> list[str]:
    config, plan = planned(path, STREAM)
    need = host_memory(config, plan, 2, 2)
    assert 0 < need.offloaded == 2 * plan.memory[0].windowed["policy"]
    found = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    host_room.log.addHandler(Kept())
    # a node of several has less than the others
    for free in (need.offloaded - 1, need.offloaded + 1, 10**12):
        room = free if world.rank == 1 or free > need.offloaded else 10**12
        host_room.free_host_bytes = lambda room=room: room  # type: ignore[assignment]
        try:
            check_host(config, plan, world)
        except ValueError as error:
            found.append(str(error))
    # on CPUs there is nothing that is pinned
    host_room.free_host_bytes = lambda: 0  # type: ignore[assignment]
    check_host(*planned(path, STREAM, device="cpu"), world)
    return found


def test_all_ranks_refuse_what_a_host_has_no_room_for(path: Path) -> None:
    first, second = run_ranks(checked, 2, path)
    assert "parts that stay on the host or move there need" in first[0] and "--mem" in first[0]
    assert first[0] == second[0]
    assert [line.startswith("a checkpoint copies") for line in first[1:]] == [True]
    assert len(second) == 1


def test_a_plan_counts_what_a_checkpoint_has(tmp_path: Path, path: Path) -> None:
    """Each value once, whichever ranks hold it."""
    for name, words in {
        "copies": ("model.dtype=bfloat16",),
        "shards": ("roles.policy.dp_shard=2",),
        "adapter": ("roles.policy.adapter={rank: 4}",),
    }.items():
        words = (*words, "steps=1", "checkpoint.every=1", f"run_dir={tmp_path / name}")
        config, plan = planned(path, *words, device="cpu")
        run_ranks(run_configs, 2, [(str(path), list(words))], "")
        files = list((tmp_path / name / "checkpoints").glob("*/*.safetensors"))
        written = sum(file.stat().st_size for file in files)
        size = saved_bytes(plan.specs["policy"])
        assert size < written < 1.2 * size + 100_000, name
        assert host_memory(config, plan, 2, 2).checkpoint == pytest.approx(size, abs=2)


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("", {}, 4096 * 1024),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "1"}, 4096 * 1024),
        (
            "0::/slurm/job_1/task_0\n",
            {
                "slurm/job_1/memory.max": "3000000",
                "slurm/job_1/memory.current": "1000000",
                "slurm/job_1/task_0/memory.max": "max",
                "slurm/job_1/task_0/memory.current": "1000000",
            },
            2_000_000,
        ),
        (
            "5:cpuset:/a\n4:cpu,memory:/slurm/job_1\n",
            {
                "memory/slurm/job_1/memory.limit_in_bytes": "900000",
                "memory/slurm/job_1/memory.usage_in_bytes": "1000000",
            },
            0,
        ),
    ],
    ids=["no groups", "no limit", "a job's limit, version 2", "a job's limit, version 1"],
)
def test_the_least_limit_counts(
    tmp_path: Path, groups: str, files: dict[str, str], free: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   4096 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    assert free_host_bytes(tmp_path) == free
    assert free_host_bytes(tmp_path / "nothing") is None
