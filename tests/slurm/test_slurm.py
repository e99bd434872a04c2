"""Batch jobs on a real Slurm with two emulated nodes: scripts/slurm, signals, requeues.

The cases that take longest run in scripts/test_faults.sh alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import PATIENCE_S, ROOT, Job, Lab

from flow_cases import write_config
from saved_runs import CLOCKS
from spmdrl.observe.metrics import read_metrics
from tiny_model import make_tiny_model
from torchrun import heartbeat, outcome_of, wait_until

pytestmark = pytest.mark.slurm

NODES = ("--nodes=2", "--cpus-per-task=2")
FAULTS = "SPMDRL_TEST_FAULTS" in os.environ
all_cases = pytest.mark.skipif(not FAULTS, reason="scripts/test_faults.sh runs it")


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root, and this is not root")
    if shutil.which("slurmctld") is None:
        pytest.fail("slurmctld is not installed: scripts/dev/install_slurm.sh does it")
    lab = Lab(tmp_path_factory.mktemp("lab"))
    lab.up()
    try:
        yield lab
    finally:
        lab.down()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("jobs")
    make_tiny_model(root / "model")
    return root


def config_of(root: Path, name: str = "Slow", **sections: object) -> str:
    environment = f"{ROOT / 'tests/slurm/environments.py'}:{name}"
    path = root / f"{name}.yaml"
    write_config(
        path, root / "model", root / "unused", steps=8, environment=environment, **sections
    )
    return str(path)


def records(run_dir: Path) -> list[dict[str, float]]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines]


def start(lab: Lab, root: Path, run: str, *words: str, name: str = "Slow", **variables: str) -> Job:
    run_dir = str(root / run)
    return lab.submit(
        "train.sbatch", config_of(root, name), *words, options=NODES, RUN_DIR=run_dir, **variables
    )


@pytest.fixture(scope="module")
def whole(lab: Lab, root: Path) -> Path:
    """The run directory of a job that nobody disturbed."""
    job = start(lab, root, "whole")
    assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
    return root / "whole"


def in_step(run_dir: Path, step: int) -> bool:
    """Whether the run has come to a step, as its checkpoints or heartbeats say."""
    file = run_dir / "metrics.jsonl"
    return file.is_file() and len(file.read_bytes().splitlines()) >= step


def test_two_nodes_train_with_ranks_in_node_order_and_a_log_for_each(whole: Path) -> None:
    assert [(whole / f"seat_{rank}").read_text() for rank in (0, 1)] == ["0", "1"]
    assert outcome_of(whole) == "done" and len(records(whole)) == 8
    (attempt,) = whole.glob("attempt_*")
    assert (whole / "owner").read_text().strip() == attempt.name.removeprefix("attempt_")
    logs = sorted(
        path.relative_to(attempt).parts[1] for path in attempt.glob("ranks/*/*/*/0/*.log")
    )
    assert set(logs) == {"node_0", "node_1"}
    assert [heartbeat(whole, rank)["rank"] for rank in (0, 1)] == [0, 1]


def test_a_warning_saves_and_queues_again_and_the_run_goes_on_exactly(
    lab: Lab, root: Path, whole: Path
) -> None:
    job = start(lab, root, "warned")
    job.reach(lambda: in_step(root / "warned", 3))
    job.signal_batch("USR1")
    job.wait_for_restart()
    assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert job.restarts == 1
    assert records(root / "warned") == records(whole)
    first, _ = sorted((root / "warned").glob("attempt_*"))
    assert (first / "stopped_by").read_text().startswith("the warning that the time of the job")
    assert re.fullmatch(r"\d steps saved\n", (first / "queued_again").read_text())


def test_a_detectors_stop_concludes_the_job(lab: Lab, root: Path) -> None:
    """Rewards that are all equal: the run ends in its third step, and Slurm is done with it."""
    (root / "mine.py").write_text("def always(response):\n    return 1.0\n")
    words = (f"rewards=[{{function: '{root}/mine.py:always'}}]", "log.on_detect=stop")
    run_dir = root / "flat"
    options = ("--nodes=1", "--cpus-per-task=2")
    job = lab.submit("train.sbatch", config_of(root), *words, options=options, RUN_DIR=str(run_dir))
    assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert outcome_of(run_dir) == "done" and len(records(run_dir)) == 3
    (attempt,) = run_dir.glob("attempt_*")
    assert (attempt / "stopped_by").read_text() == "the detector flat_reward\n"
    assert "outcome done, 3 steps saved" in job.output()
    assert job.restarts == 0 and "queued again" not in job.output()


@all_cases
def test_a_warning_during_the_import_of_torch_is_not_lost(
    lab: Lab, root: Path, whole: Path
) -> None:
    job = start(lab, root, "early")
    job.reach(lambda: (root / "early" / "owner").is_file())
    time.sleep(1.5)  # interpreters have begun, and import torch
    job.signal_batch("USR1")
    job.wait_for_restart()
    assert "0 steps saved" in job.output()
    assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert records(root / "early") == records(whole)


@all_cases
def test_a_cancelled_job_saves_and_is_not_queued_again(lab: Lab, root: Path, whole: Path) -> None:
    job = start(lab, root, "cancelled")
    job.reach(lambda: in_step(root / "cancelled", 2))
    job.cancel()
    assert job.wait("CANCELLED", "FAILED", "COMPLETED") == "CANCELLED"
    wait_until(lambda: outcome_of(root / "cancelled") == "stopped", PATIENCE_S)
    assert (root / "cancelled" / "checkpoints" / "latest").is_file()
    wait_until(lambda: "outcome stopped, " in job.output(), PATIENCE_S)
    time.sleep(2)
    assert job.state == "CANCELLED" and "queued again" not in job.output()
    if FAULTS:  # what it saved is good: another job goes on from there, as after a warning
        goes_on(lab, root, "cancelled", whole)


def goes_on(lab: Lab, root: Path, name: str, whole: Path) -> None:
    """Another job resumes the run, which then equals the whole one."""
    again = start(lab, root, name)
    assert again.wait("COMPLETED", "FAILED") == "COMPLETED", again.output()
    assert records(root / name) == records(whole)


@all_cases
@pytest.mark.parametrize("whom", ["tasks", "batch"])
def test_sigint_is_a_stop_by_hand(lab: Lab, root: Path, whole: Path, whom: str) -> None:
    """Slurm signals torchrun and the ranks, and torchrun passes it on: one request."""
    name = f"interrupted_{whom}"
    job = start(lab, root, name)
    job.reach(lambda: in_step(root / name, 2))
    if whom == "tasks":
        lab.run("scancel", "--signal=INT", job.number)
    else:
        job.signal_batch("INT")
    assert job.wait("CANCELLED", "FAILED", "COMPLETED") == "COMPLETED", job.output()
    assert outcome_of(root / name) == "stopped" and "queued again" not in job.output()
    reason = "SIGINT" if whom == "tasks" else f"the file {root / name / 'stop'}"
    (attempt,) = (root / name).glob("attempt_*")
    assert (attempt / "stopped_by").read_text() == f"{reason}\n"
    goes_on(lab, root, name, whole)


@all_cases
def test_a_crash_with_progress_is_queued_again_and_one_without_is_not(lab: Lab, root: Path) -> None:
    job = start(lab, root, "crash", "checkpoint.every=1", name="CrashesAtThree")
    job.wait_for_restart()  # three steps were saved
    assert job.wait("COMPLETED", "FAILED") == "FAILED", job.output()
    assert job.restarts == 1
    output = job.output()
    assert output.count("failed: rank 1: RuntimeError: rank 1 does not like the fourth step") == 2
    assert "outcome crashed, 3 steps saved (-1 before)" in output
    assert "outcome crashed, 3 steps saved (3 before)" in output
    assert output.count("RuntimeError: rank 1 does not like the fourth step") >= 4  # torchrun too


def test_scripts_are_accepted_by_sbatch(lab: Lab) -> None:
    for script in sorted((ROOT / "scripts/slurm").glob("*.sbatch")):
        lab.run("bash", "-n", str(script))
        lab.run("sbatch", "--test-only", "--time=10", "--nodes=2", str(script))
    if shutil.which("shellcheck") is not None:
        own = [*(ROOT / "scripts/slurm").rglob("*"), *(ROOT / "scripts/dev").glob("*.sh")]
        scripts = [path for path in own if path.suffix in (".sh", ".sbatch")]
        lab.run("shellcheck", "--shell=bash", *map(str, scripts))


@all_cases
def test_a_job_that_slurm_may_not_queue_again_fails_and_says_so(lab: Lab, root: Path) -> None:
    options = (*NODES, "--no-requeue")
    run_dir = root / "once"
    job = lab.submit("train.sbatch", config_of(root), options=options, RUN_DIR=str(run_dir))
    job.reach(lambda: (run_dir / "owner").is_file())
    job.signal_batch("USR1")
    assert job.wait("COMPLETED", "FAILED") == "FAILED"
    assert f"cannot be queued again; submit it anew with RUN_DIR={run_dir}" in job.output()


@all_cases
def test_a_preempted_job_saves_and_goes_on_later(lab: Lab, root: Path, whole: Path) -> None:
    job = start(lab, root, "preempted")
    job.reach(lambda: in_step(root / "preempted", 3))
    options = ("--partition=high", "--nodes=2", "--exclusive", "--time=5")
    other = lab.submit_line("sleep 5", *options)
    job.reach(lambda: job.state != "RUNNING")
    assert other.wait("COMPLETED", "FAILED") == "COMPLETED"
    job.wait_for_restart()
    assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert "outcome stopped, " in job.output()
    assert records(root / "preempted") == records(whole)


@all_cases
def test_a_lost_node_costs_what_was_not_saved(lab: Lab, root: Path, whole: Path) -> None:
    """The daemon of node 2 dies; what still runs there can save nothing any more."""
    job = start(lab, root, "lost", "checkpoint.every=1", name="SlowAtFirst")
    job.reach(lambda: in_step(root / "lost", 2))
    lab.kill_node(2)
    try:
        job.reach(lambda: job.restarts > 0)
    finally:
        lab.start_node(2)
    assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert records(root / "lost") == records(whole)
    owner = (root / "lost" / "owner").read_text().strip()
    assert owner == f"{job.number}.{job.restarts}"


@all_cases
def test_an_array_sweeps_and_each_element_is_queued_again_by_itself(lab: Lab, root: Path) -> None:
    sweep = root / "sweep.txt"
    sweep.write_text("seed=1\nseed=2 train.lr=0.01\nseed=3\n")
    job = lab.submit(
        "sweep.sbatch",
        str(sweep),
        config_of(root),
        options=("--array=0-2%2", "--nodes=1", "--cpus-per-task=2"),
        RUN_DIR=str(root / "sweep"),
    )
    second = Job(lab, f"{job.number}_1", lab.directory / "jobs")
    second.reach(lambda: in_step(root / "sweep" / "1", 2))
    second.signal_batch("USR1")
    second.wait_for_restart()
    for element in range(3):
        wait_until(lambda e=element: ended_well(root / "sweep" / str(e)), PATIENCE_S)
    assert second.restarts == 1
    learned = [records(root / "sweep" / str(element))[-1]["lr"] for element in range(3)]
    assert learned == [1e-3, 1e-2, 1e-3]


def ended_well(run_dir: Path) -> bool:
    return bool(list(run_dir.glob("attempt_*"))) and outcome_of(run_dir) == "done"


@all_cases
def test_tasks_of_srun_can_be_the_ranks(lab: Lab, root: Path, whole: Path) -> None:
    job = start(lab, root, "direct", SPMDRL_LAUNCH="srun")
    job.reach(lambda: in_step(root / "direct", 3))
    job.signal_batch("USR1")
    job.wait_for_restart()
    assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert records(root / "direct") == records(whole)
    (log,) = (root / "direct").glob("attempt_*.1/ranks/rank_0.log")
    assert "continuing after step" in log.read_text()


@all_cases
def test_preflight_names_nodes_and_eval_answers(lab: Lab, root: Path) -> None:
    run_dir = str(root / "preflight")
    words = ("--slow", "0")  # the nodes share this host
    well = lab.submit("preflight.sbatch", *words, options=("--nodes=2",), RUN_DIR=run_dir)
    assert well.wait("COMPLETED", "FAILED") == "COMPLETED", well.output()
    assert "all nodes are well" in well.output()
    words = ("--min-inter", "1e6", "--no-speed")
    slow = lab.submit("preflight.sbatch", *words, options=("--nodes=2",), RUN_DIR=run_dir)
    assert slow.wait("COMPLETED", "FAILED") == "FAILED", slow.output()
    assert "--exclude=n1,n2" in slow.output()
    config = config_of(root, evaluation={"held_out": 4})
    job = lab.submit("eval.sbatch", config, f"run_dir={root / 'eval'}")
    assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert '"eval/held_out/accuracy"' in job.output()


SLOWED = """#!/usr/bin/env bash
# the rank of node 1 is stopped for 40 of every 50 ms, whatever else runs on this host
if [ "$SLURM_NODEID" = 0 ]; then exec "$@"; fi
"$@" &
pid=$!
while kill -0 $pid 2>/dev/null; do
    rank=$(pgrep -P "$(pgrep -P $pid | head -1)" | head -1)
    if [ -z "$rank" ]; then sleep 0.2; continue; fi
    while kill -STOP "$rank" 2>/dev/null; do
        sleep 0.04
        kill -CONT "$rank" 2>/dev/null
        sleep 0.01
    done
