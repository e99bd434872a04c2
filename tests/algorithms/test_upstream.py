"""Losses, advantages and KL estimates are those of verl, OpenRLHF and TRL on fixed inputs.

`upstream.json` has the inputs and what each of them computed, with its version; it is made by
scripts/dev/upstream_numbers.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spmdrl.algorithms.advantages import (
    broadcast_to_tokens,
    group_advantages,
    leave_one_out,
    rewards_to_go,
    whiten,
)
from spmdrl.algorithms.direct_preference import preference_loss
from spmdrl.algorithms.kl import AdaptiveKl, kl_penalty
from spmdrl.algorithms.policy_loss import (
    clipped_policy_loss,
    loss_shares,
    loss_weights,
)
from spmdrl.algorithms.supervised import bradley_terry_loss, next_token_loss
from spmdrl.algorithms.value_loss import clipped_value_loss, gae
from spmdrl.config.algorithms import AlgorithmSection, PreferenceSection

GIVEN: dict[str, Any] = json.loads((Path(__file__).parent / "upstream.json").read_text())
SETTINGS: dict[str, Any] = GIVEN["settings"]
X: dict[str, Tensor] = {
    name: torch.tensor(values, dtype=torch.int64 if name == "groups" else torch.float64)
    for name, values in GIVEN["inputs"].items()
}
SIZE = len(X["mask"])
LENGTHS = torch.full((SIZE,), X["mask"].shape[1])
ROW = torch.arange(SIZE).repeat_interleave(LENGTHS)
LIVE = X["mask"].bool().flatten()


def of(section: str) -> list[tuple[str, str]]:
    """(project, case) of all numbers of a kind."""
    return [(p, n) for p in ("verl", "openrlhf", "trl") for n in GIVEN[p].get(section, ())]


def check(found: Callable[[Tensor], Tensor], column: str, wanted: dict[str, Any]) -> None:
    """A loss of a column and its gradient."""
    leaf = X[column].clone().requires_grad_()
    loss = found(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == pytest.approx(wanted["loss"], rel=1e-6)
    expected = torch.tensor(wanted["gradient"], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


LOW, HIGH = SETTINGS["clip"]
CONFIGS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "dapo": {},
    "dual": {"dual_clip": SETTINGS["dual"]},
    "capped": {"importance_cap": SETTINGS["cap"]},
    "kl": {"kl_coef": SETTINGS["beta"], "kl_estimator": "k3"},
    "gspo": {
        "policy_loss": "gspo",
        "clip_low": SETTINGS["gspo"][0],
        "clip_high": SETTINGS["gspo"][1],
    },
    "cispo": {"policy_loss": "cispo", "clip_low": 1.0, "clip_high": SETTINGS["cispo_high"]},
}


@pytest.mark.parametrize(("project", "name"), of("policy"))
def test_policy_losses(project: str, name: str) -> None:
    kind, *words = name.split()
    mode: Any = "sequence_mean" if kind == "gspo" else "token_mean"
    mode = words[0] if words and kind == "ppo" else mode
    config = AlgorithmSection(**{"clip_low": LOW, "clip_high": HIGH, **CONFIGS[kind]})
    mask = (X["mask_empty"] if "empty" in words else X["mask"]).bool().flatten()
    per_row = X["row_advantages"].repeat_interleave(LENGTHS)
    columns = {
        "advantages": per_row if kind == "gspo" else X["advantages"].flatten(),
        "old_logprobs": X["old"].flatten(),
        "ref_logprobs": X["reference"].flatten(),
        "rollout_logprobs": X["rollout"].flatten(),
    }
    weights = loss_weights(LENGTHS, mask, mode, max_tokens=SETTINGS["budget"]).double()
    share = loss_shares(LENGTHS, mask, mode).sum()

    def loss(own: Tensor) -> Tensor:
        entropy = torch.zeros(len(ROW), dtype=torch.float64)
        total, _ = clipped_policy_loss(own.flatten(), entropy, columns, weights, config, ROW)
        return total / share

    check(loss, "logprobs", GIVEN[project]["policy"][name])


@pytest.mark.parametrize(("project", "name"), of("kl"))
def test_kl_as_a_loss(project: str, name: Any) -> None:
    def loss(own: Tensor) -> Tensor:
        return (kl_penalty(own, X["reference"], name) * X["mask"]).sum()

    check(loss, "logprobs", GIVEN[project]["kl"][name])


@pytest.mark.parametrize("project", ["verl", "openrlhf"])
def test_the_value_loss(project: str) -> None:
    columns = {name: X[name].flatten() for name in ("returns", "old_values")}
    weights = X["mask"].flatten()

    def loss(own: Tensor) -> Tensor:
        clip = SETTINGS["value_clip"]
        return clipped_value_loss(own.flatten(), columns, weights, clip)[0] / weights.sum()

    check(loss, "values", GIVEN[project]["value"])


def test_the_loss_of_sft() -> None:
    weights = X["mask"].flatten()

    def loss(own: Tensor) -> Tensor:
        return next_token_loss(own.flatten(), weights)[0] / weights.sum()

    check(loss, "logprobs", GIVEN["openrlhf"]["sft"])


def whitened(values: Tensor, *, bessel: bool) -> Tensor:  # [T]
    """By the moments of the tokens in the mask; verl's variance is that of a sample (n - 1)."""
    live = values[LIVE].double()
    std = live.std(correction=0).item() * (math.sqrt(len(live) / (len(live) - 1)) if bessel else 1)
    return whiten(values.double(), live.mean().item(), std, shift_mean=True) * LIVE


