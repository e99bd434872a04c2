"""Bars within the long phases of a run: on the first rank alone, and they move."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest
from tqdm import tqdm

import spmdrl.commands.train as start
import spmdrl.observe.log as progress
from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from spmdrl.config.load import load_config
from spmdrl.rewards.server import start_reward_server
from spmdrl.supervision.pulse import Pulse
from spmdrl.world import World
from tiny_model import make_tiny_model


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Eager(tqdm):  # type: ignore[type-arg]
    """Draws every change, however soon after the last one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, mininterval=0, miniters=1)


def drawn(world: World, path: str) -> str:
    """What the run draws on this rank's terminal, every change of every bar."""
    progress.tqdm = Eager  # type: ignore[misc]
    terminal = sys.stderr = Terminal()
    try:
        run_configs(world, [(path, [])], "")
    finally:
        sys.stderr = sys.__stderr__
    return terminal.getvalue()


def test_every_long_phase_shows_how_far_it_is(tmp_path):
    make_tiny_model(tmp_path / "model")
    path = write_config(
        tmp_path / "c.yaml",
        tmp_path / "model",
        tmp_path / "run",
        steps=1,
        roles={"reference": {}},
        algorithm={"kl_coef": 0.1},
        train={"epochs": 2, "num_minibatches": 2, "microbatch_tokens": 150},
        data={"prompts_per_step": 8},
        log={"progress": True},
    )
    first, second = run_ranks(drawn, 2, str(path), timeout_s=200)
    # 16 rows on each rank: all samples, the reference's rows, two epochs of them
    for phase, total in (("reward", 16), ("logprobs", 16), ("update", 32)):
        found = re.findall(rf"{phase}:[^\r]*?(\d+)/(\d+) ", first)
        done = [int(a) for a, b in found if int(b) == total]
        assert done and max(done) == total, (phase, found)
        assert [a for a in done if 0 < a < total], (phase, found)
        assert done == sorted(done) or phase == "logprobs", (phase, done)
    assert not re.search(r"\d+/\d+", second)


def beats_of_loading(world: World, path: str) -> int:
    """Count the beats of the run's pulse while the data are read."""
    pulses, found, read = [], [], start.read_inputs

    class Kept(Pulse):
        def __init__(self) -> None:
            super().__init__()
            pulses.append(self)

    def read_inputs(*words: Any) -> Any:
        before = pulses[0].beats
        read(*words)
        found.append(pulses[0].beats - before)
        raise ValueError("that is all")

    start.Pulse, start.read_inputs = Kept, read_inputs  # type: ignore[misc]
    with start_reward_server() as server, pytest.raises(ValueError, match="that is all"):
        start.train(load_config(path), world, server)
    return found[0]


def test_a_run_beats_while_its_data_are_read(tmp_path):
    make_tiny_model(tmp_path / "model")
    data = questions(tmp_path / "questions.jsonl", 600)
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run", data=data)
    assert run_ranks(beats_of_loading, 1, str(path))[0] >= 5
