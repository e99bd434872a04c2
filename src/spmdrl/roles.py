"""The roles: handles that every rank holds, with a backend or an engine on the role's ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from spmdrl.algorithms.metrics import combine
from spmdrl.batch import Batch, from_rows
from spmdrl.calls import Call, RoleMethod, together
from spmdrl.distributed.exchange import Column
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.minibatches import into_minibatches, split_groups_if_few
from spmdrl.distributed.reduce import group_sum
from spmdrl.keyed import key64
from spmdrl.models.config import ModelConfig
from spmdrl.rollout.protocol import Completion, Request, RolloutEngine
from spmdrl.rollout.sampling import SamplingParams
from spmdrl.training.protocol import LossFn, TrainBackend

__all__ = ["Generation", "Policy", "Reference", "Rollout", "Update", "together"]

Progress = Callable[[int, int], None]
Backend = TypeVar("Backend")

_FINISH = {"stop": 0, "length": 1, "aborted": 2}


@dataclass(frozen=True, kw_only=True)
class Update:
    """How an update goes through its rows.

    Args:
        seed, step: key minibatch membership and order, with the prompt ids.
        epochs: passes over the rows.
        num_minibatches: optimizer steps per pass; groups (rows of one prompt id) stay whole.
        temperature: of the sampling, so that log-probabilities are those of the sampler.
        columns: the columns that the loss reads, beside the packed rows themselves.
    """

    seed: int
    step: int
    epochs: int = 1
    num_minibatches: int = 1
    temperature: float = 1.0
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How a rollout samples: `group_size` answers per prompt, keyed by (seed, step, prompt id)."""

    seed: int
    step: int
    group_size: int
    sampling: SamplingParams


_PACKING = ("tokens", "prompt_lengths", "prompt_ids", "loss_mask")


class Policy:
    """The trained model.

    Methods: `logprobs(batch, temperature)` adds the token columns `logprobs` and `entropy`;
    `update(batch, loss_fn, update)` trains and returns metric sums, equal on every rank.
    """

    def __init__(
        self, name: str, mesh: Mesh, config: ModelConfig, backend: TrainBackend | None
    ) -> None:
        self.name, self.mesh, self.config = name, mesh, config
        self.backend = backend
        self.logprobs = RoleMethod(self._logprobs)
        self.update = RoleMethod(self._update)

    def _logprobs(self, batch: Batch, temperature: float = 1.0) -> Call[Batch]:
        return _logprobs_call(self, batch, temperature, ("logprobs", "entropy"))

    def _update(
        self, batch: Batch, loss_fn: LossFn, update: Update
    ) -> Call[list[dict[str, float]]]:
        """Rows need `tokens`, `prompt_lengths`, `prompt_ids`, `loss_mask`, the row column
        `loss_share` (what the row adds to the normaliser), and the columns that the loss reads.
        """

        def compute(rows: Batch) -> list[dict[str, float]]:
            backend = _require(self.backend, self.name)
            return _run_update(backend, rows, loss_fn, update)

        return Call(
            role=self,
            method="update",
            batch=batch,
            needs=(*_PACKING, "loss_share", *update.columns),
            returns=(),
            compute=compute,
            finish=lambda metrics: metrics,
            writes=True,
            atom=batch["prompt_ids"],
            order=_row_order(batch),
            arrange=into_minibatches(update.num_minibatches, seed=update.seed, step=update.step),
        )


class Reference:
    """A frozen model: `logprobs(batch, temperature)` adds the token column `ref_logprobs`."""

    def __init__(
        self, name: str, mesh: Mesh, config: ModelConfig, backend: TrainBackend | None
    ) -> None:
        self.name, self.mesh, self.config = name, mesh, config
        self.backend = backend
        self.logprobs = RoleMethod(self._logprobs)

    def _logprobs(self, batch: Batch, temperature: float = 1.0) -> Call[Batch]:
        return _logprobs_call(self, batch, temperature, ("ref_logprobs", "ref_entropy"))


class Rollout:
    """The engine: `generate(prompts, generation)` returns one row per sample.

    Args:
        progress: called on member ranks with (sequences done, sequences) of this replica.
    """

    def __init__(
        self,
        name: str,
        mesh: Mesh,
        config: ModelConfig,
        engine: RolloutEngine | None,
        progress: Progress | None = None,
    ) -> None:
        self.name, self.mesh, self.config = name, mesh, config
        self.engine, self.progress = engine, progress
        self.generate = RoleMethod(self._generate)

    def _generate(self, prompts: Batch, generation: Generation) -> Call[Batch]:
        """`prompts`: home rows with the token column `tokens` and the row column `prompt_ids`
        (unique in the step). The result's rows are prompt and response, with the token columns
        `tokens`, `rollout_logprobs`, `loss_mask` and the row columns `prompt_ids`,
        `sample_index`, `prompt_lengths`, `response_lengths`, `finish` (0 stop, 1 length,
        2 aborted); the prompts' own row and Python columns are repeated for every sample.
        """
        size = generation.group_size
        repeated = prompts.select(torch.arange(len(prompts)).repeat_interleave(size))
        samples = torch.arange(size).repeat(len(prompts))
        batch = repeated.with_columns(rows={"sample_index": samples})

        def compute(rows: Batch) -> Batch:
            engine = _require(self.engine, self.name)
            return _run_generation(engine, rows, generation, self.progress)

        def finish(home: Batch) -> Batch:
            return home.with_columns(rows=batch.rows, objects=batch.objects)

        return Call(
            role=self,
            method="generate",
            batch=batch,
            needs=("tokens", "prompt_ids", "sample_index"),
            returns=(
                Column(name="tokens", dtype=torch.int64),
                Column(name="rollout_logprobs"),
                Column(name="loss_mask", dtype=torch.bool),
                Column(name="prompt_lengths", kind="row", dtype=torch.int64),
                Column(name="response_lengths", kind="row", dtype=torch.int64),
                Column(name="finish", kind="row", dtype=torch.int64),
            ),
            compute=compute,
            finish=finish,
            cost=batch.lengths + generation.sampling.max_tokens,
            atom=batch["prompt_ids"],
            order=_row_order(batch),
            arrange=split_groups_if_few,
        )


