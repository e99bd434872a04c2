"""`Evaluator`: answers to held-out prompts, by the same engine and rewards as training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from spmdrl.batch import Batch, group_index
from spmdrl.data.home import home_rows
from spmdrl.data.prompts import Prompt
from spmdrl.distributed.reduce import gather_objects, moments, world_sum
from spmdrl.evaluation.metrics import estimate, evaluation_sums, prompt_means, sums
from spmdrl.evaluation.results import write_jsonl
from spmdrl.launch import World
from spmdrl.observe.names import ACCURACY, EVAL, STANDARD_ERROR
from spmdrl.rewards.scorer import Scorer
from spmdrl.roles import Generation, Rollout
from spmdrl.rollout.sampling import SamplingParams

KEY = -1
"""The `step` of evaluation's random numbers: the same before and after training."""


class Evaluator:
    """Draws `num_samples` answers per prompt; an answer whose reward reaches `threshold` is right.

    Args:
        name: of the set, in metrics and files.
        prompts: the held-out prompts, equal on every rank.
        results_dir: where each evaluation's samples are written as JSONL; None: nowhere.
    """

    def __init__(
        self,
        *,
        world: World,
        name: str,
        prompts: Sequence[Prompt],
        rollout: Rollout,
        scorer: Scorer,
        sampling: SamplingParams,
        num_samples: int,
        k: Sequence[int],
        threshold: float,
        seed: int,
        results_dir: Path | None,
    ) -> None:
        self._world, self._name, self._prompts = world, name, prompts
        self._rollout, self._scorer = rollout, scorer
        self._k, self._threshold = tuple(k), threshold
        self._generation = Generation(
            seed=seed, step=KEY, group_size=num_samples, sampling=sampling
        )
        self._results_dir = results_dir

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics `eval/NAME/...`, equal on every rank: accuracy (mean over samples), its standard
        error (over prompts), pass@k for each k, avg@k, mean reward and mean response length.
        """
        rows = home_rows(self._world, self._prompts)
        batch = self._scorer.score(self._rollout.generate(rows, self._generation))
        if self._results_dir is not None:
            self._write(batch, self._results_dir / f"{self._name}_{step:08d}.jsonl")
        return self._metrics(batch)

    def _metrics(self, batch: Batch) -> dict[str, float]:
        """Groups live whole on a rank, so the ranks' sums over prompts add up."""
        group, num_groups = group_index(batch["prompt_ids"])
        prefix = EVAL + self._name
        own = evaluation_sums(
            batch["rewards"], group, num_groups, ks=self._k, threshold=self._threshold
        )
        own = {f"/{name}": value for name, value in own.items()}
        right = (batch["rewards"] >= self._threshold - 1e-6).double()
        own[ACCURACY] = sums(prompt_means(right, group, num_groups))
        metrics = {}
        for name, value in own.items():
            found = estimate(world_sum(value))
            metrics[prefix + name] = found.mean
            error = prefix + ("" if name == ACCURACY else name) + STANDARD_ERROR
            metrics[error] = found.standard_error
        lengths = moments(batch["response_lengths"].double())
        return {**metrics, f"{prefix}/response_length": lengths.mean}

    def _write(self, batch: Batch, path: Path) -> None:
        own = [_record(batch, row) for row in range(len(batch))]
        parts = gather_objects(own)
        if dist.get_rank() == 0:
            write_jsonl(path, [record for part in parts for record in part])


def _record(batch: Batch, row: int) -> Mapping[str, object]:
    prompt: Prompt = batch.objects["prompt"][row]
    return {
        "prompt_id": int(batch["prompt_ids"][row]),
        "sample": int(batch["sample_index"][row]),
        "prompt": prompt.text,
        "response": batch.objects["response"][row],
        "answer": prompt.answer,
        "reward": float(batch["rewards"][row]),
        "tokens": int(batch["response_lengths"][row]),
    }
