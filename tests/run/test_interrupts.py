"""Ctrl-C saves and the run resumes exactly from there; a second one ends everything at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from interrupted import Started, busy, living
from saved_runs import CLOCKS
from spmdrl.observe.metrics import read_metrics
from tiny_model import make_tiny_model
from torchrun import attempt_of, outcome_of, wait_until

ENVIRONMENT = f"environment={Path(__file__).parents[1] / 'interrupted.py'}:InPhase"
ENDS_S, TORCHRUN_S = 2.0, 5.0
"""Within which all is over after a second Ctrl-C; torchrun, whose interpreter is slow to end. See
`busy`.
"""

WAYS = [("launch", "typed"), ("launch", "first"), ("launch", "all")]
WAYS += [("torchrun", "typed"), ("torchrun", "first"), ("torchrun", "all")]
WAYS += [("one", "typed"), ("one", "first")]
PHASES = ["import", "evaluation", "rollout", "update", "saving"]
TYPED = ("launch", "typed", "rollout")
"""The case of every test run; the others are long sweeps."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("interrupts")
    make_tiny_model(root / "model")
    return root


def configure(root: Path, name: str) -> Path:
    # marks of an earlier run would let a case begin before its own run has started
    assert not (root / name).exists(), f"two cases have the run {name}"
    return write_config(
        root / f"{name}.yaml",
        root / "model",
        root / name,
        data={"prompts_per_step": 4, "group_size": 2, **questions(root / "questions.jsonl")},
        sampling={"max_tokens": 150},
        train={"num_minibatches": 4, "epochs": 4},
        evaluation={"held_out": 4, "every": 1, "after": False},
        checkpoint={"every": 1},
    )


def whole(root: Path, ranks: int) -> Path:
    """The directory of a run that nobody has interrupted."""
    name = f"whole_{ranks}"
    if not (root / name).exists():
        finish(root, configure(root, name), ranks)
    return root / name


def finish(root: Path, config: Path, ranks: int) -> None:
    run_ranks(run_configs, ranks, [(str(config), [ENVIRONMENT])], str(root), timeout_s=400)


def records(run_dir: Path) -> list[dict[str, float]]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoints = run_dir / "checkpoints"
    found: dict[str, torch.Tensor] = {}
    for file in (checkpoints / (checkpoints / "latest").read_text()).glob("*.safetensors"):
        tensors = load_file(file)
        found |= {k: t for k, t in tensors.items() if not k.startswith("private/")}
    return found


def go_on(root: Path, config: Path, run_dir: Path, ranks: int) -> None:
    """Resume the run to its end, and check that it equals the uninterrupted one."""
    finish(root, config, ranks)
    assert outcome_of(run_dir) == "done"
    expected = whole(root, ranks)
    assert records(run_dir) == records(expected)
    found, wanted = weights(run_dir), weights(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def stop_and_go_on(root: Path, starter: str, way: str, phase: str) -> dict[str, Any]:
    """Interrupt a run once in a phase and resume it; return what was seen."""
    name = f"once_{starter}_{way}_{phase}"
    config, run_dir = configure(root, name), root / name
    terminal = way == "typed"
    words = ("train", str(config), ENVIRONMENT)
    with Started(starter, *words, log=root / f"{name}.log", terminal=terminal, phase=phase) as run:
        run.reach(run_dir, phase)
        pids = run.tree()
        began = time.monotonic()
        run.interrupt(way)
        code = run.wait(90)
        seconds = time.monotonic() - began
        output = run.output()
    # plain torchrun has a stack and an exit code of its own
    assert code == (1 if starter == "torchrun" else 0), output
    assert starter == "torchrun" or "Traceback" not in output, output
    assert output.count("spmdrl train: SIGINT: stops") == 1, output
    assert not living(pids)
    attempt = attempt_of(run_dir)
    assert (attempt / "outcome").read_text() == "stopped\n"
    assert (attempt / "stopped_by").read_text() == "SIGINT\n"
    pointer = run_dir / "checkpoints" / "latest"
    if phase == "import":
        assert output.count("nothing was to save") == 1 and not pointer.exists()
    else:
        assert "nothing was to save" not in output and pointer.exists()
    saved = pointer.read_text() if phase != "import" else "nothing"
    go_on(root, config, run_dir, 1 if starter == "one" else 2)
    return {"code": code, "seconds": round(seconds, 1), "saved": saved}


def end_at_once(root: Path, starter: str, way: str, phase: str) -> dict[str, Any]:
    """Interrupt a run twice; what was seen."""
    name = f"twice_{starter}_{way}_{phase}"
    config, run_dir = configure(root, name), root / name
    words = ("train", str(config), ENVIRONMENT)
    log, terminal = root / f"{name}.log", way == "typed"
    # the first one is answered by a save that takes its time
    slow = f"{phase} slow"
    with Started(starter, *words, log=log, terminal=terminal, phase=slow) as run:
        run.reach(run_dir, phase)
        run.interrupt(way)
        time.sleep(1.2)
        pids = run.tree()
        alive = run.process.poll() is None
        began = time.monotonic()
        if alive:
            run.interrupt(way)
        launcher = [run.process.pid] if starter == "torchrun" else []
        wait_until(lambda: not set(living(pids)) - {*launcher}, 30)
        seconds = time.monotonic() - began
        code = run.wait(30)
        last = time.monotonic() - began
        output = run.output()
    limit = TORCHRUN_S if launcher else ENDS_S
    assert seconds < busy() * ENDS_S and last < busy() * limit, (seconds, last, output)
    if alive and code != 0:
        assert code == (1 if starter == "torchrun" else 130), (code, output)
        assert output.count("interrupted again: ends at once, without saving") == 1, output
        assert starter == "torchrun" or "Traceback" not in output, output
    return {"code": code, "seconds": round(last, 1), "ranks": round(seconds, 1), "alive": alive}


@pytest.mark.full
def test_ctrl_c_at_a_terminal_saves_and_the_run_goes_on_exactly(root: Path) -> None:
    found = stop_and_go_on(root, *TYPED)
    assert found["saved"].startswith("step_00000001+"), found


@pytest.mark.full
@pytest.mark.parametrize(
    ("starter", "way", "phase"),
    [(*way, phase) for way in WAYS for phase in PHASES if (*way, phase) != TYPED],
)
def test_every_other_way_to_interrupt_saves_in_every_phase(
    root: Path, starter: str, way: str, phase: str
) -> None:
    print(f"\nonce {starter} {way} {phase}: {stop_and_go_on(root, starter, way, phase)}")


@pytest.mark.full
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("starter", "way"), WAYS)
def test_a_second_one_ends_everything_at_once(
    root: Path, starter: str, way: str, phase: str
) -> None:
    print(f"\ntwice {starter} {way} {phase}: {end_at_once(root, starter, way, phase)}")
