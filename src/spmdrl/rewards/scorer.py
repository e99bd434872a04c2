"""From generated rows to rewards: decode, cut at stop strings, score in the pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from spmdrl.batch import Batch
from spmdrl.data.prompts import Prompt
from spmdrl.rewards.pool import RewardJob, RewardPool, RewardResult

Decode = Callable[[Sequence[int]], str]


class Scorer:
    """Adds texts and rewards to home rows.

    Args:
        pool: this rank's reward workers.
        decode: token ids -> text without special tokens.
        stop: stop strings; the text ends before the first of them.
    """

    def __init__(self, pool: RewardPool, decode: Decode, stop: Sequence[str] = ()) -> None:
        self.pool, self.decode, self.stop = pool, decode, tuple(stop)

    def texts(self, batch: Batch) -> list[str]:
        """The response texts of rows from `rollout.generate`."""
        responses = torch.split(
            batch["tokens"][batch["loss_mask"]], batch["response_lengths"].tolist()
        )
        return [cut_at(self.decode(ids.tolist()), self.stop) for ids in responses]

    def score(self, batch: Batch) -> Batch:
        """`batch` (with the Python column `prompt`) and the row columns `rewards` `[B]` and
        `reward/NAME` of each component, `reward_failed` `[B]`, and the Python column `response`.
        """
        prompts: Sequence[Prompt] = batch.objects["prompt"]
        texts = self.texts(batch)
        jobs = [
            RewardJob(prompt=p.text, response=text, answer=p.answer, entry=p.entry)
            for p, text in zip(prompts, texts, strict=True)
        ]
        results = self.pool.score(jobs) if jobs else []
        columns = {
            f"reward/{name}": _column([r.components[name] for r in results])
            for name in self.pool.names
        }
        return batch.with_columns(
            rows={
                "rewards": _column([r.score for r in results]),
                "reward_failed": _column([float(bool(r.failures)) for r in results]),
                **columns,
            },
            objects={"response": texts},
        )


def cut_at(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first stop string in it."""
    ends = [place for s in stop if (place := text.find(s)) >= 0]
    return text[: min(ends)] if ends else text


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


__all__ = ["RewardResult", "Scorer", "cut_at"]
