"""Nothing in a run's directory is lost: by a crash without checkpoints, a pointer that is gone, an
export that fails."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spmdrl.run.exporting as exporting
from flow_cases import questions, write_config
from harness import run_ranks
from spmdrl.batch import Batch
from spmdrl.commands.train import FlowError, train
from spmdrl.config.load import load_config
from spmdrl.distributed.reduce import OtherRankFailed
from spmdrl.observe.metrics import read_metrics
from spmdrl.rewards.server import start_reward_server
from spmdrl.run.assembly.assembly import assemble, open_models
from spmdrl.world import World
from stopping import Wrapped
from tiny_model import make_tiny_model
from torchrun import wait_until


class CrashesInTheThird(Wrapped):
    def collect(self, step: int) -> Batch:
        if step == 2 and not (self.run.directory / "well").exists():
            raise RuntimeError("had enough")
        return self.inner.collect(step)


class KeepsNumbers(Wrapped):
    """Puts into `run.saved` what a training loop has at hand."""

    kept: Any = None

    def collect(self, step: int) -> Batch:
        self.run.saved["own"] = {"mean": self.kept}
        if step == 1:
            (self.run.directory / "stop").touch()
        return self.inner.collect(step)


def configure(root: Path, name: str, **sections: Any) -> str:
    make_tiny_model(root / "model")
    data = questions(root / "questions.jsonl")
    given = {"data": data, "environment": f"{__name__}:{name}", **sections}
    return str(write_config(root / f"{name}.yaml", root / "model", root / "run", **given))


def steps_of(file: Path) -> list[int]:
    return [int(line["step"]) for line in read_metrics(file) if "loss" in line]


def start(world: World, path: str, *words: str) -> type[BaseException] | None:
    with start_reward_server() as server:
        try:
            train(load_config(path, list(words)), world, server)
        except Exception as error:
            return type(error)
    return None


def crash_and_start_again(world: World, path: str, run_dir: Path) -> list[Any]:
    found: list[Any] = [start(world, path), steps_of(run_dir / "metrics.jsonl")]
    found.append(start(world, path))
    (run_dir / "well").touch()
    found += [start(world, path), steps_of(run_dir / "metrics.jsonl")]
    return found


def test_metrics_of_crashed_runs_without_checkpoints_are_kept(tmp_path: Path) -> None:
    path, run_dir = configure(tmp_path, "CrashesInTheThird"), tmp_path / "run"
    [found] = run_ranks(crash_and_start_again, 1, path, run_dir)
    assert found == [RuntimeError, [1, 2], RuntimeError, None, [1, 2, 3]]
    kept = sorted(file.name for file in run_dir.glob("metrics*"))
    assert kept == ["metrics.jsonl", "metrics.jsonl.old-1", "metrics.jsonl.old-2"]
    assert [steps_of(run_dir / name) for name in kept[1:]] == [[1, 2]] * 2


def lose_latest(world: World, path: str, run_dir: Path) -> list[Any]:
    """A crash in the third step; the pointer to the checkpoint of the first is lost, its own."""
    checkpoints = run_dir / "checkpoints"
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("spmdrl").addHandler(handler)
    found: list[Any] = [start(world, path)]
    pointer = checkpoints / "latest"
    # the crashed run's thread may still be writing its last one
    wait_until(lambda: pointer.is_file() and pointer.read_text() == "step_00000002", 30)
    pointer.unlink()
    (run_dir / "well").touch()
    found.append(start(world, path, "checkpoint.keep_last=9"))
    warnings = [text for text in told if "names no checkpoint: the run resumes from" in text]
    names = sorted(file.name for file in checkpoints.glob("step_*"))
    return [*found, warnings, names, steps_of(run_dir / "metrics.jsonl")]


def test_a_run_goes_on_from_the_newest_checkpoint_when_the_pointer_is_gone(tmp_path: Path) -> None:
    path = configure(tmp_path, "CrashesInTheThird", checkpoint={"every": 1, "export": False})
    [(crash, end, warnings, names, steps)] = run_ranks(lose_latest, 1, path, tmp_path / "run")
    assert (crash, end) == (RuntimeError, None)
    assert len(set(warnings)) == 1
    assert "step_00000002, which was written last" in warnings[0]
    assert names == ["step_00000001", "step_00000002", "step_00000003"]
    assert steps == [1, 2, 3]


def keep_numbers(world: World, path: str, run_dir: Path) -> list[Any]:
    found: list[Any] = []
    for kept in (torch.tensor(0.5), np.float32(0.25), np.ones(3)):
        KeepsNumbers.kept = kept
        found.append(start(world, path, f"run_dir={run_dir}{len(found)}"))
    return found


def test_numbers_of_any_library_are_saved_and_what_is_none_is_named_at_once(
    tmp_path: Path,
) -> None:
    path = configure(tmp_path, "KeepsNumbers")
    [found] = run_ranks(keep_numbers, 1, path, tmp_path / "run")
    assert found == [None, None, FlowError]
    failed = next((tmp_path / "run2").glob("attempt_*/failed")).read_text()
    assert "run.saved['own']['mean'] is a ndarray" in failed
    for number in (0, 1):
        assert (tmp_path / f"run{number}" / "checkpoints" / "latest").is_file()


def fail_to_export(world: World, path: str) -> list[Any]:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("architectures")

    config = load_config(path)
    models = open_models(config)
    assembly = assemble(config, world, models, None)
    exporting.save_pretrained = broken
    with pytest.raises(Exception) as caught:
        exporting.export_models(config, assembly, Path(config.run_dir) / "model")
    return [caught.type, (Path(config.run_dir) / "model").exists()]


def test_an_export_that_fails_in_an_unforeseen_way_ends_all_ranks(tmp_path: Path) -> None:
    path = configure(tmp_path, "CrashesInTheThird")
    found = run_ranks(fail_to_export, 2, path, timeout_s=60)
    assert found == [[KeyError, False], [OtherRankFailed, False]]