def _require(backend: Backend | None, role: str) -> Backend:
    assert backend is not None, f"role {role!r} has no backend on this rank"
    return backend


def _row_order(batch: Batch) -> Tensor:
    """Rows in order of (prompt id, sample): int64 `[B]`."""
    return batch["prompt_ids"] * (1 << 20) + batch["sample_index"]


def _logprobs_call(
    role: Policy | Reference, batch: Batch, temperature: float, names: tuple[str, str]
) -> Call[Batch]:
    def compute(rows: Batch) -> Batch:
        backend = _require(role.backend, role.name)
        result = backend.forward(rows, temperature=temperature)
        return Batch(
            lengths=rows.lengths,
            tokens={names[0]: result["logprobs"].cpu(), names[1]: result["entropy"].cpu()},
        )

    return Call(
        role=role,
        method="logprobs",
        batch=batch,
        needs=_PACKING,
        returns=(Column(name=names[0]), Column(name=names[1])),
        compute=compute,
        finish=lambda home: home,
        atom=batch["prompt_ids"],
        order=_row_order(batch),
    )


def _run_update(
    backend: TrainBackend, rows: Batch, loss_fn: LossFn, update: Update
) -> list[dict[str, float]]:
    """Every minibatch of every epoch: metric sums of each optimizer step, in order."""
    records = []
    for epoch in range(update.epochs):
        order = sorted(
            range(update.num_minibatches),
            key=lambda m: key64(update.seed, update.step, epoch, m),
        )
        for minibatch in order:
            part = rows.select((rows["minibatch"] == minibatch).nonzero().flatten())
            share = float(part["loss_share"].sum())
            normaliser = group_sum(share, backend.mesh.group("dp"))
            if normaliser == 0:  # nothing to learn from: momentum alone must not move the weights
                continue
            sums = backend.forward_backward(
                part, loss_fn, normaliser=normaliser, temperature=update.temperature
            )
            done = backend.optim_step()
            records.append(
                combine([sums])
                | {"grad_norm": done.grad_norm, "lr": done.lr, "skipped": float(done.skipped)}
            )
    return records


def _run_generation(
    engine: RolloutEngine, rows: Batch, generation: Generation, progress: Progress | None
) -> Batch:
    """Generate for this replica's rows; rows of one prompt become one request."""
    sequences = torch.split(rows["tokens"], rows.lengths.tolist())
    places: dict[int, list[int]] = {}
    for row, prompt_id in enumerate(rows["prompt_ids"].tolist()):
        places.setdefault(prompt_id, []).append(row)
    samples = rows["sample_index"].tolist()
    requests = [
        Request(
            tokens=tuple(sequences[group[0]].tolist()),
            prompt_id=prompt_id,
            samples=tuple(samples[row] for row in group),
            sampling=generation.sampling,
        )
        for prompt_id, group in places.items()
    ]

    def report(num_tokens: int, num_done: int) -> None:
        if progress is not None:
            progress(num_done, len(rows))

    answers = engine.generate(requests, seed=generation.seed, step=generation.step, progress=report)
    by_row: dict[int, Completion] = {}
    for group, completions in zip(places.values(), answers, strict=True):
        by_row.update(zip(group, completions, strict=True))
    return _completed(rows, [by_row[row] for row in range(len(rows))])


def _completed(prompts: Batch, completions: list[Completion]) -> Batch:
    sequences, logprobs, masks = [], [], []
    for prompt, answer in zip(
        torch.split(prompts["tokens"], prompts.lengths.tolist()), completions, strict=True
    ):
        zeros = [0.0] * len(prompt)
        sequences.append([*prompt.tolist(), *answer.tokens])
        logprobs += [*zeros, *answer.logprobs]
        masks += [False] * len(prompt) + [True] * len(answer.tokens)
    counts = torch.tensor([len(c.tokens) for c in completions], dtype=torch.int64)
    batch = from_rows(sequences)
    return replace(
        batch,
        tokens={
            **batch.tokens,
            "rollout_logprobs": torch.tensor(logprobs, dtype=torch.float32),
            "loss_mask": torch.tensor(masks, dtype=torch.bool),
        },
        rows={
            "prompt_lengths": prompts.lengths,
            "response_lengths": counts,
            "finish": torch.tensor([_FINISH[c.finish] for c in completions], dtype=torch.int64),
        },
    )
