"""`Evaluator`: responses to held-out prompts, by the same engine and scorer as training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.data.order import DataSet, home_rows
from spmdrl.data.prompts import Prompt
from spmdrl.distributed.reduce import gather_at_first, gather_tables
from spmdrl.evaluation.metrics import Estimate, avg_at_k, pass_at_k, win_rate
from spmdrl.evaluation.results import read_opponent, write_results
from spmdrl.observe.names import ACCURACY, EVAL, STANDARD_ERROR, WIN_RATE
from spmdrl.rewards.scorer import Scorer
from spmdrl.roles.handles import Generation, Rollout
from spmdrl.rollout.protocol import Finish
from spmdrl.world import World

KEY = -1
"""Value of `step` in evaluation's random numbers: the same before and after training."""


@dataclass(frozen=True, kw_only=True)
class HeldOutPrompts:
    """A held-out set of prompts, and how responses to it are drawn and judged.

    Args:
        name: name of the set, in metrics and files.
        prompts: the held-out prompts, equal on every rank.
        generation: sampling of the responses, the same before and after training.
        k: the k of pass@k.
        threshold: smallest reward of a right response; None: rewards do not tell right from wrong.
        judged_by: description of what makes the rewards; it must be equal to compare responses.
        against: JSONL file of an evaluation of this set: the win rate is against its responses.
            None: no win rate; nor is there one against the file that is being written.
    """

    name: str
    prompts: DataSet
    generation: Generation
    k: Sequence[int]
    threshold: float | None
    judged_by: str
    against: Path | None = None


class Evaluator:
    """Samples responses to held-out prompts; one whose reward reaches the threshold is right.

    Args:
        results_dir: folder of the JSONL files with each evaluation's samples.
    """

    def __init__(
        self,
        world: World,
        rollout: Rollout,
        scorer: Scorer,
        held_out: HeldOutPrompts,
        results_dir: Path,
    ) -> None:
        self._world, self._rollout, self._scorer = world, rollout, scorer
        self._set, self._results_dir = held_out, results_dir

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics `eval/NAME/...`, equal on every rank: accuracy (avg@k: the mean over samples) and
        pass@k if a response can be right, mean reward and response length, and the win rate if
        there is an opponent. These but the length have standard errors clustered by prompt. Where
        samples take turns, there are also `turns/...`, as of a step.
        """
        return self.measure(results_file(self._results_dir, self._set.name, step))

    def measure(self, path: Path) -> dict[str, float]:
        """Measure the metrics, and write each sample to the JSONL file `path`.

        Raises:
            ValueError: the opponent's file is missing, has other prompts or was judged differently.
        """
        opponent = None
        if self._set.against is not None and self._set.against.resolve() != path.resolve():
            opponent = read_opponent(
                self._set.against, self._set.prompts.texts(), self._set.judged_by
            )
        rows = home_rows(self._world, self._set.prompts)
        batch = self._scorer.score(
            self._rollout.generate(rows, self._set.generation), evaluation=True
        )
        turns = self._rollout.turn_metrics(batch).items()
        metrics = self._metrics(batch) | {f"{EVAL}{self._set.name}/{n}": v for n, v in turns}
        if opponent is not None:
            rate = win_rate(self._table(batch, "rewards"), opponent)
            metrics |= self._named({WIN_RATE: rate})
        self._write(batch, path)
        return metrics

    def _metrics(self, batch: Batch) -> dict[str, float]:
        rewards, lengths = self._table(batch, "rewards"), self._table(batch, "response_lengths")
        prefix = EVAL + self._set.name
        found = {"/reward": avg_at_k(rewards)}
        if self._set.threshold is not None:
            right = rewards >= self._set.threshold - 1e-6  # rewards are float32
            found = {ACCURACY: avg_at_k(right), **found}
            found |= {f"/pass@{k}": pass_at_k(right, k) for k in self._set.k}
        return {**self._named(found), f"{prefix}/response_length": float(lengths.mean())}

    def _named(self, found: Mapping[str, Estimate]) -> dict[str, float]:
        prefix = EVAL + self._set.name
        metrics = {prefix + name: estimate.mean for name, estimate in found.items()}
        errors = {
            prefix + ("" if name == ACCURACY else name) + STANDARD_ERROR: estimate.standard_error
            for name, estimate in found.items()
        }
        return metrics | errors

    def _table(self, batch: Batch, name: str) -> Tensor:
        """Table of a row column from all ranks, by prompt and sample: float64 `[P, n]`."""
        columns = (batch["prompt_ids"], batch["sample_index"], batch[name])
        table = torch.cat(gather_tables(torch.stack([c.double() for c in columns], dim=1)))
        size = self._set.generation.group_size
        order = torch.argsort(table[:, 0] * size + table[:, 1])
        return table[order, 2].reshape(-1, size)

    def _write(self, batch: Batch, path: Path) -> None:
        own = [{**_record(batch, row), "judge": self._set.judged_by} for row in range(len(batch))]
        parts = gather_at_first(own)
        if parts is not None:
            write_results(path, [record for part in parts for record in part])


def results_file(directory: Path, name: str, step: int) -> Path:
    """Path of the evaluation before step `step` (after the last step: the number of steps)."""
    return directory / f"{name}_{step:08d}.jsonl"


def _record(batch: Batch, row: int) -> Mapping[str, object]:
    prompt: Prompt = batch.objects["prompt"][row]
    return {
        "prompt_id": int(batch["prompt_ids"][row]),
        "sample": int(batch["sample_index"][row]),
        "prompt": prompt.text,
        "response": batch.objects["response"][row],
        "answer": prompt.answer,
        "reward": float(batch["rewards"][row]),
        "finish": Finish(int(batch["finish"][row])).text,
        "tokens": int(batch["response_lengths"][row]),
    }
