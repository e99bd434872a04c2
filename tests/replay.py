"""An environment for layout tests: the first run records its rows, the other runs replay them.

Step 0 is always sampled; from step 1 on a replaying run trains on the recorded rows, so that a
token that differs by rounding does not make later steps incomparable. What every run sampled, in
all steps, is kept for `assert_same_samples`.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from agreement import assert_same
from spmdrl.batch import Batch
from spmdrl.distributed.reduce import gather_objects
from spmdrl.flows.environment import GroupEnvironment
from spmdrl.roles.calls import Call
from spmdrl.rollout.protocol import Completion, Finish
from spmdrl.run.protocols import Metrics
from spmdrl.run.run import Run

DIRECTORY = "SPMDRL_TEST_REPLAY"


Rows = dict[tuple[int, int], dict[str, torch.Tensor]]
"""(prompt id, sample) -> columns."""


class ReplayEnvironment:
    """Records where no record is, else replays; in place of `GroupEnvironment`."""

    def __init__(self, run: Run) -> None:
        # vLLM knows no margins: runs on it have the same tokens
        run.sampling = run.sampling.model_copy(
            update={"margins": run.config.rollout.engine != "vllm"}
        )
        self.inner = GroupEnvironment(run)
        self.directory, self.name = Path(os.environ[DIRECTORY]), run.directory.name
        self.world = run.world
        recorder = self.directory / "recorder"
        if self.world.is_first and not recorder.exists():
            recorder.write_text(self.name)
        dist.barrier()
        self.recording = recorder.read_text() == self.name

    def collect(self, step: int) -> Batch:
        sampled = self.inner.collect(step)
        merged = {
            key: row for part in gather_objects(_arrays(sampled)) for key, row in part.items()
        }
        if self.world.is_first:
            _file(self.directory, self.name, step).write_bytes(pickle.dumps(merged))
        if self.recording:
            return sampled
        recorder = (self.directory / "recorder").read_text()
        recorded = read_samples(self.directory, recorder, step)
        keys = zip(sampled["prompt_ids"].tolist(), sampled["sample_index"].tolist(), strict=True)
        rows = [recorded[key] for key in keys]
        # versions stay those of this run: they must agree by themselves
        replayed = [name for name in sampled.rows if name != "weight_version"]
        return Batch(
            lengths=torch.tensor([len(row["tokens"]) for row in rows], dtype=torch.int64),
            tokens={
                name: torch.cat([row[name] for row in rows]) if rows else sampled[name]
                for name in sampled.tokens
            },
            rows=sampled.rows
            | {name: torch.stack([row[name] for row in rows]) for name in replayed if rows},
            objects=sampled.objects,
        )

    def ahead(self, step: int) -> tuple[Call[Any], ...]:
        return self.inner.ahead(step)

    def metrics(self) -> Metrics:
        return self.inner.metrics()


def _arrays(batch: Batch) -> dict[tuple[int, int], dict[str, np.ndarray[Any, Any]]]:
    """Rows by (prompt id, sample), as arrays: a tensor's pickle has its whole storage, and takes
    long.
    """
    rows = {}
    for row in batch.split_rows():
        key = (int(row["prompt_ids"][0]), int(row["sample_index"][0]))
        columns = {**row.tokens, **{name: column[0] for name, column in row.rows.items()}}
        rows[key] = {name: column.numpy() for name, column in columns.items()}
    return rows


def assert_same_samples(directory: Path, name: str, step: int = 0) -> None:
    """That a run sampled what the recorded run did, up to rounding, and with the same versions.

    Args:
        name: of the run's directory.
    """
    recorder = (directory / "recorder").read_text()
    expected, found = (read_samples(directory, n, step) for n in (recorder, name))
    assert name != recorder and found.keys() == expected.keys()
    for key, row in found.items():
        other = expected[key]
        prompt = int(row["prompt_lengths"])
        assert torch.equal(row["tokens"][:prompt], other["tokens"][:prompt]), key
        assert_same(_completion(row), _completion(other), (name, step, key))
        assert int(row["weight_version"]) == int(other["weight_version"]), (name, step, key)


def read_samples(directory: Path, name: str, step: int) -> Rows:
    """What a run sampled in a step, of all ranks."""
    rows = pickle.loads(_file(directory, name, step).read_bytes())
    return {
        key: {column: torch.from_numpy(np.asarray(values)) for column, values in row.items()}
        for key, row in rows.items()
    }


def versions(directory: Path, name: str, step: int) -> set[int]:
    """The weight versions of a step's samples."""
    rows = read_samples(directory, name, step)
    return {int(row["weight_version"]) for row in rows.values()}


def _completion(row: dict[str, torch.Tensor]) -> Completion:
    mask = row["loss_mask"]
    return Completion(
        tokens=tuple(row["tokens"][mask].tolist()),
        logprobs=tuple(row["rollout_logprobs"][mask].tolist()),
        finish=Finish(int(row["finish"])),
        margins=tuple(row["margins"][mask].tolist()) if "margins" in row else (),
    )


def _file(directory: Path, name: str, step: int) -> Path:
    return directory / f"sampled_{name}_{step}.pickle"
