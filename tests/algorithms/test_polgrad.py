"""Losses, advantages and KL estimates are those of polgrad, a package of reference semantics, on
batches of its own making.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import polgrad
import pytest
import torch
from polgrad.testing import random_batches
from torch import Tensor

from spmdrl.algorithms.advantages import (
    broadcast_to_tokens,
    group_advantages,
    leave_one_out,
    whiten,
)
from spmdrl.algorithms.kl import kl
from spmdrl.algorithms.policy_loss import (
    clipped_policy_loss,
    loss_shares,
    loss_weights,
)
from spmdrl.algorithms.rewards import kl_in_reward
from spmdrl.algorithms.value_loss import clipped_value_loss, gae
from spmdrl.config.algorithms import AlgorithmSection, KlEstimator, LossMean

BUDGET, CAP = 11, 1.3
MODES: dict[LossMean, polgrad.Aggregation] = {
    "token_mean": polgrad.Aggregation.TOKEN_MEAN,
    "sequence_mean": polgrad.Aggregation.SEQ_MEAN_TOKEN_MEAN,
    "fixed_length": polgrad.Aggregation.TOKEN_SUM_NORM,
}
CLIPPED, TOKEN = polgrad.SurrogateKind.PG_CLIP, polgrad.RatioKind.TOKEN
# ours, and polgrad's surrogate, ratio and clip
OBJECTIVES: dict[str, tuple[dict[str, Any], tuple[Any, Any, Any]]] = {
    "ppo": ({}, (CLIPPED, TOKEN, polgrad.ClipConfig(0.2, 0.2))),
    "dapo": ({"clip_high": 0.28}, (CLIPPED, TOKEN, polgrad.ClipConfig(0.2, 0.28))),
    "dual": ({"dual_clip": 2.0}, (CLIPPED, TOKEN, polgrad.ClipConfig(0.2, 0.2, 2.0))),
    "gspo": (
        {"policy_loss": "gspo", "clip_low": 0.1, "clip_high": 0.2},
        (CLIPPED, polgrad.RatioKind.SEQUENCE_TOKEN, polgrad.ClipConfig(0.1, 0.2)),
    ),
    "cispo": (
        {"policy_loss": "cispo", "clip_low": 1.0, "clip_high": 0.5},
        (polgrad.SurrogateKind.CISPO, TOKEN, polgrad.ClipConfig(None, 0.5)),
    ),
}
KINDS: tuple[KlEstimator, ...] = get_args(KlEstimator)


def batches(seed: int) -> Iterator[dict[str, Tensor]]:
    yield from random_batches(6, [(1, 1), (3, 5), (4, 8), (6, 2)], seed=seed)


def packed(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths, mask and rows of all places of a padded batch, laid end to end."""
    size, length = batch["response_mask"].shape
    lengths = torch.full((size,), length)
    row = torch.arange(size).repeat_interleave(length)
    return lengths, batch["response_mask"].flatten(), row