def own_advantages(name: str) -> Tensor:
    """`[T]`"""
    gains, returns = gae(
        X["token_rewards"].flatten(),
        X["old_values"].flatten(),
        LENGTHS,
        LIVE,
        gamma=SETTINGS["gamma"],
        lam=SETTINGS["lambda"],
    )
    if name in ("gae", "unwhitened gae", "returns"):
        return {
            "gae": whitened(gains, bessel=True),
            "unwhitened gae": gains,
            "returns": returns,
        }[name]
    if name in ("reinforce_pp", "rewards to go"):
        # what a token costs stands for its KL, and the last one's for the score too
        to_go = rewards_to_go(
            torch.zeros(SIZE), -X["token_rewards"].flatten(), LENGTHS, LIVE, kl_coef=1.0
        )
        return whitened(to_go, bessel=True) if name == "reinforce_pp" else to_go
    if name == "rloo":
        per_row = leave_one_out(X["rewards"], X["groups"])
    else:
        per_row = group_advantages(X["rewards"], X["groups"], std=name == "grpo")
    tokens = broadcast_to_tokens(per_row, LENGTHS, LIVE)
    return whitened(tokens, bessel=True) if name == "reinforce_pp_baseline" else tokens


@pytest.mark.parametrize(("project", "name"), of("advantages"))
def test_advantages(project: str, name: str) -> None:
    wanted = torch.tensor(GIVEN[project]["advantages"][name], dtype=torch.float64)
    torch.testing.assert_close(
        own_advantages(name).double().view(wanted.shape), wanted, rtol=1e-5, atol=1e-6
    )


PAIRS: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "dpo"},
    "cdpo": {"loss": "dpo", "label_smoothing": SETTINGS["smoothing"]},
    # of whole responses, as its paper has it
    "ipo": {"loss": "ipo", "length_normalise": False},
    "orpo": {"loss": "orpo"},
}


@pytest.mark.parametrize(("project", "name"), of("pairs"))
def test_preference_losses(project: str, name: str) -> None:
    config = PreferenceSection(beta=SETTINGS["beta"], **PAIRS[name])
    better, worse = torch.tensor([0, 2]), torch.tensor([1, 3])

    def loss(own: Tensor) -> Tensor:
        # ORPO's numbers are of log-probabilities per token of responses of ten
        total, _ = preference_loss(
            own, torch.full((4,), 10), better, worse, config, ref_logprobs=X["reference_sums"]
        )
        return total / 2

    wanted = GIVEN[project]["pairs"][name]
    if name == "orpo":
        wanted = {**wanted, "gradient": [g / 10 for g in wanted["gradient"]]}
    check(loss, "policy_sums", wanted)


@pytest.mark.parametrize(("project", "name"), of("reward"))
def test_losses_of_reward_models(project: str, name: str) -> None:
    is_chosen, pair = torch.tensor([True, False] * 2), torch.tensor([7, 7, 3, 3])
    margin = X["margin"].repeat_interleave(2) if "margin" in name else None
    centre = 0.01 if "centred" in name else 0.0

    def loss(own: Tensor) -> Tensor:
        return bradley_terry_loss(own, is_chosen, pair, margin=margin, centre_coef=centre)[0] / 2

    check(loss, "scores", GIVEN[project]["reward"][name])


def test_the_adaptive_coefficient_of_the_kl() -> None:
    control, found = AdaptiveKl(coef=0.1, target=4.0, horizon=200), []
    for drift in (3.0, 4.2, 12.0, 0.0):
        control = control.updated(drift, 16)
        found.append(control.coef)
    assert found == pytest.approx(GIVEN["openrlhf"]["adaptive_kl"], rel=1e-12)


def test_every_project_names_its_version() -> None:
    assert {name: GIVEN[name]["version"] for name in ("verl", "openrlhf", "trl")} == {
        "verl": "0.9.1",
        "openrlhf": "0.11.2",
        "trl": "1.16.0",
    }
