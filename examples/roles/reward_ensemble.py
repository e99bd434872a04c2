"""Several reward models as one role: the mean of their scores, or the lowest of them.

    roles:
      judges:
        kind: examples/roles/reward_ensemble.py:RewardEnsemble
        ranks: 2-3
        options: {models: [runs/reward_a/model, runs/reward_b/model], combine: min}
    rewards:
      - {role: judges}

The lowest score of an ensemble is harder to please by accident than any single one (Coste et al.
2023, "Reward Model Ensembles Help Mitigate Overoptimization", https://arxiv.org/abs/2310.02743).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from spmdrl.api import (
    SCORES,
    Batch,
    Column,
    RoleContext,
    TorchBackend,
    TrainOptions,
    open_model,
)


class RewardEnsemble:
    """Args:
    models: directories of reward models with the policy's tokenizer.
    combine: how their scores become one.
    microbatch_tokens: packed tokens computed at once.
    """

    needs = ("tokens", "prompt_lengths", "prompt_ids")
    returns = (Column(name="scores", kind="row"),)

    def __init__(
        self,
        models: Sequence[str],
        combine: Literal["mean", "min"] = "mean",
        microbatch_tokens: int = 8192,
    ) -> None:
        if not models or combine not in ("mean", "min"):
            raise ValueError(f"models={models} must not be empty, combine={combine!r} mean or min")
        self.models, self.combine, self.microbatch_tokens = (
            tuple(models),
            combine,
            microbatch_tokens,
        )

    def setup(self, context: RoleContext) -> None:
        on_cuda = context.device.type == "cuda"
        options = TrainOptions(
            microbatch_tokens=self.microbatch_tokens,
            param_dtype=torch.bfloat16 if on_cuda else torch.float32,
        )
        self.backends = [
            TorchBackend(
                context.mesh,
                *open_model(directory, head="score"),
                options,
                context.device,
                trainable=False,
                head="score",
            )
            for directory in self.models
        ]

    def forward_step(self, batch: Batch) -> dict[str, Tensor]:
        scores = torch.stack([model.forward(batch, SCORES)["scores"] for model in self.backends])
        return {"scores": scores.mean(0) if self.combine == "mean" else scores.amin(0)}
