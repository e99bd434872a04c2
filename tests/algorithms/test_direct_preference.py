"""Preference losses: by hand, against an independent float64 loop, any order and cut the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spmdrl.algorithms.direct_preference import (
    kto_baseline,
    ordered_pairs,
    preference_loss,
    response_sums,
)
from spmdrl.algorithms.metrics import combine
from spmdrl.config.algorithms import PreferenceSection

CASES: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "dpo", "beta": 0.3},
    "cdpo": {"loss": "dpo", "beta": 0.3, "label_smoothing": 0.2},
    "dpo per token": {"loss": "dpo", "beta": 2.0, "length_normalise": True, "nll_coef": 0.3},
    "ipo": {"loss": "ipo", "beta": 0.4},
    "ipo of sums": {"loss": "ipo", "beta": 0.4, "length_normalise": False},
    "simpo": {"loss": "simpo", "beta": 2.0, "margin": 0.7, "label_smoothing": 0.1},
    "kto": {"loss": "kto", "beta": 0.2, "kto_weights": (1.0, 1.5)},
    "orpo": {"loss": "orpo", "beta": 0.5, "nll_coef": 0.2},
}


def columns(num_pairs: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Rows of pairs in a random order: log-probabilities, lengths, preference, prompt ids."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(2 * num_pairs, generator=generator)
    lengths = torch.randint(1, 30, (2 * num_pairs,), generator=generator)
    per_token = -0.1 - 2 * torch.rand(2 * num_pairs, generator=generator)
    moved = 3 * torch.randn(2 * num_pairs, generator=generator)
    logprobs = per_token * lengths
    return {
        "logprobs": logprobs.to(dtype),
        "response_lengths": lengths,
        "ref_logprobs": (logprobs + moved).clamp(max=-0.01).to(dtype),
        "baseline": torch.full((2 * num_pairs,), 1.5, dtype=dtype),
        "preference": (order % 2).float(),
        "prompt_ids": order // 2 * 2**30 - 7,
    }


def loss_of(
    given: dict[str, Tensor], config: PreferenceSection
) -> tuple[Tensor, dict[str, Tensor]]:
    better, worse = ordered_pairs(given["preference"], given["prompt_ids"])
    return preference_loss(
        given["logprobs"],
        given["response_lengths"],
        better,
        worse,
        config,
        ref_logprobs=given["ref_logprobs"],
        baseline=given["baseline"],
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def reference_loss(
    good: dict[str, float], bad: dict[str, float], config: PreferenceSection
) -> float:
    """Of one pair, in Python floats, from the papers' formulas."""
    normalised = config.loss in ("ipo", "simpo", "orpo")
    if config.length_normalise is not None:
        normalised = config.length_normalise
    value = {}
    for name, row in (("good", good), ("bad", bad)):
        ratio = row["logprobs"]
        if config.loss in ("dpo", "ipo", "kto"):
            ratio -= row["ref_logprobs"]
        value[name] = ratio / row["response_lengths"] if normalised else ratio
    gap = value["good"] - value["bad"]
    smooth, beta = config.label_smoothing, config.beta
    if config.loss in ("dpo", "simpo"):
        logit = beta * gap - (config.margin if config.loss == "simpo" else 0.0)
        loss = -(1 - smooth) * math.log(sigmoid(logit)) - smooth * math.log(sigmoid(-logit))
    elif config.loss == "ipo":
        loss = (gap - 0.5 / beta) ** 2
    elif config.loss == "kto":
        up, down = config.kto_weights
        loss = 0.5 * up * (1 - sigmoid(beta * (value["good"] - good["baseline"])))
        loss += 0.5 * down * (1 - sigmoid(beta * (good["baseline"] - value["bad"])))
    else:
        good_odds, bad_odds = (math.exp(x) / (1 - math.exp(x)) for x in value.values())
        loss = -value["good"] - beta * math.log(sigmoid(math.log(good_odds / bad_odds)))
    return loss - config.nll_coef * good["logprobs"] / good["response_lengths"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_a_float64_loop(name, seed):
    config = PreferenceSection(**CASES[name])
    given = columns(40, seed)
    rows = [
        dict(zip(given, values, strict=True))
        for values in zip(*(column.tolist() for column in given.values()), strict=True)
    ]
    expected, names = 0.0, ("tokens", "accuracy", "margin", "reward_chosen", "reward_rejected")
    sums = dict.fromkeys((*names, "nll"), 0.0)
    for good in rows:
        for bad in rows:
            if good["prompt_ids"] != bad["prompt_ids"] or good["preference"] <= bad["preference"]:
                continue
            expected += reference_loss(good, bad, config)
            rewards = []
            for row in (good, bad):
                rewards.append(config.beta * (row["logprobs"] - row["ref_logprobs"]))
                if config.loss in ("simpo", "orpo"):
                    rewards[-1] = config.beta * row["logprobs"] / row["response_lengths"]
            found = (1.0, rewards[0] > rewards[1], rewards[0] - rewards[1], *rewards)
            for key, value in zip(names, found, strict=True):
                sums[key] += value
            sums["nll"] -= good["logprobs"] / good["response_lengths"]
    loss, metrics = loss_of(given, config)
    assert sums["tokens"] == 40 and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert metrics.keys() == sums.keys()
    for key, value in metrics.items():
        assert value.dtype == torch.float64 and not value.requires_grad
        assert value.item() == pytest.approx(sums[key], rel=1e-6, abs=1e-6), key


@pytest.mark.parametrize("name", CASES)
def test_gradient_agrees_with_finite_differences(name):
    config, given = PreferenceSection(**CASES[name]), columns(6, 2, torch.float64)
    logprobs = given["logprobs"].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: loss_of({**given, "logprobs": x}, config)[0], (logprobs,)
    )
    # descent raises the chosen responses and lowers the rejected ones
    (gradient,) = torch.autograd.grad(loss_of(given, config)[0], logprobs)
    if name != "ipo of sums" and name != "ipo":  # which pull a gap that is too large together
        chosen = given["preference"] > 0
        if "label_smoothing" not in CASES[name]:
            assert (gradient[chosen] <= 0).all() and (gradient[~chosen] >= 0).all()