def own_loss(
    batch: dict[str, Tensor], logprobs: Tensor, config: AlgorithmSection, mode: LossMean
) -> Tensor:
    lengths, mask, row = packed(batch)
    weights = loss_weights(lengths, mask, mode, max_tokens=BUDGET).double()
    advantages = batch["advantages"]
    if advantages.ndim == 1:
        advantages = advantages.repeat_interleave(lengths)
    columns = {
        "advantages": advantages.flatten(),
        **{n: batch[n].flatten() for n in ("old_logprobs", "ref_logprobs", "rollout_logprobs")},
    }
    entropy = torch.zeros(len(row), dtype=torch.float64)
    total, _ = clipped_policy_loss(logprobs.flatten(), entropy, columns, weights, config, row)
    return total / loss_shares(lengths, mask, mode).sum()


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("estimator", [None, "k2", "k3"])
@pytest.mark.parametrize(("name", "mode"), list(product(OBJECTIVES, MODES)))
def test_policy_losses(name: str, mode: LossMean, estimator: Any, capped: bool) -> None:
    given, (surrogate, ratio, clip) = OBJECTIVES[name]
    cap = CAP if capped else None
    ours = AlgorithmSection(
        **given,
        importance_cap=cap,
        kl_coef=0.0 if estimator is None else 0.3,
        kl_estimator=estimator or "k3",
    )
    kind = None if estimator is None else polgrad.KLEstimator[estimator.upper()]
    theirs = polgrad.PolicyLossConfig(
        ratio=ratio,
        surrogate=surrogate,
        clip=clip,
        aggregation=MODES[mode],
        norm_len=BUDGET if mode == "fixed_length" else None,
        is_correction=None if cap is None else polgrad.ISCorrectionConfig(cap=cap, level="token"),
        kl=None if kind is None else polgrad.KLLossConfig(kind=kind, coef=0.3),
    )
    for batch in batches(seed=1):
        found = []
        for which in ("ours", "theirs"):
            leaf = batch["logprobs"].clone().requires_grad_()
            if which == "ours":
                loss = own_loss(batch, leaf, ours, mode)
            else:
                loss = polgrad.policy_loss(theirs, **{**batch, "logprobs": leaf}).loss
            found.append((loss, *torch.autograd.grad(loss, leaf)))
        # weights are float32
        torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_kl_estimates(kind: KlEstimator) -> None:
    theirs = polgrad.KLEstimator[kind.upper()]
    for batch in batches(seed=2):
        lengths, mask, _ = packed(batch)
        found = kl(batch["logprobs"], batch["ref_logprobs"], kind)
        estimate = polgrad.kl_estimate(
            batch["logprobs"],
            batch["ref_logprobs"],
            theirs,
            response_mask=batch["response_mask"],
        )
        torch.testing.assert_close(found * batch["response_mask"], estimate)
        # the KL of a response in its reward
        size = len(lengths)
        rewards = torch.linspace(-1, 1, size, dtype=torch.float64)
        ours = kl_in_reward(rewards, found.flatten(), mask, lengths, coefficient=0.2)
        tokens = torch.zeros_like(batch["logprobs"])
        tokens[:, 0] = rewards
        shaped = polgrad.kl_in_reward(
            tokens,
            batch["logprobs"],
            batch["ref_logprobs"],
            theirs,
            0.2,
            response_mask=batch["response_mask"],
        )
        torch.testing.assert_close(ours.double(), shaped.sum(1))


def test_advantages() -> None:
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(12, generator=generator, dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 5, 5, 9, 9, 9, 5, 0, 9])
    for std, scale in ((True, "std"), (False, "none")):
        config = polgrad.GroupNormConfig(scale=scale, eps=1e-6)  # type: ignore[arg-type]
        torch.testing.assert_close(
            group_advantages(rewards, groups, std=std),
            polgrad.grpo_advantages(rewards, groups, config).float(),
        )
    torch.testing.assert_close(
        leave_one_out(rewards, groups), polgrad.rloo_advantages(rewards, groups).float()
    )
    # with baseline, each response one token: whitened over the batch, by the sample's deviation
    own = group_advantages(rewards, groups, std=False).double()
    ours = whiten(own, own.mean().item(), own.std().item(), shift_mean=True)
    theirs = polgrad.reinforce_pp_advantages(
        rewards, groups, config=polgrad.ReinforcePPConfig(batch_norm=True)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_generalised_advantages_and_value_losses() -> None:
    generator = torch.Generator().manual_seed(4)
    config = polgrad.GAEConfig(gamma=0.97, lam=0.9)
    for batch in batches(seed=4):
        lengths, mask, _ = packed(batch)
        shape = batch["logprobs"].shape
        rewards, values, old, returns = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)
        )
        ours = gae(rewards.flatten(), old.flatten(), lengths, mask, gamma=0.97, lam=0.9)
        theirs = polgrad.gae(rewards, old, config=config, response_mask=batch["response_mask"])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.view(shape), b.float(), rtol=1e-5, atol=1e-5)
        for clip, mode in product((None, 0.2), MODES):
            weights = loss_weights(lengths, mask, mode, max_tokens=BUDGET).double()
            columns = {"returns": returns.flatten(), "old_values": old.flatten()}
            loss, _ = clipped_value_loss(values.flatten(), columns, weights, clip)
            wanted = polgrad.value_loss(
                values,
                old,
                returns,
                batch["response_mask"],
                clip_eps=clip,
                aggregation=MODES[mode],
                norm_len=BUDGET if mode == "fixed_length" else None,
            )
            share = loss_shares(lengths, mask, mode).sum()
            torch.testing.assert_close(loss / share, wanted.loss, rtol=1e-6, atol=1e-9)
        tokens = broadcast_to_tokens(batch["logprobs"][:, 0], lengths, mask)
        torch.testing.assert_close(
            tokens.view(shape),
            polgrad.broadcast_to_tokens(batch["logprobs"][:, 0], batch["response_mask"]),
        )
