"""Rows of a step as the rollout log has them."""

from __future__ import annotations

from typing import Any

import torch

from spmdrl.batch import Batch
from spmdrl.roles.turn_calls import OPENING, TURN_END
from spmdrl.rollout.protocol import Ending, Finish


def rollout_rows(batch: Batch) -> list[dict[str, Any]]:
    """Return a step's home rows as values of JSON; none for flows that sample nothing.

    Args:
        batch: rows of `rollout.generate` that were scored, with the token column `advantages` if
            the flow has them: a row's advantage is the mean over its loss tokens.
    """
    if "response" not in batch.objects or "finish" not in batch.rows:
        return []
    columns = {
        "prompt_id": batch["prompt_ids"],
        "sample": batch["sample_index"],
        "prompt_tokens": batch["prompt_lengths"],
        "response_tokens": batch["response_lengths"],
        "version": batch["weight_version"],
        "reward": batch["rewards"],
        **{name: column for name, column in batch.rows.items() if name.startswith("reward/")},
    }
    if "advantages" in batch.tokens:
        mask = batch["loss_mask"]
        counts = batch.row_sum(mask).clamp(min=1)
        columns["advantage"] = batch.row_sum(batch["advantages"] * mask) / counts
    texts = {
        "prompt": batch.objects["prompt_text"],
        "response": batch.objects["response"],
        "answer": batch.objects["answer"],
    }
    if "turns" in batch.objects:
        texts["turns"] = batch.objects["turns"]
        texts["opening"] = batch.objects.get(OPENING, [None] * len(batch))
        texts["ending"] = [_ending(code) for code in batch[TURN_END].tolist()]
    numbers = {name: column.tolist() for name, column in columns.items()}
    finish = [Finish(code).text for code in batch["finish"].tolist()]
    return [
        {
            **{name: values[i] for name, values in numbers.items()},
            "finish": finish[i],
            **{name: values[i] for name, values in texts.items()},
        }
        for i in range(len(batch))
    ]


def _ending(code: int) -> str | None:
    return None if code < 0 else Ending(code).text


def fits(logged: Batch, batch: Batch) -> bool:
    """Whether rows that a trainer has kept for the log are those of the step."""
    same = len(logged) == len(batch) and "prompt_ids" in logged.rows
    return same and bool(torch.equal(logged["prompt_ids"], batch["prompt_ids"]))