@pytest.mark.parametrize("name", CASES)
def test_any_order_and_cut_between_pairs_gives_the_same_sums(name):
    config, given = PreferenceSection(**CASES[name]), columns(30, 3)
    whole, whole_sums = loss_of(given, config)
    first = given["prompt_ids"] < given["prompt_ids"].median()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(4))
    total, parts = 0.0, []
    for index in (order[first[order]], order[~first[order]], order[:0]):
        part, sums = loss_of({n: column[index] for n, column in given.items()}, config)
        total += part.item()
        parts.append({n: value.item() for n, value in sums.items()})
    assert parts[0]["tokens"] > 0 and parts[1]["tokens"] > 0
    assert total == pytest.approx(whole.item(), rel=1e-9)
    for key, value in combine(parts).items():
        assert value == pytest.approx(whole_sums[key].item(), rel=1e-9, abs=1e-9), key


def test_dpo_by_hand():
    given = {
        "logprobs": torch.tensor([-3.0, -5.0], requires_grad=True),
        "response_lengths": torch.tensor([2, 3]),
        "ref_logprobs": torch.tensor([-4.0, -4.0]),
        "baseline": torch.zeros(2),
        "preference": torch.tensor([1.0, 0.0]),
        "prompt_ids": torch.tensor([7, 7]),
    }
    loss, sums = loss_of(given, PreferenceSection(loss="dpo", beta=0.5))
    # log-ratios +1 and -1: logit 0.5 * 2 = 1
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert sums["margin"] == 1.0 and sums["accuracy"] == 1
    (gradient,) = torch.autograd.grad(loss, given["logprobs"])
    slope = 0.5 / (1 + math.e)
    assert gradient.tolist() == pytest.approx([-slope, slope])


def test_pairs_are_all_ordered_rows_of_a_prompt():
    preference = torch.tensor([1.0, 3.0, 1.0, 2.0, 0.5, 0.5])
    prompts = torch.tensor([4, 9, 4, 9, 4, 2])
    better, worse = ordered_pairs(preference, prompts)
    found = sorted(zip(better.tolist(), worse.tolist(), strict=True))
    assert found == [(0, 4), (1, 3), (2, 4)]  # rows 0 and 2 are equally good
    empty = ordered_pairs(preference[:0], prompts[:0])
    assert [len(side) for side in empty] == [0, 0]


def test_rows_sum_their_tokens_and_a_row_may_have_none():
    values = torch.tensor([0.1, 0.2, 0.4], requires_grad=True)
    sums = response_sums(values, torch.tensor([2, 0, 2]), 3)
    assert sums.tolist() == pytest.approx([0.2, 0.0, 0.5])
    (sums * torch.tensor([1.0, 5.0, 3.0])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [3, 1, 3]


def test_ktos_baseline_is_not_negative():
    assert kto_baseline(-0.3) == 0 and kto_baseline(0.7) == 0.7


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo", "simpo"])
@pytest.mark.parametrize("logprob", [-1e4, -1e-9, 0.0])
def test_extreme_probabilities_stay_finite(name, logprob):
    given = columns(1, 0, torch.float64)
    given["logprobs"] = torch.tensor([logprob, -3.0], dtype=torch.float64, requires_grad=True)
    loss, _ = loss_of(given, PreferenceSection(**CASES[name]))
    (gradient,) = torch.autograd.grad(loss, given["logprobs"])
    assert math.isfinite(loss.item()) and torch.isfinite(gradient).all()


def test_no_pairs_is_a_loss_of_zero_with_a_gradient():
    given = columns(1, 0)
    given["preference"] = torch.ones(2)
    given["logprobs"].requires_grad_()
    loss, sums = loss_of(given, PreferenceSection())
    loss.backward()
    assert loss.item() == 0 and sums["tokens"] == 0
    assert given["logprobs"].grad is not None and not given["logprobs"].grad.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dpp"}, "loss\n.*'dpp'"),
        ({"beta": 0.0}, "beta\n.*input_value=0"),
        ({"label_smoothing": 0.5}, "label_smoothing\n.*input_value=0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1 with loss=ipo"),
        ({"margin": 1.0}, "margin=1.0 with loss=dpo"),
        ({"nll_coef": -1.0}, "nll_coef\n.*input_value=-1"),
        ({"loss": "kto", "kto_weights": (1.0, -1.0)}, "kto_weights"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        PreferenceSection(**settings)


def test_what_a_loss_needs_is_named():
    given = columns(1, 0)
    pairs = ordered_pairs(given["preference"], given["prompt_ids"])
    rows = (given["logprobs"], given["response_lengths"], *pairs)
    with pytest.raises(ValueError, match="'dpo' needs ref_logprobs"):
        preference_loss(*rows, PreferenceSection())
    with pytest.raises(ValueError, match="'kto' needs a baseline"):
        preference_loss(*rows, PreferenceSection(loss="kto"), ref_logprobs=given["ref_logprobs"])
    with pytest.raises(ValueError, match=r"ref_logprobs \(1,\) and logprobs \(2,\)"):
        preference_loss(*rows, PreferenceSection(), ref_logprobs=given["ref_logprobs"][:1])