done
wait $pid
"""


@all_cases
def test_preflight_names_a_slow_node(lab: Lab, root: Path) -> None:
    wrapper, run_dir = root / "slowed.sh", root / "slow_node"
    wrapper.write_text(SLOWED)
    wrapper.chmod(0o755)
    job = lab.submit(
        "preflight.sbatch", options=NODES, SPMDRL_WRAP=str(wrapper), RUN_DIR=str(run_dir)
    )
    assert job.wait("COMPLETED", "FAILED") == "FAILED", job.output()
    assert "--exclude=n2" in job.output().splitlines(), job.output()
    assert "n2, rank 1: products at " in job.output()
    found = json.loads((run_dir / "preflight.json").read_text())
    assert found["bad"] == ["n2"] and [one["node"] for one in found["ranks"]] == ["n1", "n2"]


@all_cases
def test_status_stacks_and_stop(lab: Lab, root: Path) -> None:
    job, run_dir = start(lab, root, "helped"), root / "helped"
    job.reach(lambda: in_step(run_dir, 1))
    shown = lab.run("scripts/slurm/status.sh", str(run_dir))
    assert "rank 0     step" in shown and "rank 1     step" in shown
    assert "most recent call first" in lab.run(
        "scripts/slurm/dump_stacks.sh", job.number, str(run_dir)
    )
    lab.run("scripts/slurm/stop.sh", str(run_dir))
    assert job.wait("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert job.restarts == 0 and outcome_of(run_dir) == "stopped"
    assert not (run_dir / "stop").exists()
