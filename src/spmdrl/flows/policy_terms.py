"""Parts shared by the policy-gradient flows: the policy's loss and the weights of its tokens."""

from __future__ import annotations

from torch import Tensor

from spmdrl.algorithms.policy_loss import (
    POLICY_COLUMNS,
    clipped_policy_loss,
    loss_shares,
    loss_weights,
)
from spmdrl.batch import Batch
from spmdrl.config.algorithms import AlgorithmSection
from spmdrl.config.data_sets import response_tokens
from spmdrl.roles.handles import Update
from spmdrl.run.run import Run
from spmdrl.training.protocol import LossFn, LossInput


def policy_loss(algorithm: AlgorithmSection) -> LossFn:
    """Make the loss of one microbatch: an unnormalised sum over its response tokens."""

    def loss(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        return clipped_policy_loss(
            given["logprobs"],
            given["entropy"],
            given.columns,
            given.columns["loss_weights"],
            algorithm,
            given.row,
        )

    return loss


def with_loss_weights(batch: Batch, run: Run) -> Batch:
    """Add `loss_weights` [T] and `loss_share` [B] by `algorithm.loss_mean`."""
    loss_mean, max_tokens = run.config.algorithm.loss_mean, response_tokens(run.config)
    weights = loss_weights(batch.lengths, batch["loss_mask"], loss_mean, max_tokens=max_tokens)
    return batch.with_columns(
        tokens={"loss_weights": weights},
        rows={"loss_share": loss_shares(batch.lengths, batch["loss_mask"], loss_mean)},
    )


def update_of(
    run: Run,
    role: str,
    step: int,
    columns: tuple[str, ...],
    *,
    temperature: float,
    entropy: bool = True,
) -> Update:
    """Update with the epochs and minibatches of the role's own train section.

    Args:
        temperature: divides the logits: the sampling temperature for the policy's own samples, 1
            for data, whose likelihood is that of the unscaled logits. Scalar heads ignore it.
        entropy: whether the loss reads `entropy`; without it the update computes less.
    """
    train = run.config.train_section(role)
    return Update(
        seed=run.config.seed,
        step=step,
        epochs=train.epochs,
        num_minibatches=train.num_minibatches,
        temperature=temperature,
        columns=columns,
        entropy=entropy,
    )


def policy_columns(batch: Batch) -> tuple[str, ...]:
    """Names of the policy loss's columns that the batch has."""
    return tuple(name for name in (*POLICY_COLUMNS, "loss_weights") if name in batch)
